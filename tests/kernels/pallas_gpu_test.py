"""The Hopper back-end in Pallas' interpreter, on an abstract H100, with race detection; nothing here is a GPU.

One interpreted launch takes about 20 s on two cores, so each test here covers several things. The whole shared suite
runs with `-m thorough` (some minutes).
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moeq_jax import planar, qtensor
from moeq_jax.kernels import api, gpu_unpack, gpu_view, pallas_gpu, shapes
from tests import conformance

H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=8)
MESH = jax.sharding.AbstractMesh((), (), abstract_device=H100)
heuristic = pallas_gpu.heuristic
BFLOAT16 = jnp.dtype(jnp.bfloat16)


IN_CHILD = "MOEQ_HOPPER_CHILD" in os.environ
interpreted = pytest.mark.skipif(not IN_CHILD, reason="runs in the process that test_interpreted_launches starts")


@pytest.mark.skipif(IN_CHILD, reason="is the parent")
@pytest.mark.parametrize("marked", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)])
def test_interpreted_launches(marked: str):
  """XLA's pool has one thread per core: callbacks of warpgroups that wait for each other would block all of it."""
  flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
  environment = {**os.environ, "MOEQ_HOPPER_CHILD": "1", "JAX_PLATFORMS": "cpu", "NPROC": "16",
                 "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
  command = [sys.executable, "-m", "pytest", __file__, "-k", "interpreted", "-m", marked, "-p", "no:cacheprovider"]
  child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * 3600)
  assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """An abstract H100, uninitialised memory full of NaN, small rings that wrap; fails if any launch has a race."""
  monkeypatch.setattr(pallas_gpu, "heuristic", functools.partial(_small, {}))
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  launches = conformance.made_by(monkeypatch, gpu_callbacks, "GPURaceDetectionState")
  params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
  with jax.sharding.use_abstract_mesh(MESH), plgpu.force_gpu_interpret_mode(params):
    yield
  assert not any(races.races_found for races in launches)


def _small(changed: dict, *args, **kwargs) -> pallas_gpu.Config:
  """The heuristic with small rings and the weights as shared operand, which the interpreter needs."""
  rings = {"chunks": 5, "steps": 2, "fragments": 2, "sums": 1, "blocks": 2, "operand": "shared"}
  return pallas_gpu.Config(**{**vars(heuristic(*args, **kwargs)), **rings, **changed})


def _run(x: np.ndarray, w, sizes: np.ndarray) -> np.ndarray:
  return np.asarray(conformance.jitted("pallas_gpu")(x, w, np.asarray(sizes, np.int32)))


@interpreted
@pytest.mark.thorough
@pytest.mark.usefixtures("interpreter")
class TestInterpretedHopper(conformance.Conformance):
  backend = "pallas_gpu"
  kept = False


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_all_widths_in_one_launch_with_empty_experts_experts_of_one_row_and_poisoned_padding():
  bits = np.array([1, 2, 3, 4, 8, 16])
  made = conformance.packed(bits, (6, 96, 140), group=32, capacity=600)
  buffer, scale = np.array(made.q.buffer), np.array(made.q.scale)
  buffer[:, qtensor.used_rows(made.q):], scale[bits == 16] = 0xFF, np.nan
  q = jax.tree.unflatten(jax.tree.structure(made.q), [buffer, made.q.bits, made.q.offset, scale, made.q.zero])
  x, sizes = conformance.rows(20, 96, ml_dtypes.bfloat16), np.array([3, 7, 0, 1, 5, 4])
  y = _run(x, q, sizes)
  assert y.dtype == jnp.bfloat16
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 3e-3  # half a unit of bfloat16


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_interpreted_float32_rows_and_widths_inside_an_expert_and_split_k(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(pallas_gpu, "heuristic", functools.partial(_small, {"splits": 2}))
  bits = np.random.default_rng(3).choice((1, 2, 3, 4), (2, 2, 2))
  made = conformance.packed(bits, (2, 500, 50), group=32)
  x, sizes = conformance.rows(7, 500), np.array([5, 2])
  assert conformance.difference(_run(x, made.q, sizes), conformance.expected(x, made.values, sizes)) < 1e-6


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("shape", "group"), [((2, 768, 64), 32), ((2, 64, 64), 64)])
def test_interpreted_scales_before_the_product_and_tiles_of_unusual_size(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], group: int):
  changed = {"scale": "before", "eighths": 1}
  monkeypatch.setattr(pallas_gpu, "heuristic", functools.partial(_small, changed))
  made = conformance.packed((3, 2), shape, group=group)
  x, sizes = conformance.rows(20, shape[1], ml_dtypes.bfloat16), np.array([17, 3])
  assert conformance.difference(_run(x, made.q, sizes), conformance.expected(x, made.values, sizes)) < 6e-3


