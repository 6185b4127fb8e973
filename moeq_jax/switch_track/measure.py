"""What a plan costs: loss of the given summaries, and ROUGE of those that the model writes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, codecs, steps, workspace
from moeq_jax.evaluate import perplexity, rouge
from moeq_jax.models import generate
from moeq_jax.switch_track import subject as subjects


@dataclasses.dataclass(frozen=True)
class Examples(artifacts.Saved):
  """A model's results on the n evaluation pairs, of which m are also written.

  Attributes:
    loss: `[n]` summed over the targets of a pair, in nats.
    rouge: `[m, 3]`, see `rouge.KINDS`; `[0, 3]` where nothing was generated.
    empty: generations without a word.
    agreement: share of (token, layer) whose expert is that of full precision.
  """

  loss: np.ndarray
  rouge: np.ndarray
  empty: int
  agreement: float


class Bank:
  """The experts of all MoE layers at every width, ready to be put into the model.

  They are plain arrays of what the codes stand for, as large as the model once for each width: a plan then needs no
  packing, and one compiled program serves full precision and every plan.
  """

  def __init__(self, layers: Sequence[artifacts.LayerCodes], widths: Sequence[int], group: int):
    """Args: layers: codes of every layer. widths: in the order of the codes. group: of the codec."""
    self.widths = list(widths)
    self.layers = [{name: self._decoded(bank, group) for name, bank in layer.codes.items()} for layer in layers]

  @staticmethod
  def _decoded(bank: artifacts.Codes, group: int) -> np.ndarray:
    """`[W, E, K, N]` float32."""
    decode = jax.jit(jax.vmap(lambda encoded: codecs.decode(encoded, group, bank.codes.shape[2])))
    return np.stack([np.asarray(decode(codecs.Encoded(*(field[w] for field in bank))), np.float32)
                     for w in range(len(bank.codes))])

  def blocks(self, subject: workspace.Subject, bits: np.ndarray) -> list[Any]:
    """The model's blocks with experts of the widths `bits`, `[L, E]` or `[L, E, P]`."""
    placed, experts = list(subject.blocks), np.arange(bits.shape[1])
    for layer, place in enumerate(steps.sparse(subject.functions, subject.blocks)):
      own = bits[layer] if bits.ndim == 3 else np.repeat(bits[layer][:, None], len(self.layers[layer]), axis=1)
      chosen = {}
      for p, (name, bank) in enumerate(self.layers[layer].items()):
        index = np.array([self.widths.index(width) for width in own[:, p]])
        chosen[name] = jnp.asarray(bank[index, experts])
      placed[place] = subject.functions.with_experts(subject.blocks[place], chosen)
    return placed


