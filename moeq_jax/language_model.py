"""A language model that is ready to use: opened from disk, it scores texts and continues prompts.

It may be a checkpoint in Hugging Face's format, a quantized model in the project's own (`export/native.py`), or a GGUF
file of a dense model. Quantized experts stay packed and are computed from their buffers.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np
import tokenizers

from moeq_jax import kernels, options, progress, qtensor, runs
from moeq_jax.evaluate import loglikelihood, text
from moeq_jax.export import native
from moeq_jax.models import convert, families, generate, gguf_file, switch

DTYPES = ("float32", "bfloat16")
PROMPTS = 16  # that are continued together
LENGTH_WITHOUT_LIMIT = 2048  # of a model whose positions have none; what lm-evaluation-harness takes, too
USAGE = "generate --checkpoint=DIR (--prompt=TEXT | --file=PROMPTS)"


class ModelError(ValueError):
  """A model cannot be opened or asked: the message names the file or the argument and the remedy."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model and its tokenizer.

  Attributes:
    config: sizes.
    values: what config.json says.
    top, blocks: parameters; quantized experts are QTensors.
    functions: how they compute.
    tokenizer: None where the directory has no tokenizer.json; texts then cannot be given, tokens can.
    ends: tokens that end a text.
  """

  config: Any
  values: Mapping[str, Any]
  top: Any
  blocks: list[Any]
  functions: Any
  tokenizer: tokenizers.Tokenizer | None
  ends: tuple[int, ...]

  @property
  def joint(self) -> bool:
    """Whether the model continues what it reads (a decoder), rather than answering to it (an encoder-decoder)."""
    return not isinstance(self.config, switch.SwitchConfig)

  @property
  def length(self) -> int:
    """Most tokens of a sequence."""
    return getattr(self.config, "max_position_embeddings", LENGTH_WITHOUT_LIMIT)

  @property
  def prefix(self) -> int:
    """The token that stands for an empty context: the beginning of text, else its end."""
    if self.joint and isinstance(first := self.values.get("bos_token_id"), int):
      return first
    if not self.ends:
      raise ModelError("config.json names no beginning and no end of text (bos_token_id, eos_token_id): an empty"
                       " context cannot be scored")
    return self.ends[0]

  def encode(self, string: str, special: bool = True) -> list[int]:
    """The tokens of a text; `special`: with those that the tokenizer puts around it."""
    return self._tokenizer().encode(string, add_special_tokens=special).ids

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return self._tokenizer().decode(list(tokens), skip_special_tokens=True)

  def _tokenizer(self) -> tokenizers.Tokenizer:
    if self.tokenizer is None:
      raise ModelError("the model has no tokenizer.json beside its config.json: copy it there, or give tokens")
    return self.tokenizer

  def logits(self, tokens: Any) -> np.ndarray:
    """The logits of all places, float32.

    Args:
      tokens: `[B, S]` int32, filled up on the right with any token; of an encoder-decoder `{"inputs", "targets"}` as
        `switch.batch` makes it.

    Returns:
      `[B, S, V]`; of an encoder-decoder, of the targets.
    """
    batch = {k: jnp.asarray(v) for k, v in tokens.items()} if isinstance(tokens, Mapping) else jnp.asarray(tokens)
    return np.asarray(loglikelihood.logits(self.functions, self.top, self.blocks, batch))

  def loglikelihoods(self, pairs: Sequence[text.Pair], advance: Callable[..., None] = lambda **_: None
                     ) -> list[tuple[float, bool]]:
    """Scores continuations.

    Args:
      pairs: tokens of contexts and of their continuations, neither empty. Of a pair longer than `length` the first
        tokens are left out.
      advance: called as `advance(steps=n)` after n rows.

    Returns:
      The sum of the log-probabilities of each continuation's tokens in nats, and whether each was the likeliest.

    Raises:
      ModelError: an empty or a too long context or continuation, or a token outside the vocabulary.
    """
    requests = [self._request(*pair) for pair in pairs]
    fill = (0,) if self.joint else (self.config.pad_token_id, switch.NO_TARGET)
    return loglikelihood.loglikelihoods(self.functions, self.top, self.blocks, requests, fill=fill, batch=self._batch,
                                        advance=advance)

  def _batch(self, arrays: list[np.ndarray]) -> Any:
    if self.joint:
      return jnp.asarray(arrays[0])
    return {name: jnp.asarray(array) for name, array in zip(("inputs", "targets"), arrays, strict=True)}

  def _request(self, context: Sequence[int], continuation: Sequence[int]) -> loglikelihood.Request:
    before, after = tuple(context), tuple(continuation)
    if not before or not 0 < len(after) <= self.length:
      raise ModelError(f"a context of {len(before)} and a continuation of {len(after)} tokens: at least one each, and a"
                       f" continuation of at most {self.length}")
    if wrong := [token for token in before + after if not 0 <= token < self.config.vocab_size]:
      raise ModelError(f"token {wrong[0]} is not in the vocabulary of {self.config.vocab_size}; the tokenizer belongs"
                       " to another model")
    if not self.joint:
      return loglikelihood.Request((before[-self.length :], after), 0, after)
    row = (before + after)[-self.length - 1 : -1]
    return loglikelihood.Request((row,), len(row) - len(after), after)

  def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int = 64,
               temperature: float = 0.0, seed: int = 0, *, until: Sequence[str] = (),
               show: Callable[[list[int]], None] = lambda _: None,
               advance: Callable[..., None] = lambda **_: None) -> list[Any]:
    """Continues prompts.

    Args:
      prompts: texts, or lists of tokens; an encoder-decoder reads them as its inputs.
      max_new_tokens: of each prompt.
      temperature: 0 takes the likeliest token, 1 draws from the model's distribution.
      seed: of the draws.
      until: a continuation needs no more tokens once one of these strings is in it.
      show: called after each step with all new tokens of a prompt; meant for a single one.
      advance: called as `advance(steps=n)` when n prompts are done.

    Returns:
      The continuations, texts for texts and tokens for tokens.

    Raises:
      generate.GenerationError, ModelError: an empty prompt, a token outside the vocabulary, no tokenizer.
    """
    texts = [isinstance(prompt, str) for prompt in prompts]
    rows = [self.encode(prompt) if of_text else list(prompt) for prompt, of_text in zip(prompts, texts, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(rows), PROMPTS):
      members = order[start : start + PROMPTS]
      new = generate.generate(
          self.config, self.functions, self.top, self.blocks, [rows[i] for i in members], temperature=temperature,
          max_new_tokens=max_new_tokens, seed=seed + start, eos=self.ends or None, watch=self._watch(until, show))
      found |= dict(zip(members, new, strict=True))
      advance(steps=len(members))
    return [self.decode(found[i]) if of_text else found[i] for i, of_text in enumerate(texts)]

  def _watch(self, until: Sequence[str],
             show: Callable[[list[int]], None]) -> Callable[[np.ndarray], np.ndarray | None]:
    """What looks at the new tokens of every step: shows those of the first prompt, finds the stop strings of all."""
    drawn: list[np.ndarray] = []

    def watch(tokens: np.ndarray) -> np.ndarray | None:
      drawn.append(tokens)
      show([int(step[0]) for step in drawn])
      if until:
        return np.array([any(stop in self.decode(row) for stop in until) for row in np.stack(drawn, axis=1)])
      return None

    return watch

  def scorer(self) -> text.Scorer:
    """The model as it scores texts, with a progress bar."""
    def scored(pairs: Sequence[text.Pair]) -> list[tuple[float, bool]]:
      with progress.bar("score", len(pairs)) as advance:
        return self.loglikelihoods(pairs, advance)

    return text.Scorer(self.encode, scored, lambda: self.prefix, self.length, self.joint)


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def load(directory: str | Path, dtype: str = "float32", capacity: str = "sequence",
         backend: str | None = None) -> LanguageModel:
  """Opens a model.

  Args:
    directory: a checkpoint in Hugging Face's format, a quantized model, or a GGUF file of a dense model; a relative
      name is looked for here and then from the project's root.
    dtype: that it computes in, and that parameters have which are not quantized: one of `DTYPES`.
    capacity: of a Switch Transformer, one of `switch.CAPACITY`; nothing for others.
    backend: for packed experts, whose view is then made here (`kernels.prepare`): one of `kernels.api.BACKENDS`, by
      default the first proven one that takes them.

  Raises:
    ValueError: a file is missing, damaged or of a model that is not supported, or an unknown back-end; names it and
      the remedy.
  """
  if dtype not in DTYPES:
    raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
  if capacity not in switch.CAPACITY:
    raise ModelError(f"capacity {capacity!r} is not one of {', '.join(switch.CAPACITY)}")
  place = next((p for p in (Path(directory), runs.ROOT / directory) if p.exists()), Path(directory))
  kind = jnp.dtype(dtype)
  if place.is_file():
    file = gguf_file.open_gguf(place)
    config, values, tokenizer, top = file.config, file.values, file.tokenizer(), file.top(kind)
    blocks = [file.block(l, kind) for l in range(config.num_hidden_layers)]
  elif native.is_quantized(place):
    model = native.open(place)
    model.files()  # read once, so that a damaged config or tokenizer is found
    config, values = convert.read_config(place)
    tokenizer, top = open_tokenizer(place, config), convert.build_top(config, model.top(), kind)
    blocks = [_packed_block(model, config, l, kind) for l in range(model.layers)]
  else:
    checkpoint = convert.open_checkpoint(place)
    config, values, top = checkpoint.config, checkpoint.values, checkpoint.top(kind)
    tokenizer, blocks = open_tokenizer(place, config), [checkpoint.block(l, kind) for l in range(checkpoint.layers)]
  modes = {"capacity": capacity} if isinstance(config, switch.SwitchConfig) else {}
  functions = families.functions(config, kind, **modes)
  if backend is not None:
    blocks = [_prepared(functions, block, backend) for block in blocks]
  return LanguageModel(config, values, top, blocks, functions, tokenizer, _ends(values, place))


def _packed_block(model: native.Quantized, config: Any, l: int, kind: Any) -> Any:
  packed, others = model.layer(l)
  packed = {name: qtensor.rounded(q) for name, q in packed.items()}
  return convert.build_block(config, l, others, kind, packed)


def _prepared(functions: Any, block: Any, backend: str) -> Any:
  """The block with its packed experts as a back-end reads them."""
  experts = functions.experts(block) if functions.sparse(block) else {}
  packed = {name: w for name, w in experts.items() if isinstance(w, qtensor.QTensor)}
  return functions.with_experts(block, {name: kernels.prepare(q, backend) for name, q in packed.items()})


def open_tokenizer(place: Path, config: Any) -> tokenizers.Tokenizer | None:
  """The tokenizer of a checkpoint, without truncation or padding, whatever was saved with it; None if it has none.

  Raises:
    ModelError: tokenizer.json cannot be read, or has more tokens than the model.
  """
  path = place / "tokenizer.json"
  if not path.is_file():
    return None
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise ModelError(f"{path}: cannot be read ({error}); copy it again") from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if tokenizer.get_vocab_size() > config.vocab_size:
    raise ModelError(f"{path}: has {tokenizer.get_vocab_size()} tokens, config.json says {config.vocab_size}; the"
                     " tokenizer belongs to another checkpoint")
  return tokenizer


def _ends(values: Mapping[str, Any], place: Path) -> tuple[int, ...]:
  """The tokens that end a text: what generation_config.json says, else config.json."""
  try:
    generation = json.loads((place / "generation_config.json").read_text())
  except (OSError, ValueError):
    generation = {}
  said = [source.get("eos_token_id") for source in (generation, values) if isinstance(source, Mapping)]
  ends = next((end for end in said if end is not None), ())
  return tuple(end for end in (ends if isinstance(ends, list | tuple) else [ends]) if isinstance(end, int))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def command_generate(arguments: Sequence[str], out: TextIO | None = None) -> None:
  """Continues one prompt, shown as it grows, or every line of a file, one JSON object each.

  Raises:
    runs.UsageError: a wrong option, or not exactly one of --prompt and --file.
    ValueError: the model cannot be opened, or the file has no prompt.
  """
  defaults = {"checkpoint": None, "prompt": None, "file": None, "max_new_tokens": 64, "temperature": 0.0, "seed": 0,
              "dtype": "float32", "capacity": "sequence"}
  chosen, _ = options.parse(arguments, USAGE, defaults)
  checkpoint = options.needed(chosen.checkpoint, USAGE)
  if bool(chosen.prompt) == bool(chosen.file):
    raise runs.UsageError(f"usage: ./launch.sh {USAGE}")
  prompts = _prompts(Path(chosen.file)) if chosen.file else [chosen.prompt]
  model = load(checkpoint, chosen.dtype, chosen.capacity)
  began, settings = time.monotonic(), (chosen.max_new_tokens, chosen.temperature, chosen.seed)
  out = out or sys.stdout
  count = _many(model, prompts, settings, out) if chosen.file else _one(model, prompts[0], settings, out)
  seconds = time.monotonic() - began
  print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _prompts(path: Path) -> list[str]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise ModelError(f"{path}: is not UTF-8 text ({error}); convert it") from None
  if not (prompts := [line for line in lines if line.strip()]):
    raise ModelError(f"{path}: holds no prompt; write one a line")
  return prompts


def _one(model: LanguageModel, prompt: str, settings: tuple[int, float, int], out: TextIO) -> int:
  """Prints a prompt and its continuation as it grows; returns how many tokens it has."""
  shown = ""

  def show(tokens: list[int]) -> None:
    nonlocal shown
    grown = model.decode(tokens)
    if grown.startswith(shown) and not grown.endswith("\ufffd"):  # that is half of a character
      out.write(grown[len(shown) :])
      out.flush()
      shown = grown

  out.write(prompt if model.joint else "")
  tokens, = model.generate([model.encode(prompt)], *settings, show=show)
  show(tokens)
  out.write("\n")
  return len(tokens)


def _many(model: LanguageModel, prompts: list[str], settings: tuple[int, float, int], out: TextIO) -> int:
  """Prints a JSON object for every prompt; returns how many tokens they have in all."""
  with progress.bar("generate", len(prompts)) as advance:
    found = model.generate([model.encode(prompt) for prompt in prompts], *settings, advance=advance)
  for prompt, tokens in zip(prompts, found, strict=True):
    out.write(json.dumps({"prompt": prompt, "continuation": model.decode(tokens)}, ensure_ascii=False) + "\n")
  return sum(map(len, found))
