"""What the run works on: the fine-tuned checkpoint, its routers before and after, and pairs of text and summary."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np

from moeq_jax import artifacts, pairs, registry, switch_training, user_text, workspace
from moeq_jax.models import convert, families, switch

NORM_CHANGE, NORM = "router_norm_change", "router_norm"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Batches `{"inputs", "targets"}` of one shape for every purpose; those of `damage` and `evaluation` are held out.

  Attributes:
    calibration, damage, evaluation: batches.
    written: batches of the pairs of `evaluation` for which the model writes summaries.
    found: the pairs of `evaluation`, row by row.
    found_written: the pairs of `written`, row by row.
    digest: of all batches.
  """

  calibration: list[dict[str, np.ndarray]]
  damage: list[dict[str, np.ndarray]]
  evaluation: list[dict[str, np.ndarray]]
  written: list[dict[str, np.ndarray]]
  found: list[pairs.Pair]
  found_written: list[pairs.Pair]
  digest: str

  def as_text(self) -> workspace.Text:
    """The batches as the stages that are shared with `pipeline` take them."""
    domains = np.array([pair.domain for pair in self.found])
    return workspace.Text(self.calibration, self.damage, self.evaluation, domains, {}, self.digest)


def open_checkpoint(config: ml_collections.ConfigDict) -> workspace.Subject:
  """Opens the fine-tuned Switch Transformer, with the routers from before fine-tuning where they are known.

  Raises:
    convert.CheckpointError: a file is missing, damaged or of another family; or the routers from before fine-tuning
      have another number of layers, experts or columns.
  """
  directory = Path(config.checkpoint)
  checkpoint = convert.open_checkpoint(directory)
  if not isinstance(checkpoint.config, switch.SwitchConfig) or not checkpoint.sparse_layers:
    raise convert.CheckpointError(f"{directory}: is of family {checkpoint.config.family} with {checkpoint.experts}"
                                  " experts; this run takes a Switch Transformer, as configs/switch_finetune.py makes"
                                  " it")
  model, sizes = convert.load(directory)
  routers = convert.routers(model)
  files = {name: artifacts.digest(directory / name) for name in ("tokenizer.json",)}
  return workspace.Subject(
      directory=directory,
      digest=artifacts.digest(files | {"checkpoint": checkpoint.digest()}),
      dtype=config.compute_dtype,
      config=sizes,
      top=model.top,
      blocks=list(model.blocks),
      functions=families.functions(sizes, config.compute_dtype, capacity=config.capacity),
      routers=routers,
      routers_init=routers_before(directory, config.pretrained, routers),
      others={},
      tokenizer=switch_training.open_tokenizer(directory / "tokenizer.json"),
  )


def routers_before(directory: Path, pretrained: str, routers: np.ndarray) -> np.ndarray | None:
  """The routers from before fine-tuning, `[L, E, D]`: those of the checkpoint `pretrained`, if one is named, else of
  `router_init.safetensors` beside the fine-tuned model; None if there is no such file.

  Raises:
    convert.CheckpointError: they are those of another model.
  """
  if pretrained:
    before = convert.routers(convert.load(Path(pretrained))[0])
    if before.shape != routers.shape:
      sizes = lambda shape: f"{shape[0]} MoE layers of {shape[1]} experts with {shape[2]} columns"
      raise convert.CheckpointError(f"{pretrained}: has {sizes(before.shape)}, and {directory} has"
                                    f" {sizes(routers.shape)}; the norm change is taken row by row, so that"
                                    " config.pretrained must be the checkpoint from which fine-tuning started")
    return before
  path = directory / "router_init.safetensors"
  return convert.load_routers(path, routers.shape) if path.is_file() else None


