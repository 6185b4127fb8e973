"""What a run works on: the opened checkpoint, the text, and the work directory with its products."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tokenizers

from moeq_jax import artifacts, data, registry, steps
from moeq_jax.models import convert, decoder, families

ROOT = Path(__file__).resolve().parents[1]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
  """The model under study, opened.

  Attributes:
    directory: of the checkpoint.
    digest: of its files.
    dtype: compute dtype.
    config: sizes.
    top, blocks: full-precision parameters.
    functions: how they compute.
    routers, routers_init: `[L, E, D]`; the latter `None` if the checkpoint lacks router_init.safetensors.
    others: every tensor that is no expert, as stored, under its name in the checkpoint.
    tokenizer: of the checkpoint.
  """

  directory: Path
  digest: str
  dtype: str
  config: decoder.DecoderConfig
  top: Any
  blocks: list[Any]
  functions: decoder.Functions
  routers: np.ndarray
  routers_init: np.ndarray | None
  others: dict[str, np.ndarray]
  tokenizer: tokenizers.Tokenizer

  @property
  def shape(self) -> tuple[int, int]:
    """`(L, E)`, MoE layers only."""
    return self.routers.shape[:2]

  def sparse_blocks(self) -> list[Any]:
    """The blocks that are MoE layers."""
    return [self.blocks[place] for place in steps.sparse(self.functions, self.blocks)]

  def expert_weights(self) -> int:
    """Weights of all experts."""
    return sum(weight.size for block in self.sparse_blocks() for weight in self.functions.experts(block).values())

  def files(self) -> dict[str, bytes]:
    """The files that go unchanged into a quantized copy."""
    return {name: (self.directory / name).read_bytes() for name in ("config.json", "tokenizer.json")}


def open_checkpoint(name: str, dtype: str) -> Subject:
  """Opens a checkpoint directory; a relative name is looked for here and then from the project's root.

  Args:
    name: the directory.
    dtype: compute dtype, `"float32"` or `"bfloat16"`.

  Raises:
    convert.CheckpointError: a file is missing, damaged, or belongs to another checkpoint; names file and tensor.
  """
  directory = next((p for p in (Path(name), ROOT / name) if p.is_dir()), Path(name))
  checkpoint = convert.open_checkpoint(directory)
  if not checkpoint.sparse_layers or not isinstance(checkpoint.config, decoder.DecoderConfig):
    raise convert.CheckpointError(f"{directory}: methods are compared on decoders with experts, this is a model of "
                                  f"family {checkpoint.config.family} with {checkpoint.experts} experts; a Switch "
                                  "Transformer is quantized by configs/quantize.py")
  model, config = convert.load(directory)
  routers = convert.routers(model)
  init = directory / "router_init.safetensors"
  others = [checkpoint.others(part) for part in (None, *range(checkpoint.layers))]
  return Subject(
      directory=directory,
      digest=_digest(checkpoint),
      dtype=dtype,
      config=config,
      top=model.top,
      blocks=list(model.blocks),
      functions=families.functions(config, dtype),
      routers=routers,
      routers_init=convert.load_routers(init, routers.shape) if init.is_file() else None,
      others={name: tensor for part in others for name, tensor in part.items()},
      tokenizer=_open_tokenizer(directory / "tokenizer.json", config.vocab_size),
  )


def _digest(checkpoint: convert.Checkpoint) -> str:
  """The digest of every file that a run reads from a checkpoint directory, in one shard or several."""
  others = (checkpoint.directory / name for name in ("tokenizer.json", "router_init.safetensors"))
  files = {file.name: artifacts.digest(file) for file in others if file.is_file()}
  return artifacts.digest(files | {"checkpoint": checkpoint.digest()})


def _open_tokenizer(path: Path, vocabulary: int) -> tokenizers.Tokenizer:
  if not path.is_file():
    raise convert.CheckpointError(f"{path}: not found; copy it beside config.json")
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise convert.CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
  if tokenizer.get_vocab_size() > vocabulary:
    raise convert.CheckpointError(f"{path}: has {tokenizer.get_vocab_size()} tokens, config.json says {vocabulary}; the"
                                  " tokenizer belongs to another checkpoint")
  if tokenizer.token_to_id(data.END_OF_TEXT) is None:
    raise convert.CheckpointError(f"{path}: has no token {data.END_OF_TEXT}, which separates the texts that are read")
  return tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
  """Token batches `[B, S]` for every purpose; evaluation and damage use different windows of the held-out text.

  Attributes:
    calibration, damage, evaluation: batches.
    domains: `[n]` domain name of each evaluation sequence.
    tokens_per_byte: of each domain's held-out text.
    digest: of all batches.
  """

  calibration: list[np.ndarray]
  damage: list[np.ndarray]
  evaluation: list[np.ndarray]
  domains: np.ndarray
  tokens_per_byte: dict[str, float]
  digest: str


def check_text(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in what `config` says about text, before any is read.

  Raises:
    ValueError: an unknown domain or one given twice; too few sequences, or sequences that do not fill whole batches.
  """
  for domain in config.domains:
    if domain not in data.DOMAINS:
      near = registry.did_you_mean(domain, data.DOMAINS)
      raise ValueError(f"config.domains: unknown domain {domain!r}{near} (domains: {', '.join(data.DOMAINS)})")
  domains = len(set(config.domains))
  if domains != len(config.domains) or not domains:
    raise ValueError(f"config.domains={tuple(config.domains)}: at least one domain, each once")
  counts = {"calibration": config.calibration, "evaluation": config.evaluation}
  counts["damage.sequences"] = config.damage.sequences
  if (number := config.get("calibration_set", 0)) < 0:
    raise ValueError(f"config.calibration_set={number}: which set of calibration windows, from 0 on")
  if config.batch < 1 or config.length < 2:
    raise ValueError(f"config.batch={config.batch}, config.length={config.length}: at least 1 sequence of 2 tokens")
  for name, count in counts.items():
    if count < 0 or (count == 0 and name != "damage.sequences"):
      raise ValueError(f"config.{name}={count}: at least one sequence of every domain is needed")
    if count * domains % config.batch:
      raise ValueError(f"config.{name}={count}: sequences of {domains} domains do not fill batches of {config.batch}")
    if count * domains == 1 and name != "calibration":
      raise ValueError(f"config.{name}={count}: a standard error needs at least two sequences")


