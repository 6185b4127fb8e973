"""Copies of the quantized model in formats of other tools."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeq_jax import artifacts, progress, registry
from moeq_jax.export import compressed_tensors, huggingface, native
from moeq_jax.models import names
from moeq_jax.quantize.subject import Arrays, Subject

FORMATS: dict[str, Callable[..., Path]] = {"hf": huggingface.save, "compressed_tensors": compressed_tensors.save}


def _named(spec: str) -> tuple[str, dict[str, Any]]:
  """The format and the options of an entry of `config.export`; `compressed-tensors` is written with either dash."""
  parsed = registry.parse(str(spec).replace("-", "_"))
  return parsed.name, dict(parsed.kwargs)


def check(specs: Sequence[str], grid: str, codec: str) -> None:
  """Looks for mistakes in `config.export`.

  Args:
    specs: its entries, for example `hf` or `compressed-tensors(width=4)`.
    grid: of the codec.
    codec: its name.

  Raises:
    ValueError: an unknown format or option, or one that the codec's grid does not allow.
  """
  for spec in specs:
    name, options = _named(spec)
    if name not in FORMATS:
      raise ValueError(f"config.export: unknown format {spec!r}{registry.did_you_mean(name, FORMATS)} (formats: hf,"
                       " compressed-tensors)")
    if wrong := sorted(set(options) - {"width", "dtype"} if name == "compressed_tensors" else set(options) - {"dtype"}):
      raise ValueError(f"config.export: {spec}: {name} has no option {wrong[0]!r}")
    if name == "compressed_tensors" and grid != "ct":
      other = "rtn" if codec == "hqq" else codec
      raise ValueError(f"config.export: compressed-tensors keeps symmetric integers, {codec} here has free zeros;"
                       f" choose the grid before encoding, for example --config.codec='{other}(group=128, grid=ct)'")


def kinds(specs: Sequence[str]) -> set[str]:
  """The formats that are asked for."""
  return {_named(spec)[0] for spec in specs}


def export(subject: Subject, model: native.Quantized, specs: Sequence[str]) -> list[Path]:
  """Writes the model in every format asked for, each to a directory named after it; a finished one is left alone."""
  return [_export(subject, model, spec) for spec in specs]


def _export(subject: Subject, model: native.Quantized, spec: str) -> Path:
  name, options = _named(spec)
  directory = subject.run.path / registry.filename(registry.Spec(name, (), options)).replace("_", "-")
  mark, made = directory.with_suffix(".done.npz"), artifacts.digest([str(spec), model.manifest["files"]])
  if not directory.is_dir():
    mark.unlink(missing_ok=True)

  def make() -> Arrays:
    shutil.rmtree(directory, ignore_errors=True)
    with progress.bar(f"export {name}", model.layers + 1) as advance:
      FORMATS[name](model, directory, functools.partial(_expert_name, subject), advance=advance, **options)
    return Arrays({})

  subject.run.product(mark.name, made, Arrays.load, make)
  return directory


def _expert_name(subject: Subject, layer: int, expert: int, projection: str) -> str:
  """The tensor of one expert's projection in the source."""
  return names.expert_names(subject.source.config, layer, expert)[projection]
