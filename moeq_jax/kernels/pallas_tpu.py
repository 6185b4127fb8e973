"""The grouped matmul for TPUs: one kernel over the flat packed buffer, for every mix of widths.

The kernel walks along a list of visits (`tpu_visits.py`): an expert and some of its rows. For every visit, column tile
and K-step it copies exactly the packed bytes of that piece of the weight, `bits` data read from scalar memory, unpacks
them (`tpu_unpack.py`) and multiplies. What is copied next is fetched while this is computed.

Scales are applied after the dot of each group where rows are few (`scale_after`: `sum_k x_k (c_k - z) s = s (x c - z
sum x)`, work in proportion to rows), before it where they are many (work in proportion to weights); then the first row
tile is multiplied while the weight is being dequantized, and the other row tiles of the visit reuse it from scratch.

The structure with visits in order is that of a fused decoding kernel that streams each active expert once; that of the
chunks of aligned rows is a grouped matmul with tasks (megablox, Gale et al. 2022, section 5).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moeq_jax import planar
from moeq_jax.kernels import cpu, tpu_tile, tpu_unpack, tpu_view, tpu_visits
from moeq_jax.kernels.tpu_view import BLOCK, LANES, View
from moeq_jax.qtensor import QTensor

INTERPRET: Any = None  # `pltpu.InterpretParams(...)` runs the kernel on a CPU, slowly; tests set it
INTERPRETED_DEVICE = jax.sharding.AbstractDevice("TPU v5e", 1, "tpu")  # whose sizes the kernel then sees
VMEM = 100 * 2**20  # bytes that a kernel may ask for, of 128 MiB on v5e and v6e
SUBLANES = 8
IN_ORDER = 64  # most rows that stay in order; all of them lie in vector memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes and the way of one call.

  Attributes:
    rows: rows of a row tile, a multiple of 16.
    row_tiles: most row tiles of a visit; each weight is dequantized once per visit.
    columns: columns of a column tile; divides the stripe of the view.
    depth: rows of K of a K-step; a multiple of the K-tile that divides the K-block.
    unroll: K-tiles that are computed without a loop around them; divides those of a K-step.
    in_order: rows stay in order, and one visit covers all of them (`rows >= T`, `row_tiles == 1`).
    scale_after: scale after the dot (`row_tiles == 1`).
  """

  rows: int
  row_tiles: int
  columns: int
  depth: int
  unroll: int
  in_order: bool
  scale_after: bool