def methods_for(config: ml_collections.ConfigDict, subject: workspace.Subject) -> list[str]:
  """The methods of the config; without the routers from before fine-tuning, those on the norm change are made to rank
  by the final norm, if `config.fall_back_to_norm` says so.

  Raises:
    ValueError: those routers are missing and the config does not say so.
  """
  wanted = [registry.canonical(spec) for spec in config.methods]
  if subject.routers_init is not None or not any(NORM_CHANGE in spec for spec in wanted):
    return wanted
  if not config.fall_back_to_norm:
    raise ValueError(f"{subject.directory}: router_norm_change needs the routers from before fine-tuning:"
                     " router_init.safetensors there, or config.pretrained=DIR; to rank by the final norm in its place,"
                     " --config.fall_back_to_norm=True")
  log.warning("%s: no routers from before fine-tuning; experts are ranked by their final norm", subject.directory)
  return list(dict.fromkeys(spec.replace(NORM_CHANGE, NORM) for spec in wanted))


def read_pairs(config: ml_collections.ConfigDict, subject: workspace.Subject) -> Pairs:
  """Reads the pairs: calibration from the training side (of `pairs.DOMAINS`, whatever is evaluated), the rest held
  out, all domains in equal shares.

  Raises:
    ValueError: pairs that do not fill whole batches, or fewer than are asked for.
  """
  size, domains = config.batch, config.domains
  held_out = {d: pairs.xsum() if d == "xsum" else [p for p in pairs.held_out() if p.domain == d] for d in domains}
  share = lambda name, among=domains: _share(name, config[name], len(among), size)
  evaluation, damage, written = share("evaluation"), share("damage"), share("written")
  if not 0 < written <= evaluation:
    raise ValueError(f"config.written={config.written}: between 1 and config.evaluation={config.evaluation} pairs")
  chosen: dict[str, list[pairs.Pair]] = {"evaluation": [], "damage": [], "written": []}
  for domain, found in held_out.items():
    _check_enough(domain, len(found), evaluation + damage)
    spread = [found[i * len(found) // (evaluation + damage)] for i in range(evaluation + damage)]
    first = set(np.linspace(0, len(spread) - 1, evaluation).round().astype(int).tolist())
    own = [p for i, p in enumerate(spread) if i in first]
    chosen["evaluation"] += own
    chosen["written"] += [own[i * evaluation // written] for i in range(written)]
    chosen["damage"] += [p for i, p in enumerate(spread) if i not in first]
  chosen["calibration"] = _calibration(share("calibration", pairs.DOMAINS))
  batches = {name: _batches(found, size, config, subject) for name, found in chosen.items()}
  return Pairs(**batches, found=chosen["evaluation"], found_written=chosen["written"],
               digest=artifacts.digest({name: user_text.digest(part) for name, part in sorted(batches.items())}))


def _calibration(count: int) -> list[pairs.Pair]:
  """Evenly spread training pairs, `count` of each domain of the training pairs."""
  found = pairs.training(few=True)
  chosen = []
  for domain in pairs.DOMAINS:
    own = [p for p in found if p.domain == domain]
    _check_enough(domain, len(own), count)
    chosen += [own[i * len(own) // count] for i in range(count)]
  return chosen


def _share(name: str, count: int, domains: int, size: int) -> int:
  """How many of `count` pairs each domain gives."""
  if count < 0 or count % domains or count % size:
    raise ValueError(f"config.{name}={count}: pairs of {domains} domains in equal shares, in whole batches of {size}"
                     " (config.batch), are needed")
  return count // domains


def _check_enough(domain: str, found: int, wanted: int) -> None:
  if found < wanted:
    raise ValueError(f"domain {domain!r} has {found} pairs, {wanted} are asked for: lower config.evaluation,"
                     " config.damage or config.calibration")


def _batches(found: Sequence[pairs.Pair], size: int, config: ml_collections.ConfigDict,
             subject: workspace.Subject) -> list[dict[str, np.ndarray]]:
  return switch_training.pair_batches(found, size, subject.tokenizer, subject.config, config.inputs, config.targets)
