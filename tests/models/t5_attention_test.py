"""Attention of T5: buckets of distances as other implementations have them, biases, and the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from moeq_jax.models import t5_attention
from tests import tiny
from tests.golden import switches

HIDDEN, HEADS, HEAD_DIM = 10, 2, 4


def test_buckets_are_those_of_transformers():
  golden = safetensors.numpy.load_file(switches.HERE / "buckets.safetensors")
  assert len(golden) == 8
  for name, expected in golden.items():
    count, furthest, both = map(int, name.split("."))
    found = t5_attention.buckets(np.arange(-600, 601), count=count, furthest=furthest, bidirectional=bool(both))
    np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_near_distances_have_a_bucket_each_and_far_ones_share_the_last(bidirectional: bool):
  past = t5_attention.buckets(-np.arange(1000), count=16, furthest=50, bidirectional=bidirectional)
  last, exact = (7, 4) if bidirectional else (15, 8)
  np.testing.assert_array_equal(past[:exact], np.arange(exact))
  assert (np.diff(past) >= 0).all() and set(past) == set(range(last + 1))
  assert (past[50:] == last).all() and past[15] < last
  future = t5_attention.buckets(np.arange(1, 1000), count=16, furthest=50, bidirectional=bidirectional)
  np.testing.assert_array_equal(future, past[1:] + 8 if bidirectional else 0)


def test_a_bias_depends_on_the_distance_alone_and_its_rows_are_those_for_one_query():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(8, HEADS)), jnp.float32)
  for both in (False, True):
    bias = np.asarray(t5_attention.position_bias(table, 20, furthest=12, bidirectional=both))
    assert bias.shape == (1, HEADS, 20, 20)
    np.testing.assert_array_equal(bias[..., 1:, 1:], bias[..., :-1, :-1])
    np.testing.assert_array_equal(bias[0, :, 5, 5], table[0])
    assert (len(np.unique(bias[0, 0, 0])) > 1) == both  # the first query sees only what follows
  causal = t5_attention.position_bias(table, 20, furthest=12, bidirectional=False)
  for position in (0, 1, 7, 19):
    row = np.asarray(t5_attention.bias_at(table, jnp.int32(position), 20, furthest=12))
    np.testing.assert_array_equal(row[0, :, 0, : position + 1], np.asarray(causal)[0, :, position, : position + 1])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula_without_a_scale(causal: bool):
  rng = np.random.default_rng(0)
  module = t5_attention.Attention(HIDDEN, HEADS, HEAD_DIM, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x, other = rng.normal(size=(2, 2, 5, HIDDEN)).astype(np.float32)
  bias, mask = rng.normal(size=(1, HEADS, 5, 5)).astype(np.float32), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
  found = module(jnp.asarray(x), *module.keys_values(jnp.asarray(other)), bias=jnp.asarray(bias),
                 mask=jnp.asarray(mask)[:, None, None], causal=causal)
  q, k, v, o = (np.asarray(getattr(module, name).get_value(), np.float64) for name in "qkvo")
  heads = lambda a: np.moveaxis(a.reshape(2, 5, HEADS, HEAD_DIM), 2, 1)
  logits = heads(x @ q) @ heads(other @ k).swapaxes(-1, -2) + bias
  seen = mask[:, None, None] & (np.tril(np.ones((5, 5), bool)) | (not causal))
  mixed = tiny.softmax(np.where(seen, logits, -np.inf)) @ heads(other @ v)
  np.testing.assert_allclose(found, np.moveaxis(mixed, 1, 2).reshape(2, 5, -1) @ o, rtol=1e-4, atol=1e-5)
