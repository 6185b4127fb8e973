"""The table of codecs: spec strings, and what holds for each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import codecs, registry

SPECS = ["rtn(group=32)", "hqq(group=32)", "gptq(group=32)"]


@pytest.mark.parametrize("text", ["rtn", "rtn(group=128)", "hqq(start=search, group=0)", "gptq(damping=0.05)"])
def test_spec_strings_round_trip(text):
  codec = codecs.get(text)
  assert codecs.get(str(codec)) == codec
  assert registry.canonical(str(codec)) == str(codec)


def test_options_arrive():
  assert codecs.get("gptq(group=128, damping=0.05)").spec == codecs.gptq.Spec(group=128, damping=0.05)
  assert codecs.get("hqq(start=search)").spec.start == "search"
  assert codecs.get("rtn").group == 64
  assert str(codecs.get("gptq(damping=0.01)")) == "gptq(group=64)"


@pytest.mark.parametrize(("text", "said"), [
    ("gptk", "did you mean 'gptq'"),
    ("rtn(grp=64)", "did you mean 'group'"),
    ("rtn(group=48)", "is not one of"),
    ("hqq(start=middle)", "neither 'minmax' nor 'search'"),
])
def test_wrong_specs_say_what_is_right(text, said):
  with pytest.raises(ValueError, match=said):
    codecs.get(text)


@pytest.mark.parametrize("text", SPECS)
def test_one_compilation_serves_every_width_and_every_expert(text):
  random = np.random.default_rng(0)
  w = random.standard_normal((2, 64, 16)).astype(np.float32)
  inputs = random.standard_normal((2, 100, 64)).astype(np.float32)
  moment = np.einsum("etk,etl->ekl", inputs, inputs)
  encode = jax.jit(jax.vmap(codecs.get(text).encode, in_axes=(0, None, 0)))
  sizes = []
  for bits in codecs.WIDTHS:
    encoded = encode(w, jnp.int32(bits), moment)
    assert encoded.codes.dtype == jnp.uint8 and encoded.scale.dtype == encoded.zero.dtype == jnp.bfloat16
    assert int(encoded.codes.max()) == 2**bits - 1
    sizes.append(float(np.square(codecs.decode(encoded, 32, 64) - w).sum()))
  assert encode._cache_size() == 1
  assert sizes == sorted(sizes, reverse=True)


def test_a_codec_can_be_a_static_argument():
  @jax.jit
  def closed(w):
    return codecs.get("rtn(group=32)").encode(w, 4)

  static = jax.jit(lambda w, codec: codec.encode(w, 4), static_argnames="codec")
  w = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
  np.testing.assert_array_equal(static(w, codec=codecs.get("rtn(group=32)")).codes, closed(w).codes)
  static(w, codec=codecs.get("rtn(group=32)"))
  assert static._cache_size() == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
  w = np.zeros((3, 4, 5), np.float32)
  codecs.check_finite(w, "fine")
  w[1, 2, 3] = value
  with pytest.raises(ValueError, match=r"'experts\.0\.w1': 1 of 60 values .* first at \(1, 2, 3\)"):
    codecs.check_finite(w, "experts.0.w1")
