"""Tokens per second of generation, with packed experts against dense ones of the same model.

Experts are encoded by RTN and packed in memory; at a budget between two widths the experts of a layer take them in turn
(2.5 bits: 2 and 3). Widths are data, so a plan of the same average takes the same time. All of them generate in turn,
round after round, so that other load on the machine meets them alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import codecs, language_model, progress, qtensor
from moeq_jax.models import families, generate

SHIPPED = "experiments/models/moeq-small"
PROMPT = 16  # tokens


def run(checkpoint: str = SHIPPED, budgets: Sequence[float] = (2.5, 4.0), batches: Sequence[int] = (1, 8),
        tokens: int = 48, rounds: int = 3, group: int = 64) -> dict[str, Any]:
  """Tokens per second after the first token, medians over rounds, and ratios to float32.

  Args:
    checkpoint: a Mixture-of-Experts checkpoint; the shipped model by default.
    budgets: average bits of the experts.
    batches: prompts that are continued together.
    tokens: new tokens of each prompt.
    rounds: timed generations of each model, after one that compiles.
    group: rows of K that share a scale.

  Returns:
    A JSON-able dictionary: `machine`, and for every model, dtype and batch under `results` the tokens per second of all
    rows together and the ratio to the dense float32 model.
  """
  opened = language_model.load(checkpoint)
  models: dict[tuple[str, float | None], list[Any]] = {("dense", None): opened.blocks}
  for budget in budgets:
    models["packed", budget] = _packed(opened, budget, group)
  results = []
  with progress.bar("generate", len(batches) * len(models) * 2) as advance:
    for batch in batches:
      calls = {(kind, bits, dtype): _generation(opened, blocks, dtype, batch, tokens)
               for (kind, bits), blocks in models.items() for dtype in language_model.DTYPES}
      seconds: dict[Any, list[float]] = {key: [] for key in calls}
      for key, call in calls.items():
        call()
        advance(" ".join(map(str, (batch, *key))))
      for _ in range(rounds):
        for key, call in calls.items():
          seconds[key].append(call())
      speed = {key: batch * (tokens - 1) / statistics.median(found) for key, found in seconds.items()}
      base = next(value for (kind, _, dtype), value in speed.items() if (kind, dtype) == ("dense", "float32"))
      results += [{"experts": kind, "bits": bits, "dtype": dtype, "batch": batch, "tokens_per_second": value,
                   "ratio_to_float32": value / base} for (kind, bits, dtype), value in speed.items()]
  found = {"benchmark": "generate", "checkpoint": checkpoint, "tokens": tokens, "rounds": rounds, "group": group,
           "machine": {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__},
           "results": results}
  _show(found)
  return found


def _packed(opened: language_model.LanguageModel, budget: float, group: int) -> list[Any]:
  """The blocks with packed experts."""
  codec = codecs.get(f"rtn(group={group})")
  encode = jax.jit(jax.vmap(codec.encode))
  widths = [b for b in qtensor.WIDTHS if b <= budget][-1], next(b for b in qtensor.WIDTHS if b >= budget)
  share = 0.0 if widths[0] == widths[1] else (budget - widths[0]) / (widths[1] - widths[0])
  blocks = []
  for block in opened.blocks:
    packed = {}
    if opened.functions.sparse(block):
      for name, w in opened.functions.experts(block).items():
        turn = np.arange(w.shape[0])
        bits = np.where(np.floor((turn + 1) * share) > np.floor(turn * share), widths[1], widths[0])
        codes, scale, zero = (np.asarray(a) for a in encode(w.astype(jnp.float32), jnp.asarray(bits)))
        packed[name] = qtensor.rounded(qtensor.pack(codes, bits, scale, zero, group=group))
      block = opened.functions.with_experts(block, jax.tree.map(jnp.asarray, packed))
    blocks.append(block)
  return blocks


def _generation(opened: language_model.LanguageModel, blocks: list[Any], dtype: str, batch: int,
                tokens: int) -> Callable[[], float]:
  """A function that generates once and gives the seconds from the first new token to the last."""
  functions = families.functions(opened.config, jnp.dtype(dtype))
  prompts = np.random.default_rng(0).integers(0, opened.config.vocab_size, (batch, PROMPT)).tolist()
  if dtype != "float32":
    cast = lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf
    top, blocks = jax.tree.map(cast, (opened.top, blocks))
  else:
    top = opened.top

  def call() -> float:
    times: list[float] = []
    generate.generate(opened.config, functions, top, blocks, prompts, max_new_tokens=tokens,
                      watch=lambda _: times.append(time.perf_counter()))
    return times[-1] - times[0]

  return call


def _show(found: dict[str, Any]) -> None:
  table = rich_table.Table(title=f"generation with {found['checkpoint']}: tokens per second",
                           caption=f"{found['machine']['cores']} cores, {found['machine']['device']}")
  for heading in ("experts", "bits", "dtype", "batch", "tokens/s", "times float32"):
    table.add_column(heading, justify="left" if heading in ("experts", "dtype") else "right")
  for row in found["results"]:
    table.add_row(row["experts"], "" if row["bits"] is None else f"{row['bits']:g}", row["dtype"], str(row["batch"]),
                  f"{row['tokens_per_second']:.1f}", f"{row['ratio_to_float32']:.2f}x")
  rich_console.Console().print(table)
