"""Copies of the quantized model in formats of other tools."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import artifacts, progress, registry
from moeq_jax.export import compressed_tensors, huggingface, native, shard_writer
from moeq_jax.models import names
from moeq_jax.quantize import measure
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
    ValueError: an unknown format, option or width, or one that the codec's grid does not allow.
  """
  for spec in specs:
    name, options = _named(spec)
    if name not in FORMATS:
      raise ValueError(f"config.export: unknown format {spec!r}{registry.did_you_mean(name, FORMATS)} (formats: hf,"
                       " compressed-tensors)")
    if wrong := sorted(set(options) - {"width", "dtype"} if name == "compressed_tensors" else set(options) - {"dtype"}):
      raise ValueError(f"config.export: {spec}: {name} has no option {wrong[0]!r}")
    if "width" in options and options["width"] not in compressed_tensors.WIDTHS:
      raise ValueError(f"config.export: {spec}: width is one of {compressed_tensors.WIDTHS}")
    if name == "compressed_tensors" and grid != "ct":
      other = "rtn" if codec == "hqq" else codec
      raise ValueError(f"config.export: compressed-tensors keeps symmetric integers, {codec} here has free zeros;"
                       f" choose the grid before encoding, for example --config.codec='{other}(group=128, grid=ct)'")


def check_source(specs: Sequence[str], subject: Subject, group: int) -> None:
  """Looks whether a checkpoint can be exported as asked, before it is quantized.

  Args:
    specs: of `config.export`.
    subject: the checkpoint.
    group: rows that share a scale, of the codec.

  Raises:
    ValueError: config.json names no dtype for a copy to take, or groups do not divide a projection's inputs where the
      format wants that.
  """
  for spec in specs:
    name, options = _named(spec)
    try:
      shard_writer.dtype_of(subject.source.values, options.get("dtype"))
    except shard_writer.ExportError as error:
      raise ValueError(f"config.export: {spec}: {error}, like {name}(dtype=bfloat16)") from None
    for projection, (rows, _) in measure.projection_shapes(subject).items():
      if name == "compressed_tensors" and group and rows > group and rows % group:
        raise ValueError(f"config.export: {spec}: groups of {group} do not divide the {rows} inputs of {projection}, as"
                         " the format wants; take another group in config.codec, or group=0 (one scale per output)")


def check_plan(specs: Sequence[str], bits: np.ndarray) -> None:
  """Looks whether a plan can be exported as asked, before its codes are made.

  Args:
    specs: of `config.export`.
    bits: of the plan.

  Raises:
    ValueError: an expert has more bits than it is to be packed in.
  """
  for spec in specs:
    width = _named(spec)[1].get("width")
    if width is not None and bits.max() > width:
      raise ValueError(f"config.export: {spec}: the plan gives up to {bits.max()} bits, which do not fit; raise the"
                       " width, or leave the larger ones out of config.widths")


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
