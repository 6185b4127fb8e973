"""The grouped matmul of the experts, and their feed-forward block: one door each, several back-ends."""

from moeq_jax.kernels.api import grouped_matmul as grouped_matmul
from moeq_jax.kernels.api import prepare as prepare
from moeq_jax.kernels.ffn import moe_ffn as moe_ffn
