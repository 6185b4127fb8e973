"""The door: the choice of a back-end, its errors, and gradients through a jitted model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import kernels
from moeq_jax.kernels import api, shapes
from tests import conformance

X, W, SIZES = conformance.rows(20, 64), np.ones((3, 64, 16), np.float32), np.array([5, 0, 15], np.int32)


def test_the_package_names_the_door():
  assert kernels.grouped_matmul is api.grouped_matmul


def test_an_unknown_backend_lists_the_known():
  with pytest.raises(ValueError, match=r"unknown back-end 'tpu'.*cpu.*reference"):
    api.grouped_matmul(X, W, SIZES, backend="tpu")


def test_the_first_backend_that_supports_is_chosen():
  q = conformance.packed(2, (3, 64, 16)).q
  assert api.choose(X, q, device="cpu") == "cpu"
  assert api.choose(X, q, device="gpu") == "reference"
  assert api.choose(X, W, device="gpu") == "cpu"


def test_what_has_not_run_on_its_device_is_taken_only_by_name():
  q = conformance.packed(2, (3, 256, 128)).q
  x = jnp.ones((8, 256), jnp.bfloat16)
  assert api.choose(x, q, device="tpu") == "reference"
  assert api.choose(x, q, backend="pallas_tpu", device="tpu") == "pallas_tpu"


def test_a_named_backend_that_does_not_support_fails_with_its_reason():
  with pytest.raises(ValueError, match="cpu: packed weights are unpacked in a loop made for CPUs"):
    api.choose(X, conformance.packed(2, (3, 64, 16)).q, backend="cpu", device="gpu")


def test_no_backend_lists_every_reason(monkeypatch):
  refusing = {
    name: dataclasses.replace(entry, supports=lambda *_, name=name: f"no {name} today")
    for name, entry in api.BACKENDS.items()
  }
  monkeypatch.setattr(api, "BACKENDS", refusing)
  with pytest.raises(ValueError, match=r"\(20, 3, 64, 16\).*cpu: no cpu today; reference: no reference today"):
    api.grouped_matmul(X, W, SIZES)


def test_no_rows_give_no_rows():
  for w in (W, conformance.packed(2, (3, 64, 16)).q):
    assert api.grouped_matmul(X[:0], w, np.zeros(3, np.int32)).shape == (0, 16)


@pytest.mark.parametrize(("x", "w", "sizes", "said"), [
  (X[:, :32], W, SIZES, "are not"),
  (X, W[0], SIZES, "are not"),
  (X, W, SIZES[:2], "are not"),
  (X[0], W, SIZES, "are not"),
  (X, W, SIZES + 1, "sum to 23, but x has 20 rows"),
  (X, W, np.array([25, -10, 5], np.int32), "the least is -10"),
  (X, W.astype(np.uint8), SIZES, "w is uint8, and weights are floating-point arrays or QTensors"),
  (X, {"q": W}, SIZES, "w is dict"),
  (X.astype(np.float16), W, SIZES, "x is float16"),
  (X, W, SIZES.astype(np.float32), "group_sizes are float32, and numbers of rows are integers"),
])
def test_bad_input_is_named(x, w, sizes, said):
  with pytest.raises(ValueError, match=said):
    api.grouped_matmul(x, w, sizes)


def test_group_sizes_may_be_a_list():
  np.testing.assert_array_equal(api.grouped_matmul(X, W, SIZES.tolist()), api.grouped_matmul(X, W, SIZES))


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_every_backend_names_what_is_wrong(backend: str):
  """Before it asks whether this is its device, so the same messages come on every machine, and from `prepare`."""
  q = conformance.packed((2, 3, 4), (3, 64, 16), group=64).q

  def changed(**fields):
    return dataclasses.replace(q, **fields)

  for w, said in ((changed(bits=q.bits + 3), r"widths \[5, 6, 7\] are not in \(1, 2, 3, 4, 8, 16\)"),
                  (changed(buffer=q.buffer[:, :-1]), "outside the buffer of 71 rows"),
                  (changed(buffer=q.buffer.astype(np.int8)), "buffer is int8, not uint8"),
                  (changed(k_tile=48), "a K-block of 64 rows cuts a tile of 48")):
    with pytest.raises(ValueError, match=f"grouped_matmul: w: .*{said}"):
      api.grouped_matmul(X, w, SIZES, backend=backend)
    with pytest.raises(ValueError, match=f"grouped_matmul: w: .*{said}"):
      api.prepare(w, backend)
  for x, w, sizes, said in ((X, q, SIZES + 1, "group_sizes sum to 23, but x has 20 rows"),
                            (X, q, -SIZES, "group_sizes sum to -20"), (X, q, SIZES[:2], "are not"),
                            (X[:, 1:], q, SIZES, "are not"), (X.astype(np.float16), q, SIZES, "x is float16"),
                            (X, q.buffer, SIZES, "w is uint8"), (X, "w4a16", SIZES, "w is str, and weights are")):
    with pytest.raises(ValueError, match=said):
      api.grouped_matmul(x, w, sizes, backend=backend)


@pytest.mark.parametrize(("backend", "device", "said"), [
  ("cpu", "tpu", "cpu: packed weights are unpacked in a loop made for CPUs, and the device is 'tpu'"),
  ("cpu_int8", "tpu", "cpu_int8: activations in 8 bits are for CPUs, and the device is 'tpu'"),
  ("pallas_tpu", "gpu", "pallas_tpu: it is made for TPUs, and the device is 'gpu'"),
  ("pallas_gpu", "NVIDIA A100-SXM4-80GB", r"pallas_gpu: the kernel is for Hopper GPUs \(H100, .* 'NVIDIA A100"),
])
def test_another_device_is_refused_by_name_of_both(backend: str, device: str, said: str):
  with pytest.raises(ValueError, match=rf"no back-end for \(T, E, K, N\) = \(20, 3, 64, 16\).*{said}"):
    api.choose(X, conformance.packed(2, (3, 64, 16)).q, backend=backend, device=device)


def test_a_view_of_an_unknown_backend_is_refused():
  q = conformance.packed(2, (3, 64, 16)).q
  with pytest.raises(ValueError, match="unknown back-end 'rocm'; there are"):
    api.grouped_matmul(X, api.Prepared(q, "rocm", q.shape), SIZES)


@pytest.mark.parametrize(("change", "said"), [
  (lambda q: {"bits": q.bits + 3}, r"widths \[5\] are not in"),
  (lambda q: {"buffer": q.buffer[:, :-1]}, "blocks overlap or lie outside the buffer of 47 rows"),
  (lambda q: {"buffer": q.buffer.astype(np.int8)}, "buffer is int8, not uint8"),
  (lambda q: {"buffer": q.buffer[..., :-1]}, "stripes of 15 do not fit N = 16"),
  (lambda q: {"offset": q.offset + 1}, "outside the buffer"),
  (lambda q: {"scale": q.scale[:, :, :-1]}, "scale has shape"),
  (lambda q: {"zero": q.zero.astype(np.float32)}, "zero is float32, not bfloat16"),
  (lambda q: {"k_tile": 48}, "cuts a tile of 48"),
  (lambda q: {"group": 48}, "cuts a group of 48|scale has shape"),
])
def test_a_damaged_packed_weight_is_named(change, said):
  q = conformance.packed(2, (3, 64, 16), group=64).q
  damaged = dataclasses.replace(q, **change(q))
  with pytest.raises(ValueError, match=said):
    api.grouped_matmul(X, damaged, SIZES)


@pytest.mark.parametrize("field", ["buffer", "scale"])
def test_wrong_shapes_are_named_inside_jit(field):
  q = conformance.packed(2, (3, 64, 16), group=64).q
  damaged = dataclasses.replace(q, **{field: getattr(q, field)[..., :-1]})
  with pytest.raises(ValueError, match="stripes of 15|scale has shape"):
    jax.jit(api.grouped_matmul)(X, damaged, SIZES)


def test_a_bad_output_type_is_named():
  with pytest.raises(ValueError, match="out_dtype is int32"):
    api.grouped_matmul(X, W, SIZES, out_dtype=jnp.int32)


def test_gradient_through_a_jitted_feed_forward_block():
  first, second = (conformance.packed(bits, shape) for bits, shape in (((2, 3), (2, 64, 96)), ((16, 1), (2, 96, 64))))
  x, sizes = conformance.rows(30, 64), shapes.group_sizes("uniform", 30, 2)

  def block(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(api.grouped_matmul(jax.nn.silu(api.grouped_matmul(x, first, sizes)), second, sizes) ** 2)

  packed = jax.jit(jax.grad(block))(x, first.q, second.q)
  dense = jax.jit(jax.grad(block))(x, first.values.astype(np.float32), second.values.astype(np.float32))
  assert conformance.difference(packed, np.asarray(dense, np.float64)) < 1e-5


def test_rematerialisation_and_scan_over_layers():
  made = [conformance.packed(bits, (2, 64, 64), seed=seed, capacity=200) for seed, bits in enumerate(((2, 3), (1, 4)))]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(m.q for m in made))
  x, sizes = conformance.rows(30, 64), np.array([10, 20], np.int32)

  @jax.checkpoint
  def layer(x: jax.Array, q: kernels.api.QTensor) -> tuple[jax.Array, None]:
    return api.grouped_matmul(x, q, sizes), None

  value, pull = jax.vjp(lambda x: jax.lax.scan(layer, x, stacked)[0], x)
  middle = conformance.expected(x, made[0].values, sizes)
  assert conformance.difference(value, conformance.expected(middle, made[1].values, sizes)) < 1e-5
  dy = conformance.rows(30, 64, seed=5)
  wanted = dy
  for part in reversed(made):
    wanted = conformance.expected(wanted, part.values.swapaxes(1, 2), sizes)
  assert conformance.difference(pull(jnp.asarray(dy))[0], wanted) < 1e-5


def test_backends_that_read_qtensors_prepare_nothing():
  made = conformance.packed(2, (2, 64, 32))
  for name in (None, "cpu", "cpu_int8", "reference"):
    assert api.prepare(made.q, name) is made.q
  with pytest.raises(ValueError, match="unknown back-end 'gpu'"):
    api.prepare(made.q, "gpu")
  with pytest.raises(ValueError, match="not uint8"):
    api.prepare(dataclasses.replace(made.q, buffer=made.q.buffer.astype(np.int32)), "cpu")
