"""The grouped matmul of the experts: one door, several back-ends."""

from moeq_jax.kernels.api import grouped_matmul as grouped_matmul