@pytest.mark.parametrize("bits", qtensor.WIDTHS)
def test_the_order_of_copies_is_the_order_of_reads(bits: int):
  traced, copied, done = jnp.int32(bits), 0, 0
  for planes, fields in gpu_unpack.batches(bits):
    for plane in planes:
      assert plane == gpu_unpack.plane(bits, copied) == gpu_unpack.plane(traced, jnp.int32(copied))
      assert gpu_unpack.ready(traced, jnp.int32(copied)) == (len(fields) if plane == planes[-1] else 0)
      copied += 1
    for field in fields:
      assert field.eighth == gpu_unpack.eighth(traced, jnp.int32(done))
      assert set(field.planes) <= set(planes)
      done += 1
    # neighbours may be added before they are scaled
    for one, other in zip(fields[::2], fields[1::2], strict=bits < 16):
      assert (one.eighth + 1, one.multiplier, one.offset) == (other.eighth, other.multiplier, other.offset)
  assert (copied, done) == (bits, 8)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bits", qtensor.WIDTHS)
@pytest.mark.parametrize(("K", "group", "blocks"), [
  (512, 128, 1), (256, 32, 1), (768, 32, 1), (64, 0, 1), (96, 32, 3), (48, 0, 3)])
def test_fields_are_the_weights(bits: int, K: int, group: int, blocks: int, exact: bool):
  made = conformance.packed(np.full((1, blocks, 1), bits), (1, K, 128), group=group)
  w = gpu_view.prepare(made.q)
  x = gpu_view.rows_view(jnp.asarray(np.eye(K, dtype=np.float32)), w)
  total = np.zeros((K, 128))
  for block, step in np.ndindex(blocks, w.block_steps):
    origin = int(w.first[0, block, 0]) + step % w.fragments + step // w.fragments * bits * w.fragments
    for planes, fields in gpu_unpack.batches(bits):
      read = {i: w.chunks[0, origin + i * w.fragments] for i in planes}
      for field in fields:
        operand = np.asarray(gpu_unpack.in_interpreter(field, read, exact), np.float64)
        field = gpu_unpack.centred(field) if exact else field
        code = operand * field.multiplier + field.offset
        total += np.asarray(x[block * w.block_steps + step, field.eighth], np.float64) @ code.T
  wanted = made.codes[0] if bits < 16 else made.values[0]
  np.testing.assert_array_equal(total, wanted)


@pytest.mark.parametrize(("sizes", "rows"), [
  ((4, 0, 9, 16, 3), 8), ((0, 0, 32, 0), 8), ((1,), 24), ((8, 16, 24), 8), ((0, 1, 0, 1), 128), ((100, 3), 16)])
