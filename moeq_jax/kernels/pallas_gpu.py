"""The grouped matmul for Hopper GPUs, in Pallas' Mosaic GPU dialect: packed weights of any mix of widths, one launch.

It runs on an H200, where it passes the suite of all back-ends (tests/gpu), and in Pallas' GPU interpreter with race
detection, with the weights as shared-memory operand, since the interpreter has no wgmma with a register operand.
docs/kernels.md has the diagrams, and times beside those of other kernels.

Rows are sorted by expert; each expert's rows are cut into tasks of at most `Config.rows` rows, gathered into a padded
array, multiplied by `gpu_kernel.call`, and gathered back: a padded row has a place of its own and is never read.
float32 rows are cut into three bfloat16 parts that sum to them exactly (24 bits of mantissa), which become three rows;
codes are exact in bfloat16, and scales are applied after the product in float32, so the result is float32 too.

Ideas: weights as the register operand with rows as N of wgmma, tokamax's quantized ragged dot for sm90; codes placed
into the mantissa of a constant, known from kernels for 4 bits; planar bytes, docs/kernels.md. Plain arrays and the
gradient in x go through the plain loop of `cpu.py`: both are XLA, on any device.
"""

import math

import jax
import jax.numpy as jnp

from moeq_jax.kernels import cpu, gpu_kernel, gpu_view
from moeq_jax.kernels.gpu_kernel import Config
from moeq_jax.kernels.gpu_view import HopperWeights, prepare
from moeq_jax.qtensor import QTensor

__all__ = [
  "Config", "HopperWeights", "backward", "check", "forward", "heuristic", "prepare", "shared_bytes", "supports"]

SHARED_BYTES = 227 * 1024  # of one block, on Hopper
MULTIPROCESSORS = 132  # of an H100 SXM or H200, where no device says how many it has
RESERVED = 4096  # bytes of shared memory for barriers and alignment
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def supports(shape: tuple[int, int, int, int], dtypes: tuple[jnp.dtype, jnp.dtype | None], device: str) -> str | None:
  """The reason why this back-end does not take a matmul `(T, E, K, N)`, or None.

  Args:
    shape: `(T, E, K, N)`.
    dtypes: of x, and of w or None if w is packed.
    device: platform (`"gpu"`: the kind is that of the first device) or kind of device. Where an abstract mesh with an
      abstract device is set, as for ahead-of-time compilation and the interpreter, that device counts instead.
  """
  if shape[0] == 0:
    return "there are no rows"
  kind = _device_kind(device)
  if not any(name in kind.upper().replace("-", " ").split() for name in HOPPER):
    return f"the kernel is for Hopper GPUs ({', '.join(HOPPER)}), and the device is {kind!r}"
  if dtypes[1] is not None:
    return None
  if dtypes[0] not in (jnp.float32, jnp.bfloat16):
    return f"rows are {dtypes[0]}; it takes float32 and bfloat16"
  return None


def _device_kind(device: str) -> str:
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.device_kind
  if device not in ("gpu", "cuda"):
    return device
  try:
    return jax.local_devices(backend="gpu")[0].device_kind
  except RuntimeError:  # jax sees none
    return device


