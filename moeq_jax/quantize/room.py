"""What a run will take: bits that fit into a number of bytes, and room on the disk, both known before any work."""

import math
import re
import shutil
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moeq_jax import artifacts, channels, user_text
from moeq_jax.allocate import budget as budget_lib
from moeq_jax.allocate import problem
from moeq_jax.models import families
from moeq_jax.quantize import blocks, exports, measure
from moeq_jax.quantize import needs as needs_lib
from moeq_jax.quantize import states as states_lib
from moeq_jax.quantize.subject import Subject

UNITS = {"": 1, "B": 1, **{unit + end: size ** power for power, unit in enumerate("KMGT", 1)
                           for end, size in (("B", 1000), ("iB", 1024))}}
CARRIED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|vocab\.txt|chat_template\.\w+|(tokenizer|spiece|sentencepiece\.bpe)\.model")
SPARE = 64 << 20  # bytes for everything small: errors, statistics, report


def parse_bytes(text: str) -> int:
  """Bytes from text like `20GiB`, `1.5 GB` or `800MB` (GB are 1000^3, GiB 1024^3).

  Raises:
    ValueError: not such a text.
  """
  match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B?)\s*", text, re.IGNORECASE)
  units = {unit.lower(): size for unit, size in UNITS.items()}
  if not match or not float(match[1]):
    raise ValueError(f"memory={text!r}: a size is a number with a unit, for example 20GiB or 800MB")
  return int(float(match[1]) * units[match[2].lower()])


def carried_files(directory: Path) -> list[Path]:
  """The files of a checkpoint that go unchanged into a quantized copy: config, tokenizer, generation settings."""
  return sorted(path for path in directory.iterdir() if path.is_file() and CARRIED.fullmatch(path.name))


def tensor_bytes(subject: Subject) -> dict[str, int]:
  """Bytes of the checkpoint's tensors: `experts`, and all `other`."""
  parts = [None, *subject.layers]
  return {"experts": sum(subject.source.nbytes(layer, experts=True) for layer in subject.layers),
          "other": sum(subject.source.nbytes(layer, experts=False) for layer in parts)}


def other_bytes(subject: Subject) -> int:
  """Bytes of all that is not quantized: other tensors, and the files that are carried along."""
  directory = subject.source.directory  # None where a config alone is known
  files = sum(path.stat().st_size for path in carried_files(directory)) if directory else 0
  return tensor_bytes(subject)["other"] + files


def shapes(subject: Subject) -> list[tuple[int, int, int]]:
  """`(E, K, N)` of every quantized tensor: each projection of each MoE layer."""
  each = measure.projection_shapes(subject).values()
  return [(subject.source.experts, *shape) for _ in subject.sparse for shape in each]


def budget(config: ml_collections.ConfigDict, subject: Subject, group: int) -> float:
  """Average nominal bits per expert weight: as the config says, or as many as fit into `config.memory`.

  Raises:
    ValueError: not even the smallest width fits.
  """
  if not config.memory:
    return float(config.budget)
  try:
    others = other_bytes(subject) + block_bytes(config.method, subject, group)
    return budget_lib.bits_for_bytes(parse_bytes(config.memory), others, shapes(subject), group,
                                     widths=tuple(config.widths))
  except ValueError as error:
    raise ValueError(f"config.memory={config.memory}: {error}") from None


def check_plan(config: ml_collections.ConfigDict, subject: Subject, plan: artifacts.Plan | channels.BlockPlan,
               bits: float) -> None:
  """Looks whether a plan keeps to the bits that `config.memory` allows; tiers round to whole experts.

  Args:
    config: of the run.
    subject: the checkpoint.
    plan: what the method made.
    bits: what `budget` gave.

  Raises:
    ValueError: the plan uses more bits, and `config.memory` limits them.
  """
  if isinstance(plan, channels.BlockPlan):  # of a knapsack, which keeps to its budget
    return
  sizes = [math.prod(shape) for shape in measure.projection_shapes(subject).values()]
  used = problem.average_bits(plan.by_projection(len(sizes)), np.tile(sizes, plan.bits.shape[0] * plan.bits.shape[1]))
  if config.memory and used > bits:
    raise ValueError(f"config.memory={config.memory}: {plan.method} takes {used:.4f} bits per expert weight, and"
                     f" {bits:.4f} fit; take a knapsack, or name the bits (--config.budget) in place of the memory")


def block_bytes(method: str, subject: Subject, group: int) -> int:
  """What the blocks of a method take beside codes and scales, see `blocks.extra_bytes`."""
  experts = len(subject.sparse) * subject.source.experts
  return blocks.extra_bytes(method, group, measure.projection_shapes(subject), experts)


def quantized_bytes(subject: Subject, bits: float, group: int, method: str = "uniform") -> int:
  """About what the quantized files take at `bits` per expert weight, in blocks where the method has such."""
  weights = sum(math.prod(shape) for shape in shapes(subject))
  scales = sum(4 * e * n * (-(-k // group) if group else 1) for e, k, n in shapes(subject))
  fixed = scales + other_bytes(subject) + budget_lib.margin(shapes(subject)) + block_bytes(method, subject, group)
  return int(weights * bits / 8) + fixed


def state_bytes(subject: Subject, text: user_text.Text) -> int:
  """Bytes of the states of one text at one place."""
  top = families.abstract(subject.source.config, subject.dtype).top
  state = jax.eval_shape(subject.functions.embed, top, text.batches[0])
  each = sum(leaf.size * leaf.dtype.itemsize for leaf in states_lib.leaves(state).values())
  return each * len(text.batches)


def disk_needed(subject: Subject, config: ml_collections.ConfigDict, needs: needs_lib.Needs, bits: float, group: int,
                calibration: user_text.Text | None, evaluation: user_text.Text | None) -> dict[str, int]:
  """The most bytes that a run has on disk at once, by purpose."""
  layers = len(subject.layers)
  places = 2 + needs.backward * 2
  if needs.forward and (needs.backward or needs.fisher or (needs.rows and not config.sequential)):
    places += layers
  needed = {"quantized model": quantized_bytes(subject, bits, group, config.method)}
  if calibration:
    needed["activations"] = (places + 2 * config.sequential) * state_bytes(subject, calibration)
  if evaluation:
    needed["activations of the evaluation"] = 2 * state_bytes(subject, evaluation)
  if "hf" in exports.kinds(config.export):
    needed["export hf"] = sum(tensor_bytes(subject).values())
  if "compressed_tensors" in exports.kinds(config.export):
    needed["export compressed-tensors"] = 2 * quantized_bytes(subject, bits, group)
  return needed


def check_disk(workdir: Path, needed: dict[str, int]) -> None:
  """Raises `OSError` if the disk of `workdir` has too little room, counting what an earlier call left there."""
  there = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
  free, total = shutil.disk_usage(workdir).free, sum(needed.values()) + SPARE
  if free + there < total:
    parts = ", ".join(f"{name} {human(size)}" for name, size in needed.items())
    raise OSError(f"{workdir}: the run takes {human(total)} of disk at most ({parts}), {human(free)} are free; make"
                  " room, choose another --workdir, or take fewer or shorter sequences (config.calibration.sequences,"
                  " config.length)")


def human(size: float) -> str:
  """Bytes for people: `1.2 GB` (of 1000^3)."""
  for unit in ("bytes", "kB", "MB", "GB"):
    if size < 1000 or unit == "GB":
      return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
    size /= 1000
  raise AssertionError
