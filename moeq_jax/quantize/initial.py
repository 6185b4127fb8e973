"""The routers before training, which the norm change needs: from beside the checkpoint, or from the pre-trained one.

`router_init.safetensors` in the checkpoint's directory comes first; else `config.pretrained` names the checkpoint that
the other one was fine-tuned from, of which only routers are read. Where there is neither, a method on the norm change
is an error, unless the config says `missing_routers=norm`: then the final norm takes its place, as in the paper for
models whose pre-training is all there is.
"""

import logging
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from moeq_jax import registry, workspace
from moeq_jax.models import convert

ROUTERS = "router_init.safetensors"
CHANGE, NORM = "router_norm_change", "router_norm"

log = logging.getLogger(__name__)


def known(config: ml_collections.ConfigDict, source: Any) -> bool:
  """Whether the initial routers can be read, as far as names of files say."""
  beside = source.directory is not None and (source.directory / ROUTERS).is_file()
  return beside or bool(config.pretrained)


def load(config: ml_collections.ConfigDict, source: convert.Checkpoint,
         shape: tuple[int, int, int]) -> np.ndarray | None:
  """The initial routers, `[L, E, D]` float32, or None.

  Args:
    config: names the pre-trained checkpoint, if one is to be read.
    source: the checkpoint under work.
    shape: of its routers.

  Raises:
    convert.CheckpointError: a file is damaged, or belongs to a model of another shape.
    ValueError: the pre-trained checkpoint has other MoE layers, experts or widths; names both.
  """
  beside = source.directory / ROUTERS
  if beside.is_file():
    return convert.load_routers(beside, shape)
  if not config.pretrained:
    return None
  directory = next((p for p in (Path(config.pretrained), workspace.ROOT / config.pretrained) if p.is_dir()),
                   Path(config.pretrained))
  before = convert.open_checkpoint(directory)
  counts = (("MoE layers", len(before.sparse_layers), shape[0]), ("experts in a layer", before.experts, shape[1]))
  for what, there, here in counts:
    if there != here:
      raise ValueError(f"config.pretrained={directory}: has {there} {what}, {source.directory} has {here}; it is not"
                       " what that was fine-tuned from: name the checkpoint that it began with")
  found = [before.router(layer) for layer in before.sparse_layers]
  if found[0].shape != shape[1:]:
    raise ValueError(f"config.pretrained={directory}: its routers are {found[0].shape}, those of {source.directory}"
                     f" {shape[1:]}; name the checkpoint that it was fine-tuned from")
  return np.stack(found)


def uses_change(method: str) -> bool:
  """Whether a method ranks by the norm change."""
  args = registry.parse(method).args
  return bool(args) and registry.parse(args[0]).name == CHANGE


def resolved(config: ml_collections.ConfigDict, source: Any) -> ml_collections.ConfigDict:
  """The config with the method that can be run: the final norm in place of its change where initial routers are
  missing and the config allows it; that is logged.

  Raises:
    ValueError: they are missing, and the config does not allow it.
  """
  if known(config, source) or not uses_change(config.method):
    return config
  if config.missing_routers != "norm":
    raise ValueError(f"config.method={config.method}: router_norm_change needs the routers before training:"
                     f" {ROUTERS} in {source.directory}, or --config.pretrained=DIR, the checkpoint that it was"
                     " fine-tuned from; or rank by the final norm: --config.missing_routers=norm")
  spec = registry.parse(config.method)
  method = str(registry.Spec(spec.name, (NORM, *spec.args[1:]), spec.kwargs))
  log.warning("%s: initial routers are missing; config.missing_routers=norm: %s in place of %s", source.directory,
              method, config.method)
  print(f"initial routers are missing: {method} in place of {config.method}", flush=True)
  changed = ml_collections.ConfigDict(config.to_dict(), convert_dict=True)
  changed.method = method
  return changed


def expected(config: ml_collections.ConfigDict, source: Any) -> tuple[str, bool]:
  """The method that a run would take, and whether it would know the initial routers; without a checkpoint they are
  taken to be there.

  Raises:
    ValueError: as `resolved`.
  """
  if source.directory is None:
    return config.method, True
  return resolved(config, source).method, known(config, source)
