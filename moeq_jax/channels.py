"""The values of channel-wise precision: statistics, costs and plans per row or per block of rows.

Beside the letters of `artifacts`: J units of an expert, the parts of its projections that may have a width of their
own, those of gate before those of up before those of down.

A *neuron* is one of the F hidden units of an expert: a column of gate and of up (`[D, F]`) and a row of down (`[F,
D]`). Their order is free: the same permutation of gate's and up's columns and of down's rows changes nothing. So units
are neurons by default, in one order for the three projections of an expert: stripes of N in gate and up, blocks of K in
down (`axis="neurons"`). With `axis="outputs"` the units of down are its output columns, as those of gate and up are:
rows of the matrix as papers write it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeq_jax import artifacts

AXES = ("neurons", "outputs")
BLOCKS = (16, 32, 64, 128)  # neurons of a block that storage and kernels know
SIDES = ("input", "mid")  # the two inputs of an expert's matmuls: of gate and up, and of down
SIDE = {"gate": 0, "up": 0, "down": 1}


@dataclasses.dataclass(frozen=True)
class ChannelStats(artifacts.Saved):
  """What one pass of forward and backward saw of every channel: vectors per expert, no moments.

  The fields of the same name are those of `artifacts.Stats`. `grad_sq_gate` is `None` without a gate.

  Attributes:
    input_sq: `[L, E, D]` float32, sum over the expert's tokens of the squared input of gate and up, per channel: the
      diagonal of `moment_in`.
    mid_sq: `[L, E, F]` float32, the same of down's input.
    condition: `[L, E, 2, 3]` float64, condition number of the damped Gram matrix of the inputs of either side
      (`SIDES`): its lower bound, estimate, upper bound (`calibrate.spectrum`).
    log_am_gm: `[L, E, 2, 3]` float64, logarithm of the ratio of arithmetic and geometric mean of the same eigenvalues:
      0 where all are equal; lower bound, estimate, upper bound.
    damping: share of the mean eigenvalue that was added to all.
  """

  tokens: np.ndarray
  gate_weight: np.ndarray
  router_norm: np.ndarray
  router_grad: np.ndarray
  input_sq: np.ndarray
  mid_sq: np.ndarray
  grad_sq_gate: np.ndarray | None
  grad_sq_up: np.ndarray
  grad_sq_down: np.ndarray
  condition: np.ndarray
  log_am_gm: np.ndarray
  damping: float
  total_tokens: int
  batches: int

  def inputs(self, projection: str) -> np.ndarray:
    """Sums of squared inputs of a projection, `[L, E, K]`."""
    return self.mid_sq if projection == "down" else self.input_sq

  def gradients(self, projection: str) -> np.ndarray:
    """Sums of squared output gradients of a projection, `[L, E, N]`."""
    return getattr(self, f"grad_sq_{projection}")


@dataclasses.dataclass(frozen=True)
class ChannelErrors(artifacts.Saved):
  """Errors of every channel of every expert at every candidate width.

  Attributes:
    weight: `[L, E, J, W]` float32, squared norm of what encoding adds to a channel's weights.
    fisher: `[L, E, J, W]` float32, `1/2 sum A_kk G_nn dW_kn^2` over the channel's weights: its part of
      `artifacts.ErrorTable.fisher`, in nats per calibration token; `None` without calibration.
    widths, codec, group, projections: as in `artifacts.ErrorTable`.
    projection: `[J]` int64, the place in `projections` that a channel is part of; ascending.
    sizes: `[J]` int64, weights of a channel.
    axis: one of `AXES`.
  """

  weight: np.ndarray
  fisher: np.ndarray | None
  widths: tuple[int, ...]
  codec: str
  group: int
  projections: tuple[str, ...]
  projection: np.ndarray
  sizes: np.ndarray
  axis: str = "neurons"


@dataclasses.dataclass(frozen=True)
class BlockCosts(artifacts.Saved):
  """`cost[l, e, j, w]`: the price of storing unit j of an expert with `widths[w]` bits.

  Attributes:
    cost: `[L, E, J, W]` float, not negative.
    widths: candidate bits, ascending.
    score: the score's spec string.
    units: `"nats"` or `"arbitrary"`, as in `artifacts.CostTable`.
    projections: `[P]` names, in the order of `artifacts.PROJECTIONS`.
    projection: `[J]` int64, the place in `projections` that a unit is part of; ascending.
    sizes: `[J]` int64, weights of a unit.
    axis: one of `AXES`.
    block: channels of a unit of gate and up; the last unit of a projection may have fewer.
    down_block: channels of a unit of down, which may be larger: it must be whole scale groups.
    order: `[L, E, F]` int32, which neuron stands at each place, or `None` for the model's own order.
  """

  cost: np.ndarray
  widths: tuple[int, ...]
  score: str
  units: str
  projections: tuple[str, ...]
  projection: np.ndarray
  sizes: np.ndarray
  axis: str = "neurons"
  block: int = 1
  down_block: int = 1
  order: np.ndarray | None = None

  def part(self, name: str) -> slice:
    """Where the units of a projection stand among the J."""
    place = self.projections.index(name)
    return slice(*np.searchsorted(self.projection, (place, place + 1)))


@dataclasses.dataclass(frozen=True)
class BlockPlan(artifacts.Saved):
  """The bits of every unit of a `BlockCosts`, whose fields of the same name it repeats.

  Attributes:
    bits: `[L, E, J]` int64.
    method: the method's spec string.
    budget: average nominal bits per expert weight asked for.
    predicted, lower_bound: as in `artifacts.Plan`.
    constraint: which units share one width, see `allocate/blocks.py`.
  """

  bits: np.ndarray
  method: str
  budget: float
  projections: tuple[str, ...]
  projection: np.ndarray
  sizes: np.ndarray
  axis: str = "neurons"
  block: int = 1
  down_block: int = 1
  order: np.ndarray | None = None
  predicted: float | None = None
  lower_bound: float | None = None
  constraint: str = "none"

  def by_projection(self) -> dict[str, np.ndarray]:
    """`{projection: [L, E, units of it]}`: with `axis="neurons"` the widths of the N-stripes of gate and up and of the
    K-blocks of down, after the neurons were put into `order`."""
    ends = np.searchsorted(self.projection, np.arange(len(self.projections) + 1))
    return {name: self.bits[..., ends[i]:ends[i + 1]] for i, name in enumerate(self.projections)}

  def average_bits(self) -> float:
    """Nominal bits per weight."""
    return int((self.bits * self.sizes).sum()) / int(np.broadcast_to(self.sizes, self.bits.shape).sum())

  def averages(self) -> dict[str, float]:
    """Nominal bits per weight of each projection."""
    own = [self.projection == place for place in range(len(self.projections))]
    return {name: float(np.average(self.bits[..., units].mean(axis=(0, 1)), weights=self.sizes[units]))
            for name, units in zip(self.projections, own, strict=True)}

  def permutation_bits(self) -> float:
    """Bits per weight that the order takes: 16 for each neuron, 32 above 65,536; nothing without one."""
    if self.order is None:
      return 0.0
    return order_bits(self.order.reshape(-1, self.order.shape[-1])[0]) / int(self.sizes.sum())

  def as_json(self) -> dict[str, Any]:
    """The plan as JSON-able values: all but the order, of which there is a digest."""
    plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    order = None if self.order is None else artifacts.digest(self.order)
    return plain | {"bits": self.bits.tolist(), "projection": self.projection.tolist(), "sizes": self.sizes.tolist(),
                    "order": order, "average_bits": self.averages(), "permutation_bits": self.permutation_bits()}


def along(name: str, axis: str) -> int:
  """The axis of a weight `[K, N]` on which the channels of a projection lie: 0 = K, 1 = N.

  Raises:
    ValueError: an unknown axis.
  """
  if axis not in AXES:
    raise ValueError(f"unknown axis {axis!r}; the channels of down are {' or '.join(AXES)}")
  return 0 if name == "down" and axis == "neurons" else 1


def order_bits(order: np.ndarray) -> int:
  """Bits that an order `[..., F]` takes: 16 for each neuron, 32 above 65,536."""
  return order.size * (16 if order.shape[-1] <= 1 << 16 else 32)


def grid(name: str, bits: np.ndarray) -> np.ndarray:
  """The widths of an expert's blocks of neurons as `QTensor.bits` holds them: `[E, NB] -> [E, KB, NS]`, K-blocks of
  down, N-stripes of gate and up."""
  return bits[:, :, None] if name == "down" else bits[:, None, :]


def units(sizes: Sequence[tuple[int, int]], block: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """`(projection [J], sizes [J])` of units of `block` channels.

  Args:
    sizes: of each projection, its channels and the weights of one.
    block: channels of a unit.
  """
  projection, weights = [], []
  for place, (channels, each) in enumerate(sizes):
    held = np.diff(np.append(np.arange(0, channels, block), channels))
    projection.append(np.full(len(held), place))
    weights.append(held * each)
  return np.concatenate(projection).astype(np.int64), np.concatenate(weights).astype(np.int64)
