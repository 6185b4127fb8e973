"""Batches for calibrating and evaluating any checkpoint: from the user's own text, from token ids, or from the text of
the installed packages.

A text is tokenized with the checkpoint's own tokenizer and cut into evenly spread windows. An encoder-decoder of T5's
kind gets windows with spans taken out (`span_corruption.py`).
"""

import codecs
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tokenizers

from moeq_jax import artifacts, data, span_corruption
from moeq_jax.models import switch

# What the installed packages give for each purpose.
PURPOSES = {"calibration": lambda: data.calibration(), "evaluation": lambda: data.held_out()}
CHARACTERS = 24  # of text read for every token of calibration: more than any tokenizer needs
SENTINEL = "<extra_id_0>"  # of the first span, in tokenizers of T5's kind; others have ids that a text does not use
PIECE, TOGETHER = 1 << 16, 16  # characters of a piece that is tokenized; pieces at a time
WHOLE = 1 << 22  # bytes up to which a text file is read from end to end, however few tokens are asked for
DATA_FREE = "without data: --config=configs/quantize.py:data_free"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Text:
  """Batches for one purpose.

  Attributes:
    batches: what the model's functions take: `[B, S]` int32, or `{"inputs", "targets"}`.
    about: what they are, in words.
    digest: of the batches.
  """

  batches: list[Any]
  about: str
  digest: str

  @property
  def tokens(self) -> int:
    """Tokens in all batches (of the inputs, where there are targets)."""
    return sum(int(batch_inputs(batch).size) for batch in self.batches)