def _windows(streams: Mapping[str, data.TokenStream], domains: Sequence[str], count: int, length: int,
             purpose: str, number: int = 0) -> dict[str, np.ndarray]:
  for domain in domains:
    have = len(streams[domain].tokens) if domain in streams else 0
    if have < count * length * (number + 1):
      sets = f" in each of {number + 1} sets" if number else ""
      raise data.DataError(f"domain {domain!r} has {have} tokens of {purpose} text, {count} sequences of {length}{sets}"
                           " are asked for: lower config.length or the number of sequences")
  return {domain: streams[domain].sequences(count, length, number) for domain in domains}


def _batches(windows: Mapping[str, np.ndarray], size: int) -> list[np.ndarray]:
  rows = np.concatenate(list(windows.values()))
  return [rows[i : i + size] for i in range(0, len(rows), size)]


def read_text(config: ml_collections.ConfigDict, tokenizer: tokenizers.Tokenizer) -> Text:
  """Reads calibration text (training side) and held-out text, equal shares of every domain.

  `config.calibration_set`, 0 if it is not there, chooses one of several disjoint sets of calibration windows.

  Raises:
    ValueError: see `check_text`; or a domain has too little text (`data.DataError`, names it).
  """
  check_text(config)
  length, domains = config.length, sorted(config.domains)
  chosen = lambda documents: [d for d in documents if d.domain in domains]
  training = data.encode(data.thin(chosen(data.calibration()), 24 * length * config.calibration), tokenizer)
  held_out = data.encode(chosen(data.held_out()), tokenizer)
  calibration = _windows(training, domains, config.calibration, length, "calibration", config.get("calibration_set", 0))
  both = _windows(held_out, domains, config.evaluation + config.damage.sequences, length, "held-out")
  evaluation, damage = _split(both, config.evaluation)
  text = [_batches(windows, config.batch) for windows in (calibration, damage, evaluation)]
  return Text(
      *text,
      domains=np.repeat(domains, config.evaluation),
      tokens_per_byte={d: len(held_out[d].tokens) / held_out[d].bytes for d in domains},
      digest=artifacts.digest([artifacts.digest(b) for batches in text for b in batches]),
  )


def _split(windows: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Two disjoint, evenly spread parts of each domain's windows: `count` of them, and the rest."""
  first, rest = {}, {}
  for domain, rows in windows.items():
    chosen = np.zeros(len(rows), bool)
    chosen[np.arange(count) * len(rows) // count] = True
    first[domain], rest[domain] = rows[chosen], rows[~chosen]
  return first, rest


class Workdir:
  """The run's directory (made if it is not there): products, and how long they took."""

  def __init__(self, path: Path):
    path.mkdir(parents=True, exist_ok=True)
    self.path = path

  def product(self, name: str, key: str, load: Callable[[Path, str], Any], make: Callable[[], Any]) -> Any:
    """The product in file `name` if it carries `key`; else what `make` gives, saved under `key`."""
    path = self.path / name
    if path.exists():
      try:
        return load(path, key)
      except artifacts.StaleProductError:
        log.warning("%s was made from something else: making it again", name)
      except Exception as error:  # a damaged file is as good as none
        log.warning("%s cannot be read (%s): making it again", name, error)
    value = make()
    value.save(path, key)
    return value

  @contextlib.contextmanager
  def timed(self, stage: str) -> Iterator[None]:
    """Appends the stage's wall time to timings.jsonl."""
    began = time.monotonic()
    yield
    with (self.path / "timings.jsonl").open("a") as file:
      file.write(json.dumps({"stage": stage, "seconds": round(time.monotonic() - began, 3)}) + "\n")