def heuristic(rows: int, experts: int, view: View) -> Config:
  """Tile sizes for `rows` rows over `experts` experts.

  Up to `IN_ORDER` rows stay in order. Else a row tile is about twice the rows of an average expert, from 16 to 256.
  Scales come after the dot up to 64 rows, if groups fill a lane tile. With few rows, tiles are large so that copies are
  long, and the work between two loop edges is up to a million weights. Otherwise a visit covers one row tile, or up to
  1024 rows where an average expert has more than 256 (keeping what was dequantized costs more than it saves before),
  and all K-tiles of a K-step are computed without a loop, so that one is dequantized while another is multiplied; the
  first of them hides behind nothing, so tiles are large here too.
  """
  in_order = rows <= IN_ORDER
  mean = max(1, rows // experts)
  tile = -(-rows // 16) * 16 if in_order else min(256, max(16, 1 << (2 * mean - 1).bit_length()))
  after = tile <= 64 and view.group % LANES == 0
  row_tiles = 4 if mean > 256 and not after and not in_order else 1
  columns = _largest(view.words.shape[2], LANES, 1024)
  depth = _largest(view.k_block, view.k_tile, 4096 if after else 1536)
  unroll = _largest(depth, view.k_tile, max(view.k_tile, 2**20 // columns) if after else depth) // view.k_tile
  return Config(rows=tile, row_tiles=row_tiles, columns=columns, depth=depth, unroll=unroll, in_order=in_order,
                scale_after=after)


def _largest(size: int, unit: int, most: int) -> int:
  """The largest multiple of `unit` up to `most` that divides `size`; `unit` divides it."""
  return max(c for c in range(unit, max(unit, most) + 1, unit) if size % c == 0)


def supports(shape: tuple[int, int, int, int], dtypes: tuple[jnp.dtype, jnp.dtype | None], device: str) -> str | None:
  """The reason why this back-end does not take a matmul `(T, E, K, N)`, or None.

  It takes every width, group, K and N; K-tiles below 256 rows and stripes that are no multiple of 128 columns are
  padded in the view. Plain arrays on a TPU are multiplied by XLA.
  """
  if device != "tpu" and INTERPRET is None:
    return f"it is made for TPUs, and the device is {device!r}"
  if shape[0] == 0:
    return "there are no rows"
  if dtypes[1] is None and IN_ORDER * shape[2] * 8 > VMEM // 2:
    return f"rows of K = {shape[2]} do not fit into vector memory"
  return None


def prepare(q: QTensor) -> View:
  """The view of one shard in the order of words that suits the TPU it is made on; see `tpu_view.prepare`."""
  with _described():
    return tpu_view.prepare(q, paired=pltpu.get_tpu_info().generation < 6)


def forward(x: jax.Array, w: jax.Array | QTensor | View, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`; see `api.grouped_matmul`. A QTensor is viewed anew at every call."""
  if isinstance(w, jax.Array):
    return cpu.forward(x, w, group_sizes, out_dtype)
  view = prepare(w) if isinstance(w, QTensor) else w
  return matmul(x, view, group_sizes, out_dtype, heuristic(x.shape[0], group_sizes.shape[0], view))


def backward(
  x: jax.Array, w: jax.Array | QTensor | View, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients `([T, K], [E, K, N])` of `forward`, the second None for packed weights.

  No kernel of its own yet: the loop of the CPU back-end, compiled for the TPU. A view is turned back first, which
  costs a pass over its bytes.
  """
  if not isinstance(w, View):
    return cpu.backward(x, w, group_sizes, dy)
  dx, _ = cpu.backward(tpu_view.spread_k(w, x), tpu_view.restore(w), group_sizes, tpu_view.spread_n(w, dy))
  return tpu_view.gather_k(w, dx), None


def matmul(
  x: jax.Array, view: View, group_sizes: jax.Array, out_dtype: jnp.dtype, config: Config
) -> jax.Array:
  """`forward` with its tile sizes given.

  Raises:
    ValueError: the tile sizes do not fit the view or the rows.
  """
  _check(config, view, x.shape[0])
  group_sizes = jnp.asarray(group_sizes, jnp.int32)
  x, total = tpu_view.spread_k(view, x), x.shape[0]
  if config.in_order:
    visits = tpu_visits.in_order(group_sizes, total)
    rows = jnp.pad(x, ((0, config.rows - total), (0, 0)))
    y = _call(rows, view, visits, out_dtype, config)[:total]
  else:
    visits, source, position = tpu_visits.aligned(group_sizes, total, config.rows * config.row_tiles)
    y = _call(x[source], view, visits, out_dtype, config)[position]
  return tpu_view.gather_n(view, y)


def _check(config: Config, view: View, rows: int) -> None:
  steps = config.unroll * view.k_tile
  one = config.row_tiles == 1
  for fits, rule in (
    (config.rows % tpu_visits.ROWS == 0, f"rows is no multiple of {tpu_visits.ROWS}"),
    (config.columns % LANES == 0 == view.words.shape[2] % config.columns, "columns do not divide the stripe"),
    (view.k_block % config.depth == 0 == config.depth % steps, f"depth divides no K-block, or {steps} not depth"),
    (one or not config.in_order and not config.scale_after, "in_order and scale_after take one row tile"),
    (not config.in_order or config.rows >= rows, f"in order, a row tile holds all {rows} rows"),
    (not config.scale_after or view.group % LANES == 0, f"groups of {view.group} rows are scaled before the dot"),
  ):
    if not fits:
      raise ValueError(f"{config}: {rule} (stripe {view.words.shape[2]}, K-block {view.k_block}, K-tile {view.k_tile})")


# ---------------------------------------------------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _described() -> Iterator[None]:
  """Where there is no TPU, interpretation still asks for its sizes."""
  if INTERPRET is None:
    yield
    return
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=INTERPRETED_DEVICE)):
    yield


def _call(rows: jax.Array, view: View, visits: tpu_visits.Visits, out_dtype: jnp.dtype, config: Config) -> jax.Array:
  """`[rows, padded K] -> [rows, padded N]`; rows that no visit covers are undefined."""
  total, K = rows.shape
  N = view.padded[1]
  unit = tpu_visits.ROWS
  chunk = config.rows * config.row_tiles
  scratch = [pltpu.VMEM((chunk, config.columns), jnp.float32)]
  if config.in_order:
    scratch.append(pltpu.VMEM((chunk, config.columns), jnp.float32))
  elif config.row_tiles > 1:
    scratch.append(pltpu.VMEM((config.depth, config.columns), rows.dtype))
  kernel = functools.partial(_kernel, view=_Static.of(view), config=config)
  scalars = (*visits, view.bits.reshape(-1), view.first.reshape(-1))
  with _described():
    y = pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((total // unit, unit, N), out_dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars), grid=(), scratch_shapes=scratch,
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * 3, out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
      ),
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
      interpret=INTERPRET if INTERPRET is not None else False,
      name="moeq_grouped_matmul",
    )(*scalars, rows.reshape(total // unit, unit, K), view.words, view.grid)
  return y.reshape(total, N)


@dataclasses.dataclass(frozen=True)
class _Static:
  """The static sizes of a view."""

  blocks: tuple[int, int, int]
  padded: tuple[int, int]
  group: int
  k_tile: int
  k_block: int
  stripe: int
  tiles: int
  groups: int
  widths: tuple[int, ...]
  paired: bool

  @staticmethod
  def of(view: View) -> "_Static":
    room = view.words.shape[0]
    widths = tuple(b for b in planar.WIDTHS if tpu_unpack.blocks(view.k_block, b) <= room)
    return _Static(
      view.blocks, view.padded, view.group, view.k_tile, view.k_block, view.words.shape[2],
      view.grid.shape[1], view.grid.shape[2], widths, view.paired)


def _kernel(*refs: Any, view: _Static, config: Config) -> None:
  expert, start, stop, count, bits, first, x, words, grid, y, acc, *rest = refs
  unit, n_tiles, k_steps = tpu_visits.ROWS, view.padded[1] // config.columns, view.padded[0] // config.depth
  units = config.rows * config.row_tiles // unit

  def place(n: Any, v: Any, k: Any) -> Any:
    """Index of the block in `bits` and `first`."""
    _, k_blocks, stripes = view.blocks
    return (expert[v] * k_blocks + k * config.depth // view.k_block) * stripes + n * config.columns // view.stripe

  def rows_of(v: Any) -> Any:
    if config.in_order:
      return pl.ds(0, units)
    return pl.ds(start[v] // unit, (stop[v] - start[v] + unit - 1) // unit)

  def words_map(n: Any, v: Any, k: Any) -> Any:
    at = place(n, v, k)
    step = bits[at] * (config.depth // (8 * BLOCK))
    return pl.ds(first[at] + k % (view.k_block // config.depth) * step, step), 0, n % (view.stripe // config.columns)

  if config.in_order:  # all of them at once: copied once
    rows_spec = pl.BlockSpec((units, unit, view.padded[0]), lambda n, v, k: (0, 0, 0))
  else:
    rows_spec = pl.BlockSpec((pl.BoundedSlice(units), unit, config.depth), lambda n, v, k: (rows_of(v), 0, k))
  most = pl.BoundedSlice(tpu_unpack.blocks(config.depth, view.widths[-1]))
  pltpu.emit_pipeline(
    functools.partial(_step, view=view, config=config, scalars=(start, stop, count, bits, place), scratch=(acc, *rest)),
    grid=(n_tiles, count[0], k_steps),
    in_specs=[
      rows_spec,
      pl.BlockSpec((most, SUBLANES, config.columns), words_map, pipeline_mode=pl.Buffered(3)),
      pl.BlockSpec((None, view.tiles, view.groups, config.columns), lambda n, v, k: (expert[v], 0, 0, n)),
    ],
    out_specs=[pl.BlockSpec((pl.BoundedSlice(units), unit, config.columns), lambda n, v, k: (rows_of(v), 0, n))],
  )(x, words, grid, y)


def _step(x: Any, words: Any, grid: Any, y: Any, *, view: _Static, config: Config, scalars: Any, scratch: Any) -> None:
  """One column tile, visit and K-step."""
  start, stop, count, bits, place = scalars
  acc, *rest = scratch
  n, v, k = (pl.program_id(axis) for axis in range(3))
  tiles = config.depth // view.k_tile
  row_units = config.rows // tpu_visits.ROWS

  @pl.when(k == 0)
  def _() -> None:
    acc[...] = jnp.zeros_like(acc)

  def k_tile(index: Any, width: int) -> jax.Array | None:
    """What K-tile `index` of this step adds to the rows; None if it was added."""
    at = pl.multiple_of((k * config.depth if config.in_order else 0) + index * view.k_tile, view.k_tile)
    rows = x[:row_units, :, pl.ds(at, view.k_tile)].reshape(config.rows, view.k_tile)
    blocks = tpu_unpack.blocks(view.k_tile, width)
    raw = words[pl.ds(index * blocks, blocks)]
    entry = grid[0 if view.tiles == 1 else k * tiles + index]
    if config.scale_after:
      return tpu_tile.scaled_after(rows, raw, entry, width, view.group, view.paired)
    parts = tpu_tile.dequantized(raw, entry, width, view.group, view.paired, rows.dtype)
    for number, weight in enumerate(parts):
      size = weight.shape[0]
      acc[: config.rows] += tpu_tile.dot(rows[:, number * size : (number + 1) * size], weight)
      if config.row_tiles > 1:
        rest[0][pl.ds(pl.multiple_of(index * view.k_tile + number * size, size), size)] = weight
    return None

  def branch(width: int) -> Callable[[], None]:
    def span(index: Any, carry: None) -> None:
      parts = [k_tile(index * config.unroll + inner, width) for inner in range(config.unroll)]
      if config.scale_after:
        acc[...] += functools.reduce(jnp.add, parts)
      return carry

    return lambda: lax.fori_loop(0, tiles // config.unroll, span, None)

  choice = sum((bits[place(n, v, k)] > b).astype(jnp.int32) for b in view.widths)
  lax.switch(choice, [branch(b) for b in view.widths])

  if config.row_tiles > 1:
    def again(tile: Any, carry: None) -> None:
      rows = x[pl.ds(tile * row_units, row_units)].reshape(config.rows, config.depth)
      at = pl.ds(pl.multiple_of(tile * config.rows, config.rows), config.rows)
      acc[at] += tpu_tile.dot(rows, rest[0][...])
      return carry

    lax.fori_loop(1, (stop[v] - start[v] + config.rows - 1) // config.rows, again, None)

  last = k == pl.num_programs(2) - 1
  if config.in_order:
    @pl.when(last)
    def _() -> None:
      row = lax.broadcasted_iota(jnp.int32, acc.shape, 0)
      mine = (row >= start[v]) & (row < stop[v])
      rest[0][...] = jnp.where(mine, acc[...], jnp.where(v == 0, 0.0, rest[0][...]))

    last &= v == count[0] - 1

  @pl.when(last)
  def _() -> None:
    y[...] = (rest[0] if config.in_order else acc)[...].reshape(y.shape).astype(y.dtype)