def _multiprocessors() -> int:
  """Of the device that programs are made for."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.num_cores or MULTIPROCESSORS
  return getattr(jax.local_devices()[0], "core_count", None) or MULTIPROCESSORS


def heuristic(rows: int, w: HopperWeights, exact: bool = False) -> Config:
  """Sizes of a launch; a few were compared on an H200, for Mixtral with 16, 64 and 4096 tokens.

  Args:
    rows: T; three for each row of float32.
    w: the weights, of which only sizes are read.
    exact: whether scales must be applied in float32, after the product.

  A task has the rows of an average busy expert and two standard deviations more, a multiple of 8 up to 128: a second
  task of an expert reads its weights again. Up to 32 rows scales come after the product. K is cut into as many parts,
  of two steps or more, as make the last round of blocks fullest.
  """
  experts, k_blocks, stripes = w.bits.shape
  steps, tiles, blocks = k_blocks * w.block_steps, stripes * w.tiles, _multiprocessors()
  busy = min(rows, experts)
  mean = rows / busy
  tile = min(128, -(-math.ceil(mean + 2 * math.sqrt(mean - 1)) // 8) * 8)
  after = exact or tile <= 32
  tile = min(tile, 64) if after else tile
  few = tile <= 24
  wide = 2 if tile == 8 and w.tiles % 2 == 0 else 1
  pieces = tiles // wide * max(busy, rows // tile)
  # rounds of blocks, times the steps of one and what a piece costs beside
  taken = lambda splits: -(-pieces * splits // blocks) * (-(-steps // splits) + 0.5)  # noqa: E731
  splits = min(range(1, max(1, min(8, steps // 2)) + 1), key=taken)
  return Config(rows=tile, splits=splits, scale="after" if after else "before", eighths=8 if few else 1,
                steps=3, fragments=3 if few else 4, chunks=10 if few else 8,
                sums=4 if few and wide == 1 else 1, exact=exact, blocks=blocks, tiles=wide)


def shared_bytes(w: HopperWeights, config: Config, dtype: jnp.dtype = jnp.float32) -> int:
  """Shared memory of one block, without barriers and alignment; at most about `SHARED_BYTES` can be had."""
  sizes = gpu_kernel.buffers(w, config, dtype).values()
  return sum(math.prod(shape) * jnp.dtype(kind).itemsize for shape, kind in sizes)


def check(w: HopperWeights, config: Config, dtype: jnp.dtype = jnp.float32) -> None:
  """Raises a ValueError that says which size of a launch does not fit, and what would."""
  size = shared_bytes(w, config, dtype)
  for fits, rule in (
    (config.rows % 8 == 0 < config.rows <= 256, "rows are a multiple of 8 up to 256"),
    (1 <= config.splits <= w.bits.shape[1] * w.block_steps, "splits are at least 1 and at most the steps along K"),
    (config.scale in ("after", "before"), "scale is 'after' or 'before'"),
    (config.eighths in (1, 8), "eighths are 1 or 8"),
    (config.chunks >= 4 and config.steps >= 1 and config.fragments >= 1, "rings have slots, that of chunks at least 4"),
    (config.sums >= 1 and (config.eighths == 8 or config.fragments >= (
      2 if config.scale == "before" else w.together * config.sums)),
     "sums are at least 1, and where fragments of x are copied alone there are slots for all that are under way, two or"
     " more"),
    (config.scale == "after" or not config.exact, "exact products are scaled after"),
    (config.tiles == 1 or config.rows <= 16, "two tiles leave registers for at most 16 rows"),
    (config.blocks >= 1, "blocks are at least 1"),
    (config.tiles in (1, 2) and w.tiles % config.tiles == 0, "tiles are 1, or 2 where a stripe has an even number"),
    (config.operand in ("registers", "shared"), "operand is 'registers' or 'shared'"),
    (size <= SHARED_BYTES - RESERVED,
     f"it needs {size} bytes of shared memory, and a block has {SHARED_BYTES} less {RESERVED}"),
  ):
    if not fits:
      raise ValueError(f"pallas_gpu: {config}: {rule}")


def forward(
  x: jax.Array, w: jax.Array | QTensor | HopperWeights, group_sizes: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`; see `api.grouped_matmul`. A QTensor is first brought into the Hopper view.

  Raises:
    ValueError: packed weights in a layout that `gpu_view.prepare` refuses.
  """
  if not isinstance(w, (QTensor, HopperWeights)):
    with jax.default_matmul_precision("highest"):  # float32 rows are multiplied in float32, not in TF32
      return cpu.forward(x, w, group_sizes, out_dtype)
  view = prepare(w) if isinstance(w, QTensor) else w
  if x.dtype == jnp.float32:
    parts = _exact_parts(x).reshape(-1, x.shape[1])
    y = _matmul(parts, view, 3 * group_sizes, jnp.dtype(jnp.float32), exact=True)
    return y.reshape(x.shape[0], 3, -1).sum(1).astype(out_dtype)
  return _matmul(x, view, group_sizes, out_dtype, exact=False).astype(out_dtype)


def backward(
  x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients `([T, K], [E, K, N])` of `forward`, the second None for packed weights: plain XLA, see `cpu.py`.

  Raises:
    TypeError: weights that only exist in the Hopper view; differentiate with the QTensor.
  """
  if isinstance(w, HopperWeights):
    raise TypeError("the gradient in x needs the QTensor: the Hopper view is for inference")
  with jax.default_matmul_precision("highest"):
    return cpu.backward(x, w, group_sizes, dy)


def _exact_parts(x: jax.Array) -> jax.Array:
  """`[T, K]` float32 -> `[T, 3, K]` bfloat16 that sum to it: each part takes the next 8 bits of the mantissa."""
  parts, rest = [], x
  for _ in range(3):
    # reduce_precision, because a cast there and back may be simplified away
    part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    rest = rest - part
  return jnp.stack(parts, 1)


def _matmul(x: jax.Array, w: HopperWeights, group_sizes: jax.Array, out_dtype: jnp.dtype, exact: bool) -> jax.Array:
  """`[T, K]` bfloat16 rows -> `[T, N]` in the dtype of the partial results."""
  experts, config = w.bits.shape[0], heuristic(len(x), w, exact)
  tasks = len(x) // config.rows + min(experts, len(x))
  cut = gpu_view.tasks(group_sizes, len(x), config.rows, tasks)
  padded = jnp.where(cut.valid[..., None], x[cut.rows], 0).reshape(-1, x.shape[1])
  fragments = gpu_view.rows_view(padded, w)
  if config.scale == "after":
    scaled = fragments.reshape(len(fragments), -1, w.together, *fragments.shape[2:])
    sums = jnp.sum(scaled, axis=(2, 4), dtype=jnp.float32)
  else:
    sums = jnp.zeros((1, 1, 1), jnp.float32)  # never read
  partial = jnp.dtype(jnp.float32) if exact or config.splits > 1 or config.scale == "after" else jnp.dtype(out_dtype)
  check(w, config, partial)
  y = gpu_kernel.call(w, config, cut.expert, fragments, sums, partial)
  y = (y[0] if config.splits == 1 else y.sum(0)).reshape(-1, y.shape[3])
  return gpu_view.columns(y[cut.position], w)
