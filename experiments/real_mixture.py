"""Is a model a real mixture of experts? Two measurements that a copied dense network fails.

A model made from a dense one counts here only if its experts differ (mean pairwise cosine below 0.9) and if it matters
which of them a token gets (routers whose rows point anywhere, at the same lengths, cost at least 0.1 nats per token).

Command:   PYTHONPATH=. .venv/bin/python -m experiments.real_mixture DIR [DIR ...]
Hardware:  2 CPU cores, 2 GiB
Expected:  seconds for moeq-small, two minutes for a model of 135 million parameters; one JSON object a model
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from moeq_jax import workspace
from moeq_jax.evaluate import perplexity

DRAWS = 3
TEXT = {"domains": ("code", "wiki", "passages"), "length": 128, "batch": 4, "calibration": 4, "evaluation": 4,
        "damage": {"sequences": 0, "bits": 2}}


def mean_cosine(experts: dict[str, Any]) -> float:
  """Mean over pairs of a layer's experts of the cosine between all their weights, `{projection: [E, K, N]}`."""
  flat = np.concatenate([np.asarray(w, np.float64).reshape(len(w), -1) for w in experts.values()], axis=1)
  flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
  cosines = flat @ flat.T
  return float(cosines[np.triu_indices(len(flat), 1)].mean())


def random_routers(subject: workspace.Subject, seed: int) -> workspace.Subject:
  """The model with router rows of random directions and their own lengths."""
  rng, blocks = np.random.default_rng(seed), []
  for block in subject.blocks:
    if subject.functions.sparse(block):
      router = np.asarray(subject.functions.router(block), np.float32)
      drawn = rng.normal(size=router.shape)
      drawn *= np.linalg.norm(router, axis=1, keepdims=True) / np.linalg.norm(drawn, axis=1, keepdims=True)
      block = subject.functions.with_router(block, drawn.astype(np.float32))
    blocks.append(block)
  return dataclasses.replace(subject, blocks=blocks)


def measure(subject: workspace.Subject, batches: Sequence[np.ndarray]) -> dict[str, float]:
  """Mean cosine over layers, the loss, and how much more random routing loses (mean, 95% interval over sequences)."""
  losses = lambda model: perplexity.reference(model.functions, model.top, model.blocks, batches).loss
  own = losses(subject)
  drawn = np.mean([losses(random_routers(subject, seed)) for seed in range(DRAWS)], axis=0)
  delta, stderr = perplexity.paired(drawn, own)
  cosines = [mean_cosine(subject.functions.experts(block)) for block in subject.sparse_blocks()]
  return {"mean_cosine": float(np.mean(cosines)), "largest_layer_cosine": float(np.max(cosines)),
          "loss": float(own.mean()), "random_routing": delta, "random_routing_ci95": 1.96 * stderr}


def main(directories: Sequence[str]) -> None:
  """Prints one JSON object for each model."""
  for name in directories:
    subject = workspace.open_checkpoint(name, "float32")
    text = workspace.read_text(ml_collections.ConfigDict(TEXT), subject.tokenizer)
    print(json.dumps({"model": name} | measure(subject, text.evaluation)), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
