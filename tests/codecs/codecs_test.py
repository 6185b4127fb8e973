"""The table of codecs: spec strings, and what holds for each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import codecs, registry

SPECS = ["rtn(group=32)", "hqq(group=32)", "gptq(group=32)", "gptq_official(group=32)"]


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


def _matrix(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """A weight `[96, 24]` and the second moment of correlated inputs."""
  random = np.random.default_rng(seed)
  inputs = random.standard_normal((200, 96)) @ random.standard_normal((96, 96))
  return random.standard_normal((96, 24)).astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def _same(found: codecs.Encoded, wanted: codecs.Encoded) -> None:
  for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("text", SPECS)
def test_columns_of_different_widths_are_those_of_uniform_encodings(text):
  w, moment = _matrix(2)
  encode = jax.jit(codecs.get(text).encode)
  widths = np.resize([1, 2, 3, 4], 24)
  mixed = encode(w, widths[None], moment)
  uniform = {bits: encode(w, jnp.full((1, 24), bits), moment) for bits in (1, 2, 3, 4)}
  _same(mixed, codecs.Encoded(*(np.stack([np.asarray(field)[:, n] for n, field in enumerate(fields)], 1)
                                for fields in zip(*(uniform[bits] for bits in widths)))))
  _same(uniform[3], encode(w, 3, moment))


@pytest.mark.parametrize("text", SPECS[:2])
def test_groups_of_different_widths_are_those_of_uniform_encodings(text):
  w, moment = _matrix(3)
  encode = jax.jit(codecs.get(text).encode)
  mixed = encode(w, np.array([[3], [1], [4]]), moment)
  for group, bits in enumerate((3, 1, 4)):
    uniform, rows = encode(w, bits, moment), slice(32 * group, 32 * group + 32)
    np.testing.assert_array_equal(mixed.codes[rows], uniform.codes[rows])
    np.testing.assert_array_equal(mixed.scale[group], uniform.scale[group])


def test_gptq_feeds_errors_back_between_groups_of_different_widths():
  w, moment = _matrix(4)
  found = {text: codecs.errors(w, codecs.get(text).encode(w, np.array([[1], [2], [4]]), moment), moment)[1]
           for text in (SPECS[0], SPECS[2])}
  assert found["gptq(group=32)"] < 0.8 * found["rtn(group=32)"]  # what the first groups lose, the last one makes up for


def test_widths_of_another_shape_are_refused():
  w, moment = _matrix(5)
  for widths in (np.ones(24, int), np.ones((2, 24), int), np.ones((3, 23), int)):
    with pytest.raises(ValueError, match="give one number"):
      codecs.get("rtn(group=32)").encode(w, widths, moment)