def batch_inputs(batch: Any) -> np.ndarray:
  """The tokens that a model reads from a batch, `[B, S]`."""
  return batch["inputs"] if isinstance(batch, Mapping) else batch


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in what `config` says about text, before anything is read.

  Raises:
    ValueError: names the field and the remedy.
  """
  for purpose in PURPOSES:
    part, field = config[purpose], f"config.{purpose}"
    if part.sequences < 0 or part.sequences % config.batch:
      raise ValueError(f"{field}.sequences={part.sequences}: sequences that fill whole batches of"
                       f" {config.batch} (config.batch) are needed")
    if part.text and part.tokens:
      raise ValueError(f"{field}: text={part.text!r} and tokens={part.tokens!r} are both given; take one of them")
    for name in filter(None, (part.text, part.tokens)):
      if not Path(name).is_file():
        raise ValueError(f"{field}: no file {name}")
  same = set(filter(None, (config.calibration.text, config.calibration.tokens)))
  if same & {config.evaluation.text, config.evaluation.tokens}:
    raise ValueError(f"config.evaluation: {same.pop()} is what calibrates; a loss on it would say little: take other"
                     " text")
  if config.evaluation.sequences == 1:
    raise ValueError("config.evaluation.sequences=1: a confidence interval needs at least two sequences")


def read(purpose: str, config: ml_collections.ConfigDict, directory: Path, model: Any,
         values: Mapping[str, Any]) -> Text:
  """Batches for `purpose`, which is one of `PURPOSES`.

  Args:
    purpose: `calibration` or `evaluation`; `config[purpose]` says from what and how much.
    config: its `batch` and `length`, too; no sequence is longer than the model has positions.
    directory: of the checkpoint, for its tokenizer.
    model: the checkpoint's config.
    values: its config.json.

  Raises:
    ValueError: no tokenizer, too little text, or tokens that the model does not have; names the file and the remedy.
  """
  part, first, length = config[purpose], None, _length(purpose, config.length, model)
  if part.tokens:
    rows, about = read_tokens(Path(part.tokens), part.sequences, length, model.vocab_size), part.tokens
  else:
    tokenizer = open_tokenizer(directory)
    separator = end_of_text(tokenizer, values)
    if part.text:
      limit = max(WHOLE, CHARACTERS * length * part.sequences)
      rows = _windows(_own_text(Path(part.text), tokenizer, limit), part.sequences, length, part.text)
      about = part.text
    else:
      rows, about = _packages(purpose, part.sequences, length, tokenizer, separator), "the installed packages"
    _check_tokens(rows, model.vocab_size, directory / "tokenizer.json")
    first = tokenizer.token_to_id(SENTINEL)
  rows = rows.astype(np.int32)
  batches: list[Any] = [rows[i : i + config.batch] for i in range(0, len(rows), config.batch)]
  if isinstance(model, switch.SwitchConfig):
    batches = [corrupted(batch, model, first, [config.seed, i]) for i, batch in enumerate(batches)]
    about += ", spans taken out"
  return Text(batches, f"{len(rows)} sequences of {length} tokens: {about}", digest(batches))


def _length(purpose: str, asked: int, model: Any) -> int:
  """Tokens of a sequence: as many as were asked for, as far as the model has positions for them."""
  positions = getattr(model, "max_position_embeddings", asked)  # T5's kind has distances only
  if asked > positions:
    log.warning("%s: sequences of %d tokens, not of config.length=%d: the model has no more positions"
                " (max_position_embeddings)", purpose, positions, asked)
  return min(asked, positions)


def corrupted(rows: np.ndarray, model: switch.SwitchConfig, first: int | None, seed: Sequence[int],
              density: float = 0.15, endings: float = 0.0,
              repetitions: float = 0.0) -> dict[str, np.ndarray]:
  """Sequences `[B, S]` as a batch of an encoder-decoder: spans are taken out, and both sides end with the end of text.

  Args:
    rows: tokens.
    model: names the end of text and the padding.
    first: the sentinel of the first span; the others count down from it. None: ids that the sequence does not use.
    seed: of the spans.
    density: share of the tokens that is taken out.
    endings: share of the rows, the first ones, whose end is taken out as one span.
    repetitions: share of the rows, those after them, that lose nothing and whose targets repeat a part of them.

  Raises:
    ValueError: shares below 0, or of more than all rows.
    span_corruption.SpanError: a text that cannot be corrupted.
  """
  if min(endings, repetitions) < 0 or endings + repetitions > 1:
    raise ValueError(f"endings={endings}, repetitions={repetitions}: they are shares of the rows, at most 1 together")
  rng, end = np.random.default_rng(seed), model.eos_token_id
  end = end if isinstance(end, int) else end[0]
  pairs, reserved = [], (end, model.pad_token_id, model.decoder_start_token_id)
  for place, row in enumerate(rows):
    sentinel = first
    if first is None:
      sentinel = span_corruption.unused_sentinel(row, model.vocab_size, reserved=reserved, density=density)
    if place < endings * len(rows):
      pairs.append(span_corruption.ending(row, sentinel_first=sentinel, density=density))
    elif place < (endings + repetitions) * len(rows):
      pairs.append(span_corruption.repetition(row, sentinel_first=sentinel, density=density, rng=rng))
    else:
      pairs.append(span_corruption.span_corruption(row, sentinel_first=sentinel, density=density, rng=rng))
  ended = ([[*side.tolist(), end] for side in sides] for sides in zip(*pairs))
  return switch.batch(*ended, model)


def digest(batches: Sequence[Any]) -> str:
  """SHA-256 of batches."""
  parts = [batch if isinstance(batch, Mapping) else {"": batch} for batch in batches]
  return artifacts.digest([{name: artifacts.digest(array) for name, array in sorted(p.items())} for p in parts])


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def open_tokenizer(directory: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a checkpoint, without truncation or padding, whatever was saved with it.

  Raises:
    ValueError: there is none, or one of a kind that is not read; says how to convert it, and what goes without.
  """
  path = directory / "tokenizer.json"
  if not path.is_file():
    other = next((n for n in ("tokenizer.model", "spiece.model", "vocab.json") if (directory / n).is_file()), None)
    remedy = (f"convert {other} once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
              if other else "copy it beside config.json")
    raise ValueError(f"{path}: not found; {remedy}; or give token ids (--config.calibration.tokens=FILE.npy and"
                     f" --config.evaluation.tokens=FILE.npy), or quantize {DATA_FREE}")
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{path}: cannot be read ({error}); copy it again") from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def end_of_text(tokenizer: tokenizers.Tokenizer, values: Mapping[str, Any]) -> int | None:
  """The token that separates texts: `<|endoftext|>`, or config.json's `eos_token_id`, or none."""
  own = tokenizer.token_to_id(data.END_OF_TEXT)
  if own is not None:
    return own
  end = values.get("eos_token_id")
  end = (end[0] if end else None) if isinstance(end, list) else end
  return end if isinstance(end, int) and end < tokenizer.get_vocab_size() else None


