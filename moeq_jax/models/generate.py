"""Text generation: one pass over all prompts, then one token of every row at a time, with a cache.

How a family keeps its cache is its `Decoding`; the loop, sampling and stopping are common. Prompts of different lengths
stand side by side, padded on the right: causal attention never looks at the padding, and each row's new tokens are
written over it. Lengths of prompts and caches come in powers of two, so that few programs are compiled.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.models import attention, decoder, layers, switch, switch_generate

COLDEST = 1e-30  # a lower temperature is none: its reciprocal is near the end of what float32 holds


class GenerationError(ValueError):
  """Nothing can be generated from these arguments: the message names the argument and the remedy."""


class Decoding(Protocol):
  """Decoding with a cache, for models of one family; a state is whatever it keeps between two tokens."""

  def prefill(self, functions: Any, top: Any, blocks: Sequence[Any], prompts: Sequence[Sequence[int]],
              room: int) -> tuple[jax.Array, Any]:
    """Reads the prompts: logits `[B, V]` of each row's first new token, and a state with room for `room` of them."""

  def step(self, functions: Any, top: Any, blocks: Sequence[Any], tokens: jax.Array,
           state: Any) -> tuple[jax.Array, Any]:
    """Adds a token to each row, `[B]` int32: logits `[B, V]` of the next ones, and the new state (the old is gone)."""


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: Any, top: Any, tokens: jax.Array) -> jax.Array:
  return functions.embed(top, tokens)


@functools.partial(jax.jit, donate_argnums=2)
def _block(block: Any, h: jax.Array, cache: attention.Cache, first: jax.Array) -> tuple[jax.Array, attention.Cache]:
  """One block on tokens that stand at `first` `[B]` and the positions after it."""
  return block.cached(h, cache, first[:, None] + jnp.arange(h.shape[1])[None])


@functools.partial(jax.jit, static_argnums=0)
def _head(functions: Any, top: Any, h: jax.Array, index: jax.Array) -> jax.Array:
  """`[B, S, D]` -> logits `[B, V]` at `index` `[B]` of each row."""
  return functions.head(top, jnp.take_along_axis(h, index[:, None, None], axis=1))[:, 0]


class CachedDecoder:
  """Decoding of a decoder-only model: a state is the blocks' caches and the length of each row."""

  def prefill(self, functions: Any, top: Any, blocks: Sequence[Any], prompts: Sequence[Sequence[int]],
              room: int) -> tuple[jax.Array, Any]:
    """See `Decoding`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), layers.size_class(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    h = _embed(functions, top, jnp.asarray(tokens))
    size = layers.size_class(int(lengths.max()) + room)
    caches = [block.attention.empty(len(prompts), size, h.dtype) for block in blocks]
    return self._run(functions, top, blocks, h, caches, jnp.zeros_like(lengths), jnp.asarray(lengths))

  def step(self, functions: Any, top: Any, blocks: Sequence[Any], tokens: jax.Array,
           state: Any) -> tuple[jax.Array, Any]:
    """See `Decoding`."""
    caches, lengths = state
    h = _embed(functions, top, tokens[:, None])
    return self._run(functions, top, blocks, h, caches, lengths, jnp.ones_like(lengths))

  def _run(self, functions: Any, top: Any, blocks: Sequence[Any], h: jax.Array, caches: list[attention.Cache],
           first: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
    """Adds `count` `[B]` tokens, whose states are `h` `[B, S, D]`, after the first `first` `[B]` of each row."""
    grown = []
    for block, cache in zip(blocks, caches, strict=True):
      h, cache = _block(block, h, cache, first)
      grown.append(cache)
    return _head(functions, top, h, count - 1), (grown, first + count)


DECODINGS: dict[type, Callable[[], Decoding]] = {
    decoder.DecoderConfig: CachedDecoder,
    switch.SwitchConfig: switch_generate.CachedSwitch,
}


@functools.partial(jax.jit, static_argnames="greedy")
def _choose(logits: jax.Array, key: jax.Array, step: jax.Array, temperature: jax.Array, *, greedy: bool) -> jax.Array:
  """One token of each row, `[B]` int32; a row's draws depend on the seed, its place and the step, on no other row.

  The largest logit is taken away before the division, so that none becomes infinite.
  """
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(logits.shape[0]))
  scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
  return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _check(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float,
           seed: int) -> None:
  """Raises a GenerationError if the arguments of `generate` make no sense."""
  if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
    raise GenerationError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: at least 1 token, a finite"
                          " temperature of at least 0")
  if not -(2**63) <= seed < 2**63:
    raise GenerationError(f"seed={seed}: a whole number of 64 bits is needed")
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise GenerationError(f"prompt {row} is empty: begin it with a token, for example that of the end of text")
    if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
      raise GenerationError(f"prompt {row}: token {wrong[0]} is not in the vocabulary of {config.vocab_size}; the"
                            " tokenizer belongs to another model")


def generate(config: Any, functions: Any, top: Any, blocks: Sequence[Any], prompts: Sequence[Sequence[int]], *,
             max_new_tokens: int, temperature: float = 0.0, seed: int = 0, eos: int | Sequence[int] | None = None,
             watch: Callable[[np.ndarray], np.ndarray | None] = lambda _: None) -> list[list[int]]:
  """Continues prompts.

  Args:
    config: of the model.
    functions: of the model; they say in which dtype it computes.
    top, blocks: parameters; experts are arrays or QTensors.
    prompts: token ids, at least one a prompt; of any lengths.
    max_new_tokens: of each row.
    temperature: logits are divided by it before a token is drawn; 0 (below `COLDEST`) takes the most probable token.
    seed: of the draws; the same seed gives the same tokens.
    eos: token or tokens that end a row.
    watch: called with the new tokens `[B]` of each step; may give `[B]` bool, the rows that need no more of them.

  Returns:
    The new tokens of each prompt; a token of `eos` is the last of its row.

  Raises:
    GenerationError: an empty prompt, tokens outside the vocabulary, no new tokens asked for, a negative temperature,
      a seed beyond 64 bits.
  """
  _check(config, prompts, max_new_tokens, temperature, seed)
  if not prompts:
    return []
  decoding, stop = DECODINGS[type(config)](), np.atleast_1d([] if eos is None else eos)
  choose = functools.partial(_choose, key=jax.random.key(seed), greedy=temperature < COLDEST,
                             temperature=jnp.float32(temperature))
  logits, state = decoding.prefill(functions, top, blocks, prompts, max_new_tokens)
  drawn, ended = [], np.zeros(len(prompts), bool)
  for step in range(max_new_tokens):
    if step:
      logits, state = decoding.step(functions, top, blocks, tokens, state)
    drawn.append(np.asarray(tokens := choose(logits, step=jnp.int32(step))))
    enough = watch(drawn[-1])
    ended |= np.isin(drawn[-1], stop) | (False if enough is None else enough)
    if ended.all():
      break
  return [_until(row, stop) for row in np.stack(drawn, axis=1)]


def _until(row: np.ndarray, stop: np.ndarray) -> list[int]:
  """The tokens up to the first one in `stop`, which is kept."""
  ends = np.flatnonzero(np.isin(row, stop))
  return row[: ends[0] + 1 if ends.size else None].tolist()