def losses(subject: workspace.Subject, blocks: Sequence[Any],
           batches: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
  """The summed loss of every row, `[n]`, and the expert of every real token by batch and MoE layer."""
  found, routes = [], []
  for batch in batches:
    on_device = jax.tree.map(jnp.asarray, dict(batch))
    state = steps.embed(subject.functions, subject.top, on_device)
    for block in blocks:
      state, routing = steps.block(subject.functions, block, state)
      if routing is not None:
        real = np.asarray(state[f"{block.stack}_mask"]).reshape(-1) > 0
        routes.append(np.asarray(routing.experts)[real, 0])
    mean = steps.sequence_losses(subject.functions, subject.top, state, on_device)  # over padding, which is 0, too
    found.append(np.asarray(mean, np.float64) * batch["targets"].shape[1])
  return np.concatenate(found), routes


def generated(subject: workspace.Subject, blocks: Sequence[Any], batches: Sequence[Mapping[str, np.ndarray]],
              most: int) -> list[str]:
  """What the model writes for each row, greedily, at most `most` tokens."""
  texts, pad = [], subject.config.pad_token_id
  for batch in batches:
    prompts = [row[row != pad].tolist() for row in batch["inputs"]]
    rows = generate.generate(subject.config, subject.functions, subject.top, blocks, prompts, max_new_tokens=most,
                             eos=subject.config.eos_token_id)
    texts += [subject.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
  return texts


def examples(subject: workspace.Subject, blocks: Sequence[Any], text: subjects.Pairs, *, most: int, write: bool,
             reference: Sequence[np.ndarray] | None = None) -> tuple[Examples, list[np.ndarray], list[str]]:
  """Evaluates a model on the evaluation pairs.

  Args:
    subject: whose top and functions are used.
    blocks: full-precision or quantized.
    text: the pairs.
    most: new tokens of a summary.
    write: whether summaries are written and scored.
    reference: the experts that full precision chose, if known.

  Returns:
    The results, the chosen experts (for `reference`), and what was written.
  """
  loss, routes = losses(subject, blocks, text.evaluation)
  same = [ours == theirs for ours, theirs in zip(routes, reference or routes, strict=True)]
  texts, scored = [], rouge.Rouge(np.zeros((0, len(rouge.KINDS))), 0)
  if write:
    texts = generated(subject, blocks, text.written, most)
    scored = rouge.measure(texts, [pair.summary for pair in text.found_written])
  return Examples(loss, scored.scores, scored.empty, float(np.mean(np.concatenate(same)))), routes, texts


def other_texts(subject: workspace.Subject, text: subjects.Pairs) -> dict[str, float]:
  """How much the full-precision model loses when it is given the text of another pair: about 0 for a decoder that does
  not read its encoder. In nats per target token, with half of the 95% interval over pairs."""
  own, _ = losses(subject, subject.blocks, text.evaluation)
  moved = [{**batch, "inputs": np.roll(batch["inputs"], 1, axis=0)} for batch in text.evaluation]
  other, _ = losses(subject, subject.blocks, moved)
  per_target = len(own) / sum(int(np.sum(batch["targets"] >= 0)) for batch in text.evaluation)
  return _paired("loss_delta", other * per_target, own * per_target)


def row(found: Examples, full: Examples, text: subjects.Pairs) -> dict[str, Any]:
  """The fields of a row: losses in nats per target token, ROUGE in points of 100; paired with full precision."""
  targets = np.concatenate([np.sum(batch["targets"] >= 0, axis=1) for batch in text.evaluation])
  per_target = len(targets) / targets.sum()
  values: dict[str, Any] = {"loss": float(found.loss.sum() / targets.sum()), "router_agreement": found.agreement}
  values |= _paired("loss_delta", found.loss * per_target, full.loss * per_target)
  domains = np.array([pair.domain for pair in text.found])
  for domain in sorted(set(domains)):
    values[f"loss_{domain}"] = float(found.loss[domains == domain].sum() / targets[domains == domain].sum())
  domains = np.array([pair.domain for pair in text.found_written])
  for place, kind in enumerate(rouge.KINDS if len(found.rouge) else ()):
    ours, theirs = 100 * found.rouge[:, place], 100 * full.rouge[:, place]
    values |= {kind: float(ours.mean())} | _paired(f"{kind}_delta", ours, theirs)
    values |= {f"{kind}_{domain}": float(ours[domains == domain].mean()) for domain in sorted(set(domains))}
  return values | ({"empty": found.empty} if len(found.rouge) else {})


def _paired(name: str, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """The mean difference over examples, and half of its 95% interval."""
  delta, stderr = perplexity.paired(ours, theirs)
  return {name: delta, f"{name}_ci95": 1.96 * stderr}


def effective_bits(layers: Sequence[artifacts.LayerCodes], bits: np.ndarray) -> float:
  """Average bits of an expert weight with scales and zeros, as packed."""
  total = weights = 0.0
  for layer, own in zip(layers, bits, strict=True):
    for p, bank in enumerate(layer.codes.values()):
      chosen = own if own.ndim == 1 else own[:, p]
      _, experts, rows, columns = bank.codes.shape
      total += float(np.sum(chosen)) * rows * columns + 32.0 * bank.scale.shape[2] * experts * columns
      weights += experts * rows * columns
  return total / weights