def read_tokens(path: Path, count: int, length: int, vocabulary: int) -> np.ndarray:
  """Windows of token ids kept in an `.npy`: a stream `[n]`, or sequences `[n, S]`, whose first `length` are taken.

  Raises:
    ValueError: not such a file, too few tokens, or ids that the model does not have.
  """
  try:
    with path.open("rb") as file:  # numpy takes any other file for pickle, and its message says how to run that
      tokens = np.lib.format.read_array(file, allow_pickle=False)
  except Exception as error:  # numpy, its tokenizer and its allocator each have their own
    raise ValueError(f"{path}: cannot be read as .npy ({error}); save the ids by numpy.save") from None
  if not isinstance(tokens, np.ndarray) or tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
    raise ValueError(f"{path}: token ids are whole numbers, [n] or [sequences, length]")
  if tokens.ndim == 1:
    rows = _windows(tokens, count, length, str(path))
  elif len(tokens) < count or tokens.shape[1] < length:
    raise ValueError(f"{path}: holds {tokens.shape[0]} sequences of {tokens.shape[1]} tokens, {count} of {length} are"
                     " asked for: lower config.length or the number of sequences")
  else:
    rows = tokens[:count, :length]
  _check_tokens(rows, vocabulary, path)
  return rows


def _check_tokens(rows: np.ndarray, vocabulary: int, path: Path) -> None:
  if rows.size and (rows.min() < 0 or rows.max() >= vocabulary):
    raise ValueError(f"{path}: gives token {rows.max() if rows.min() >= 0 else rows.min()}, config.json says"
                     f" vocab_size {vocabulary}; it belongs to another checkpoint")


def _windows(tokens: np.ndarray, count: int, length: int, name: str) -> np.ndarray:
  """`count` evenly spread windows of a stream, `[count, length]`."""
  if len(tokens) < count * length:
    raise ValueError(f"{name}: has {len(tokens)} tokens, {count} sequences of {length} are asked for: lower"
                     " config.length or the number of sequences, or give more text")
  return data.TokenStream(tokens, 0).sequences(count, length)


def _own_text(path: Path, tokenizer: tokenizers.Tokenizer, limit: int) -> np.ndarray:
  """The tokens of a text file, piece by piece: pieces end at a line's end where there is one. Of a file with more than
  `limit` bytes, evenly spread parts are read."""
  try:
    parts = _parts(path, limit)
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); give plain text, or token ids"
                     " (config.calibration.tokens, config.evaluation.tokens)") from None
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error})") from None
  pieces = []
  for text in parts:
    begin = 0
    while begin < len(text):
      end = text.rfind("\n", begin + 1, begin + PIECE) + 1 or begin + PIECE
      pieces.append(text[begin:end])
      begin = end
  found = [np.zeros(0, np.int64)]
  for first in range(0, len(pieces), TOGETHER):  # the library keeps some 100 bytes a token
    encoded = tokenizer.encode_batch(pieces[first:first + TOGETHER], add_special_tokens=False)
    found += [np.array(e.ids, np.int64) for e in encoded]
  return np.concatenate(found)


def _parts(path: Path, limit: int) -> list[str]:
  """A text file as a whole, or `limit` bytes of it in evenly spread parts that begin behind the end of a line."""
  size = path.stat().st_size
  if size <= limit:
    return [path.read_text(encoding="utf-8")]
  count, parts = -(-limit // PIECE), []
  with path.open("rb") as file:
    for i in range(count):
      file.seek(i * (size - PIECE) // max(count - 1, 1))
      part = file.read(PIECE)
      begin = part.find(b"\n") + 1 if file.tell() > PIECE else 0
      if not begin:  # one long line, perhaps: at least no character that was cut
        begin = next((at for at, byte in enumerate(part[:4]) if byte & 0xC0 != 0x80), 0)
      parts.append(codecs.getincrementaldecoder("utf-8")().decode(part[begin:]))
  return parts


def _packages(purpose: str, count: int, length: int, tokenizer: tokenizers.Tokenizer, end: int | None) -> np.ndarray:
  """Windows of the text that comes with the project's environment, from all domains in turn."""
  documents = data.thin(PURPOSES[purpose](), CHARACTERS * length * count)
  streams = data.encode(documents, tokenizer, end)
  shares = [count // len(streams) + (i < count % len(streams)) for i in range(len(streams))]
  return np.concatenate([_windows(streams[name].tokens, share, length, f"the installed text, {name}")
                         for name, share in zip(sorted(streams), shares) if share])