def test_tasks_hold_every_row_once_with_its_expert(sizes: tuple[int, ...], rows: int):
  total, experts = sum(sizes), len(sizes)
  count = total // rows + min(experts, total)
  found = gpu_view.tasks(jnp.asarray(sizes, jnp.int32), total, rows, count)
  filled = np.where(found.valid, np.asarray(found.rows), -1).reshape(-1)
  np.testing.assert_array_equal(filled[np.asarray(found.position)], np.arange(total))
  assert np.asarray(found.valid).sum() == total
  expert = np.asarray(found.expert)
  np.testing.assert_array_equal(expert[np.asarray(found.position) // rows], np.repeat(np.arange(experts), sizes))
  busy = sum(-(-size // rows) for size in sizes)
  assert expert[count] == busy and (expert[busy:count] == experts).all()


def test_the_view_has_the_bytes_of_the_buffer():
  q = conformance.packed((3, 2, 4), (3, 512, 256), group=128).q
  w = gpu_view.prepare(q)
  assert w.chunks.size == q.buffer.size
  assert w.affine.size == 2 * q.scale.size
  assert w.chunks.shape == (2, 3 * 512 // 64 * 9 // 3 // 8, 128, 64)


@pytest.mark.parametrize("name", shapes.LAYERS)
@pytest.mark.parametrize("rows", [1, 16, 64, 512, 8192])
@pytest.mark.parametrize("exact", [False, True])
def test_launches_fit_a_multiprocessor(name: str, rows: int, exact: bool):
  for experts, K, N in shapes.LAYERS[name].matmuls().values():
    w = _abstract_view(experts, K, N)
    config = heuristic(rows, w, exact)
    pallas_gpu.check(w, config)
    assert config.rows % 8 == 0
    assert config.rows <= 256
    assert config.chunks >= 4
    assert 1 <= config.splits <= w.block_steps


def _abstract_view(experts: int, K: int, N: int) -> gpu_view.HopperWeights:
  size = planar.layout(K, N, 128 if K % 128 == 0 else 64)
  shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
  entries = shaped(BFLOAT16, experts, -(-K // size.group), N)
  blocks = shaped(jnp.int32, experts, 1, 1)
  buffer = shaped(jnp.uint8, 1, experts * size.k_block * 3 // 8, N)
  q = qtensor.QTensor(buffer, blocks, blocks, entries, entries, K, N, size.group, size.k_tile, size.k_block)
  return jax.eval_shape(gpu_view.prepare, q)


@pytest.mark.parametrize("device", ["cpu", "tpu", "NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090"])
def test_other_devices_are_refused(device: str):
  assert "for Hopper GPUs" in pallas_gpu.supports((8, 2, 64, 64), (BFLOAT16, None), device)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200 480GB"])
def test_hopper_devices_are_known_by_name(device: str):
  assert pallas_gpu.supports((8, 2, 64, 64), (BFLOAT16, None), device) is None
  assert "no rows" in pallas_gpu.supports((0, 2, 64, 64), (BFLOAT16, None), device)


def test_an_abstract_device_counts_before_the_platform():
  dtypes = BFLOAT16, None
  with jax.sharding.use_abstract_mesh(MESH):
    assert pallas_gpu.supports((8, 2, 64, 64), dtypes, "cpu") is None
  with pytest.raises(ValueError, match=r"pallas_gpu: the kernel is for Hopper GPUs .* and the device is 'cpu'"):
    q = conformance.packed(2, (2, 64, 64)).q
    api.grouped_matmul(conformance.rows(8, 64), q, np.array([4, 4]), backend="pallas_gpu")


def test_layouts_that_cannot_be_cut_are_refused_by_name():
  with pytest.raises(ValueError, match="K-tiles of 96 rows with groups of 128"):
    gpu_view.fragment_width(96, 128, True)
  q = conformance.packed(2, (2, 64, 64)).q
  shards = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), q)
  with pytest.raises(ValueError, match="one shard, and the QTensor holds 2"):
    gpu_view.prepare(shards)


@pytest.mark.parametrize(("changes", "said"), [
  ({"rows": 12}, "rows are a multiple of 8"), ({"rows": 264}, "up to 256"), ({"splits": 0}, "splits are at least 1"),
  ({"splits": 9}, "at most the steps along K"), ({"scale": "never"}, "scale is 'after' or 'before'"),
  ({"eighths": 3}, "eighths are 1 or 8"), ({"chunks": 3}, "that of chunks at least 4"),
  ({"operand": "constant"}, "operand is"), ({"chunks": 64}, r"needs \d+ bytes of shared memory, .* has 232448"),
  ({"sums": 0}, "sums are at least 1"), ({"eighths": 1, "sums": 2}, "slots for all that are under way"),
  ({"eighths": 1, "scale": "before", "fragments": 1}, "slots for all that are under way"),
  ({"scale": "before", "exact": True}, "exact products are scaled after"), ({"blocks": 0}, "blocks are at least 1"),
  ({"tiles": 2}, "tiles are 1, or 2 where"), ({"tiles": 2, "rows": 24}, "at most 16 rows")])
def test_launches_that_do_not_fit_are_refused(changes: dict, said: str):
  w = _abstract_view(2, 4096, 128)
  config = heuristic(16, w)
  pallas_gpu.check(w, config)
  with pytest.raises(ValueError, match=f"pallas_gpu: Config.*{said}"):
    pallas_gpu.check(w, dataclasses.replace(config, **changes))


def test_lowering_for_cuda_with_weights_in_registers():
  made = conformance.packed((2, 3), (2, 256, 128), group=128)
  run = jax.jit(functools.partial(pallas_gpu.forward, out_dtype=BFLOAT16))
  with jax.sharding.use_abstract_mesh(MESH):
    x = conformance.rows(16, 256, ml_dtypes.bfloat16)
    lowered = run.trace(x, made.q, np.array([9, 7], np.int32)).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()
