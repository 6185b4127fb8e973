"""What a checkpoint holds, what a budget gives, and what fits: read from headers, in the time that takes."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import artifacts, options, planar, runs
from moeq_jax.allocate import budget as budget_lib
from moeq_jax.export import native
from moeq_jax.models import convert, hf_config, names
from moeq_jax.quantize import room

USAGE = "inspect CHECKPOINT [--budget=BITS] [--memory=SIZE] [--group=64]"
WIDTHS = (1, 2, 3, 4, 8)
FITTING = (1, 2, 3, 4)  # the widths that configs/quantize.py chooses from
STREAM_FACTOR, STREAM_ADDED = 1.6, 2 << 30  # streaming takes at most so many times its largest layer, and so much more

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Description:
  """What is known of a checkpoint without reading weights.

  Attributes:
    directory: where it is.
    config: sizes.
    parameters: all.
    expert_parameters: those of routed experts, which are what is quantized.
    active_parameters: those that one token uses.
    types: bytes of tensors by the type they are stored in; of a quantized model by kind of file.
    expert_bytes: of routed experts as stored.
    other_bytes: everything else that a quantized copy holds: other tensors, tokenizer, config.
    streaming_bytes: memory that quantizing layer by layer takes at most.
    uniform: bytes of the whole model with all experts at each of `WIDTHS`; empty for a quantized or a dense model.
    budget: average bits per expert weight that were asked for, and the bytes of the whole model; or None.
    memory: bytes that were asked for, and the bits per expert weight that fit; or None.
    manifest: of a quantized model; else None.
  """

  directory: Path
  config: hf_config.Config
  parameters: int
  expert_parameters: int
  active_parameters: int
  types: dict[str, int]
  expert_bytes: int
  other_bytes: int
  streaming_bytes: int
  uniform: dict[int, int]
  budget: tuple[float, int] | None = None
  memory: tuple[int, float] | None = None
  manifest: dict[str, Any] | None = None

  @property
  def total_bytes(self) -> int:
    """Bytes of all tensors as stored."""
    return sum(self.types.values())


def describe(directory: str | Path, budget: float | None = None, memory: int | None = None,
             group: int = 64) -> Description:
  """Describes a checkpoint in Hugging Face's format, or a quantized one; reads headers only.

  Args:
    directory: of the checkpoint.
    budget: average nominal bits per expert weight to work out the size for.
    memory: bytes of the whole quantized model to work out the bits for.
    group: rows of K that share a scale; 0 = all.

  Raises:
    convert.CheckpointError, native.QuantizedError: the checkpoint is damaged or not whole.
    ValueError: a budget outside the widths, a group that does not exist, too little memory; or either asked of a model
      that has no experts or is quantized already.
  """
  directory = Path(directory)
  asked = budget is not None or memory is not None
  if native.is_quantized(directory):
    if asked:
      raise ValueError(f"{directory}: is quantized already; --budget and --memory are asked of its source")
    return _describe_quantized(directory)
  checkpoint = convert.open_checkpoint(directory)
  if not checkpoint.sparse_layers and asked:
    raise ValueError(f"{directory}: the model has no experts, and only experts are quantized; upcycle makes a"
                     " Mixture-of-Experts model of a dense one")
  found = _describe_checkpoint(checkpoint, group)
  shapes = expert_shapes(checkpoint.config)
  if budget is not None:
    if not WIDTHS[0] <= budget <= WIDTHS[-1]:
      raise ValueError(f"--budget={budget:g}: from {WIDTHS[0]} to {WIDTHS[-1]} bits per expert weight are possible")
    found = dataclasses.replace(found, budget=(budget, packed_bytes(shapes, budget, group) + found.other_bytes))
  if memory is not None:
    bits = budget_lib.bits_for_bytes(memory, found.other_bytes, shapes, group, widths=FITTING)
    found = dataclasses.replace(found, memory=(memory, bits))
  return found


def _describe_checkpoint(checkpoint: convert.Checkpoint, group: int) -> Description:
  types: Counter[str] = Counter()
  for entry in checkpoint.files.values():
    types[entry.dtype.name] += entry.nbytes
  experts = sum(checkpoint.nbytes(l, experts=True) for l in range(checkpoint.layers))
  carried = sum(path.stat().st_size for path in room.carried_files(checkpoint.directory))
  others = checkpoint.files.nbytes - experts + carried
  shapes = expert_shapes(checkpoint.config)
  largest = max(checkpoint.nbytes(l, True) + checkpoint.nbytes(l, False) for l in range(checkpoint.layers))
  return Description(
      checkpoint.directory, checkpoint.config, *counts(checkpoint.config), dict(types), experts, others,
      streaming_bytes=int(STREAM_FACTOR * largest) + STREAM_ADDED,
      uniform={bits: packed_bytes(shapes, bits, group) + others for bits in WIDTHS} if shapes else {})


def _describe_quantized(directory: Path) -> Description:
  model = native.open(directory)
  config = hf_config.read(model.config)
  files = {name: (directory / name).stat().st_size for name in model.manifest["files"]}
  blocks = sum(size for name, size in files.items() if name.startswith("layer-"))
  types = {"blocks": blocks, "the rest": sum(files.values()) - blocks}
  every, experts, active = counts(config)
  bits = model.manifest["sizes"].get("stored_bits")
  packed = int(bits * experts / 8) if isinstance(bits, int | float) else blocks
  return Description(directory, config, every, experts, active, types, packed, sum(files.values()) - packed, 0, {},
                     manifest=model.manifest)


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def expert_shapes(config: hf_config.Config) -> list[Shape]:
  """`(E, K, N)` of every projection of every MoE layer."""
  return [shape for l in range(names.block_count(config)) for parameter, shape in names.block_shapes(config, l).items()
          if names.is_expert(parameter)]


def counts(config: hf_config.Config) -> tuple[int, int, int]:
  """Parameters: all, those of routed experts, and those that one token uses."""
  parts = [names.top_shapes(config), *(names.block_shapes(config, l) for l in range(names.block_count(config)))]
  total = sum(math.prod(shape) for part in parts for shape in part.values())
  experts = sum(map(math.prod, expert_shapes(config)))
  used = experts * getattr(config, "num_experts_per_tok", 1) // max(1, names.expert_count(config))
  return total, experts, total - experts + used


def packed_bytes(shapes: Sequence[Shape], bits: float, group: int) -> int:
  """Bytes of packed experts at `bits` on average: codes, scales and zeros, widths and offsets.

  Exact, as `qtensor.stored_bytes`, for one width; else what is exact where each shape has the average.
  """
  total = 0.0
  for experts, k, n in shapes:
    size = planar.layout(k, n, group)
    total += experts * (size.k_block * size.stripe * bits / 8 + 4 * n * -(-k // size.group) + 8)
  return math.ceil(total)


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def command(arguments: Sequence[str]) -> None:
  """`inspect CHECKPOINT [--budget=2.5] [--memory=20GiB] [--group=64]`: prints a description.

  Raises:
    runs.UsageError: an option that is unknown or has a wrong value.
    ValueError: as `describe`.
  """
  given, [directory] = options.parse(arguments, USAGE, {"budget": None, "memory": None, "group": 64}, places=1)
  try:
    budget = float(given.budget) if given.budget else None
  except ValueError:
    raise runs.UsageError(f"--budget={given.budget}: a number of bits is needed, for example 2.5") from None
  path = next((p for p in (Path(directory), runs.ROOT / directory) if p.is_dir()), Path(directory))
  memory = room.parse_bytes(given.memory) if given.memory else None
  try:
    found = describe(path, budget, memory, given.group)
  except budget_lib.BudgetError:  # what is in it, and what each width takes, helps to choose another
    show(describe(path, budget, None, given.group))
    raise
  show(found)


def show(found: Description, console: rich_console.Console | None = None) -> None:
  """Prints a description as tables; to standard output unless a console is given."""
  console = console or rich_console.Console()
  table = rich_table.Table(show_header=False, box=None, title=str(found.directory), title_justify="left")
  for name, text in facts(found):
    table.add_row(name, text)
  console.print(table)
  if found.uniform:
    console.print(_sizes(found))


def facts(found: Description) -> list[tuple[str, str]]:
  """What the description says, line by line."""
  config, blocks = found.config, names.block_count(found.config)
  sparse = sum(config.sparse(l) for l in range(blocks))
  lines = [("family", config.family), ("layers", f"{blocks}: {sparse} with experts, {blocks - sparse} dense"),
           ("sizes", _sizes_of(config))]
  if sparse:
    lines.append(("experts", f"{names.expert_count(config)} in each, {getattr(config, 'num_experts_per_tok', 1)} for a"
                             " token"))
  share = found.expert_parameters / found.parameters
  lines += [
      ("parameters", f"{_count(found.parameters)}, {_count(found.active_parameters)} for a token, {share:.1%} in"
                     " experts"),
      ("stored", f"{size(found.total_bytes)} ({', '.join(f'{name} {size(n)}' for name, n in found.types.items())})"),
  ]
  return lines + (_plan(found) if found.manifest else _answers(found))


def _sizes_of(config: hf_config.Config) -> str:
  width, ffn = ((config.d_model, config.d_ff) if config.family == "switch_transformers" else
                (config.hidden_size, config.intermediate_size))
  heads = getattr(config, "num_attention_heads", getattr(config, "num_heads", 0))
  return f"hidden {width}, expert {ffn}, {heads} heads, vocabulary {config.vocab_size}"


def _answers(found: Description) -> list[tuple[str, str]]:
  """What a checkpoint becomes."""
  lines = []
  if found.uniform:
    lines.append(("to quantize it", f"at most {size(found.streaming_bytes)} of memory, layer by layer"))
  if found.budget:
    lines.append((f"{found.budget[0]:g} bits", f"{size(found.budget[1])} (--config.budget={found.budget[0]:g})"))
  if found.memory:
    most = " (the largest width)" if found.memory[1] == FITTING[-1] else ""
    lines.append((f"in {size(found.memory[0])}", f"{found.memory[1]:.2f} bits per expert weight{most}"))
  return lines


def _plan(found: Description) -> list[tuple[str, str]]:
  """What was made of a checkpoint."""
  manifest, sizes = found.manifest or {}, (found.manifest or {})["sizes"]
  lines = [("codec", str(manifest.get("codec")))]
  plan = manifest.get("plan")
  if isinstance(plan, dict) and "method" in plan:
    lines.append(("plan", f"{plan['method']} at {plan.get('budget')} bits"))
    widths = Counter(_flat(plan.get("bits")))
    text = ", ".join(f"{count} at {bits}" for bits, count in sorted(widths.items(), key=str)) + " bits"
    if isinstance(averages := plan.get("average_bits"), dict):
      means = ", ".join(f"{name} {averages[name]:.3f}" for name in artifacts.PROJECTIONS if name in averages)
      text += f", in blocks of {plan.get('block')} neurons of a projection; on average {means}"
    lines.append(("widths", text))
  order = ", and the order of neurons" if isinstance(plan, dict) and "block" in plan else ""
  kinds = (("nominal_bits", "codes"), ("effective_bits", f"with scales and zeros{order}"), ("stored_bits", "in files"))
  bits = ", ".join(f"{sizes[name]:.3f} {text}" for name, text in kinds if isinstance(sizes.get(name), int | float))
  return [*lines, ("bits per expert weight", bits)]


def _flat(bits: Any) -> list[Any]:
  return [b for part in bits for b in _flat(part)] if isinstance(bits, list) else [bits]


def _sizes(found: Description) -> rich_table.Table:
  table = rich_table.Table(title="all experts at", title_justify="left")
  for column in ("bits", "experts, scales, zeros", "the rest", "model", "of now"):
    table.add_column(column, justify="right")
  for bits, total in found.uniform.items():
    table.add_row(str(bits), size(total - found.other_bytes), size(found.other_bytes), size(total),
                  f"{total / max(1, found.total_bytes):.1%}")
  return table


def size(count: float) -> str:
  """Bytes in units of 1024: `1.25 GiB`."""
  unit = min(int(math.log(max(count, 1), 1024)), 4)
  return f"{count / 1024**unit:.{2 if unit > 2 else 1 if unit else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def _count(number: int) -> str:
  """A number of parameters: `46.7 billion`."""
  for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
    if number >= unit:
      return f"{number / unit:.1f} {name}"
  return str(number)
