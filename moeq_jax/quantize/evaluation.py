"""What quantization costs: the loss of the full-precision and of the quantized model on the same text, streamed."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, progress, user_text
from moeq_jax.calibrate import layerwise
from moeq_jax.evaluate import perplexity
from moeq_jax.export import native
from moeq_jax.models import convert
from moeq_jax.quantize import encode, measure
from moeq_jax.quantize import states as states_lib
from moeq_jax.quantize.subject import Arrays, Subject


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of the same sequences before and after, nats per predicted token.

  Attributes:
    full, quantized: `[n]`, mean loss of each sequence.
    tokens: predicted in all of them.
  """

  full: np.ndarray
  quantized: np.ndarray
  tokens: int

  def row(self) -> dict[str, float]:
    """The fields of a result row that evaluation decides."""
    delta, stderr = perplexity.paired(self.quantized, self.full)
    return {"loss": float(self.quantized.mean()), "loss_delta": delta, "loss_delta_ci95": 1.96 * stderr,
            "perplexity": float(np.exp(self.quantized.mean()))}


@functools.partial(jax.jit, static_argnums=0)
def _losses(functions: Any, top: Any, state: Any, batch: Any) -> jax.Array:
  """Mean loss of each sequence, `[B]`; of an encoder-decoder, over the targets that are no padding."""
  losses = functions.losses(functions.head(top, state), batch)
  if isinstance(batch, Mapping):
    return jnp.sum(losses, -1) / jnp.maximum(jnp.sum(batch["targets"] >= 0, -1), 1)
  return jnp.mean(losses, -1)


def full_precision(subject: Subject, text: user_text.Text) -> np.ndarray:
  """Loss of each sequence of `text` in full precision, `[n]`; kept in `evaluation/full.npz`."""
  states = measure.text_states(subject, text, "evaluation", keep=False)
  return _measured(subject, text, "full", subject.text_key("losses", {"model": "full precision"}, text), states,
                   lambda: subject.source.top(subject.dtype))


def quantized(subject: Subject, job: encode.Job, text: user_text.Text,
              metas: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
  """Loss of each sequence of `text` of the quantized model, from its packed files; kept in `evaluation/quantized.npz`.

  Args:
    subject: the checkpoint.
    job: how it was encoded.
    text: what is read.
    metas: of the layers' files, as `encode.encode` gives them.
  """
  made = artifacts.digest([metas[layer]["key"] for layer in subject.layers])
  states = encode.quantized_states(subject, job, text, "quantized", subject.text_key("states", {"made": made}, text))

  def top() -> Any:
    others = native.open(encode.directory(subject)).top()
    return convert.build_top(subject.source.config, others, subject.dtype)

  return _measured(subject, text, "quantized", subject.text_key("losses", {"made": made}, text), states, top)


def _measured(subject: Subject, text: user_text.Text, name: str, key: str, states: states_lib.States,
              top: Any) -> np.ndarray:
  def make() -> Arrays:
    with progress.bar(f"evaluate {name}", len(subject.layers)) as advance:
      for layer in subject.layers:
        last = states.at(layer + 1)
        advance()
    read = top()
    losses = [np.asarray(_losses(subject.functions, read, *one), np.float64)
              for whole in zip(last, text.batches, strict=True) for one in layerwise.sequences(*whole)]
    if not all(np.isfinite(loss).all() for loss in losses):
      raise ValueError(f"evaluate {name}: the loss is not finite; the model overflows in {subject.dtype}"
                       " (config.compute_dtype), or the checkpoint is damaged")
    return Arrays({"loss": np.concatenate(losses)})

  return subject.run.product(f"evaluation/{name}.npz", key, Arrays.load, make).values["loss"]
