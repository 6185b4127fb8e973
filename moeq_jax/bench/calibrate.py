"""What calibration costs: a forward pass, a router-gradient pass, and the same pass with taps on every channel.

The passes go through a model in memory, block by block, on random tokens, and are timed in turn, round after round, so
that other load on the machine meets them alike. Models: the one that comes with the project, whose experts are small
beside what taps add to them, and one of random weights with larger experts.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress, runs, steps, workspace
from moeq_jax.calibrate import channels
from moeq_jax.models import decoder

SMALL = "experiments/models/moeq-small"
LARGER = decoder.DecoderConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, num_local_experts=8, num_experts_per_tok=2)
PASSES = ("forward", "router gradients", "with taps")
MOST_OVER_ROUTER, MOST_OVER_FORWARD = 1.1, 3.5  # what the project asks of the pass with taps


class Model(NamedTuple):
  """A model in memory, its functions, and a batch of tokens for it."""

  name: str
  functions: Any
  top: Any
  blocks: Sequence[Any]
  batch: np.ndarray


def run(rounds: int = 9, sequences: int = 16, length: int = 256, dtype: str = "float32") -> dict[str, Any]:
  """Seconds of each pass over one batch, medians over rounds, and ratios; bytes of the programs of one layer.

  Args:
    rounds: timed turns of all passes, after one that compiles.
    sequences: of the batch.
    length: tokens of a sequence.
    dtype: that the model computes in.

  Returns:
    A JSON-able dictionary with one entry per model under `results`. Ratios are medians of the rounds' own ratios.
    `layer_bytes` is what the backward program of one layer takes: arguments, results and temporary arrays.
  """
  results, makers = [], (_small, _larger)
  with progress.bar("calibrate", len(makers) * (rounds + 1)) as advance:
    for make in makers:
      results.append(_measure(make(sequences, length, dtype), rounds, advance))
  result = {"benchmark": "calibrate", "rounds": rounds, "tokens": sequences * length, "dtype": dtype,
            "machine": {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__},
            "limits": {"over_router": MOST_OVER_ROUTER, "over_forward": MOST_OVER_FORWARD}, "results": results}
  _show(result)
  return result


def _batch(vocabulary: int, sequences: int, length: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, vocabulary, (sequences, length)).astype(np.int32)


def _small(sequences: int, length: int, dtype: str) -> Model:
  subject = workspace.open_checkpoint(str(runs.ROOT / SMALL), dtype)
  batch = _batch(subject.config.vocab_size, sequences, length)
  return Model("moeq-small", subject.functions, subject.top, subject.blocks, batch)


def _larger(sequences: int, length: int, dtype: str) -> Model:
  model = decoder.init(LARGER, seed=0)
  return Model("hidden 512, ffn 1024", decoder.functions(jnp.dtype(dtype)), model.top, list(model.blocks),
               _batch(LARGER.vocab_size, sequences, length))


def _passes(model: Model) -> dict[str, Callable[[], Any]]:
  """Every pass as a call whose result can be waited for."""
  places = steps.sparse(model.functions, model.blocks)

  def forward() -> Any:
    state = steps.embed(model.functions, model.top, model.batch)
    for block in model.blocks:
      state = steps.block(model.functions, block, state)[0]
    return steps.sequence_losses(model.functions, model.top, state, model.batch)

  def backward(tapped: bool) -> Any:
    sums = {place: channels.init(model.functions, model.blocks[place], tapped=tapped) for place in places}
    return channels.sweep(model.functions, model.top, model.blocks, sums, model.batch)[0]

  both = (functools.partial(backward, tapped) for tapped in (False, True))
  return dict(zip(PASSES, (forward, *both), strict=True))


def _measure(model: Model, rounds: int, advance: Callable[..., None]) -> dict[str, Any]:
  passes, seconds = _passes(model), {name: [] for name in PASSES}
  for turn in range(rounds + 1):
    for name, call in passes.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      if turn:
        seconds[name].append(time.perf_counter() - started)
    advance(f"{model.name}, turn {turn} of {rounds}")
  ratio = lambda other: statistics.median(a / b for a, b in zip(seconds["with taps"], seconds[other], strict=True))
  held = {name: _layer_bytes(model, tapped) for name, tapped in (("router gradients", False), ("with taps", True))}
  return {"model": model.name, "seconds": {name: statistics.median(values) for name, values in seconds.items()},
          "over_router": ratio("router gradients"), "over_forward": ratio("forward"), "layer_bytes": held,
          "memory_over_router": held["with taps"] / held["router gradients"]}


def _layer_bytes(model: Model, tapped: bool) -> int:
  """Arguments, results and temporary arrays of one layer's backward program."""
  state = steps.embed(model.functions, model.top, model.batch)
  block = model.blocks[steps.sparse(model.functions, model.blocks)[0]]
  sums = channels.init(model.functions, block, tapped=tapped)
  compiled = channels.update.lower(model.functions, block, sums, state, state, jnp.float32(1)).compile()
  found = compiled.memory_analysis()
  return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
             - found.alias_size_in_bytes)


def _show(result: dict[str, Any]) -> None:
  machine = result["machine"]
  table = rich_table.Table(
      title=f"calibration of {result['tokens']} tokens: seconds, and the pass with taps by the others", box=box.SIMPLE,
      pad_edge=False, caption=f"{machine['cores']} cores, {result['dtype']}, medians of {result['rounds']} rounds;"
                              f" limits {MOST_OVER_ROUTER} of time and memory over the router-gradient pass,"
                              f" {MOST_OVER_FORWARD} over the forward pass")
  for heading in ("model", *PASSES, "by router pass", "by forward", "memory of a layer, MB", "by router pass"):
    table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading == "model")
  for row in result["results"]:
    table.add_row(row["model"], *(f"{row['seconds'][name]:.3f}" for name in PASSES), f"{row['over_router']:.3f}",
                  f"{row['over_forward']:.2f}", f"{row['layer_bytes']['with taps'] / 1e6:.0f}",
                  f"{row['memory_over_router']:.3f}")
  rich_console.Console().print(table)
