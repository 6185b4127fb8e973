"""Batches come from the file that the user names, tokenized whole, and every mistake names file and remedy."""

import dataclasses
import json
import types
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import tokenizers

from moeq_jax import data, user_text
from moeq_jax.models import switch
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def config(**fields) -> ml_collections.ConfigDict:
  """What the module reads of a config."""
  made = ml_collections.ConfigDict(dict(
      seed=0, batch=2, length=8, calibration=dict(sequences=6, text="", tokens=""),
      evaluation=dict(sequences=4, text="", tokens="")))
  made.update_from_flattened_dict(fields)
  return made


def read(directory: Path, purpose: str = "calibration", values: dict | None = None, **fields) -> user_text.Text:
  made = config(**fields)
  user_text.check(made)
  return user_text.read(purpose, made, directory, tiny.CONFIG, values or {})


def test_windows_of_a_text_file_are_its_tokens(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  text = "\n".join(document.text for document in tiny.documents(3, 5))
  (tmp_path / "mine.txt").write_text(text)
  monkeypatch.setattr(user_text, "PIECE", 301)  # many pieces
  found = read(checkpoint, **{"calibration.text": str(tmp_path / "mine.txt")})
  assert [batch.shape for batch in found.batches] == [(2, 8)] * 3 and found.tokens == 48
  assert all(batch.dtype == np.int32 for batch in found.batches)
  rows = np.concatenate(found.batches)
  decoded = [tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode(row) for row in rows.tolist()]
  places = [text.index(part) for part in decoded]
  assert places == sorted(places) and places[-1] > 0.7 * len(text) and places[0] == 0
  assert str(tmp_path / "mine.txt") in found.about


@pytest.mark.parametrize("end", ["\n", " "])
def test_of_a_large_file_evenly_spread_parts_are_read(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      end: str):
  for name, value in (("PIECE", 101), ("WHOLE", 1000), ("CHARACTERS", 10)):
    monkeypatch.setattr(user_text, name, value)
  words = [f"tökén{place:05d}" for place in range(20_000)]
  whole = end.join(words)
  (tmp_path / "mine.txt").write_text(whole)
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
  parts = user_text._parts(tmp_path / "mine.txt", 1000)
  assert sum(map(len, parts)) <= 1010 and all(part in whole for part in parts)
  places = [whole.index(part) for part in parts]
  assert places == sorted(places) and places[0] == 0 and places[-1] + len(parts[-1]) == len(whole)
  if end == "\n":
    assert all(part.startswith("tökén") for part in parts)
  found = user_text._own_text(tmp_path / "mine.txt", tokenizer, 1000)
  assert 0 < len(found) < 2000


def test_truncation_saved_with_a_tokenizer_does_not_cut_the_text(checkpoint: Path, tmp_path: Path):
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=7)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "mine.txt").write_text("the router sends every token . " * 40)
  assert read(tmp_path, **{"calibration.text": str(tmp_path / "mine.txt")}).tokens == 48


def test_the_installed_text_is_the_default_and_held_out_for_evaluation(checkpoint: Path,
                                                                      monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(data, "calibration", lambda: [*tiny.documents(3, 1), *tiny.documents(3, 2, "code")])
  monkeypatch.setattr(data, "held_out", lambda: tiny.documents(3, 3))
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
  found = {purpose: read(checkpoint, purpose) for purpose in user_text.PURPOSES}
  assert found["evaluation"].tokens == 32 and found["calibration"].tokens == 48
  for purpose, documents in (("calibration", data.calibration()), ("evaluation", data.held_out())):
    streams = [stream.tokens.tobytes() for stream in data.encode(documents, tokenizer).values()]
    rows = np.concatenate(found[purpose].batches)
    inside = [[row.tobytes() in stream for stream in streams] for row in rows]
    assert np.all(np.any(inside, axis=1)) and np.all(np.any(inside, axis=0))


def test_the_end_of_a_text_is_the_tokenizers_own_or_what_the_config_says():
  ours, other = (tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
                 for vocab in ({"a": 0, data.END_OF_TEXT: 3}, {word: i for i, word in enumerate("abcdefgh")}))
  ends = [user_text.end_of_text(ours, {"eos_token_id": 1})]
  ends += [user_text.end_of_text(other, {"eos_token_id": end}) for end in (5, [7, 6], [], None, 8)]
  assert ends == [3, 5, 7, None, None, None]


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_token_ids_need_no_tokenizer(tmp_path: Path, kind: type):
  stream = np.arange(200).astype(kind)
  np.save(tmp_path / "stream.npy", stream)
  np.save(tmp_path / "rows.npy", stream.reshape(10, 20))
  rows = np.concatenate(read(tmp_path, **{"calibration.tokens": str(tmp_path / "rows.npy")}).batches)
  assert np.array_equal(rows, stream.reshape(10, 20)[:6, :8])
  rows = np.concatenate(read(tmp_path, **{"calibration.tokens": str(tmp_path / "stream.npy")}).batches)
  assert np.array_equal(rows, np.arange(6)[:, None] * 33 + np.arange(8))


def test_no_sequence_is_longer_than_the_model_has_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture):
  np.save(tmp_path / "a.npy", np.arange(100))
  for positions, shape in ((5, (2, 5)), (8, (2, 8))):
    monkeypatch.setattr(tiny, "CONFIG", dataclasses.replace(tiny.CONFIG, max_position_embeddings=positions))
    found = read(tmp_path, **{"calibration.tokens": str(tmp_path / "a.npy")})
    assert {batch.shape for batch in found.batches} == {shape} and f"6 sequences of {shape[1]} tokens" in found.about
  assert [record.getMessage() for record in caplog.records] == [
      "calibration: sequences of 5 tokens, not of config.length=8: the model has no more positions"
      " (max_position_embeddings)"]


def test_the_digest_is_of_the_tokens(checkpoint: Path, tmp_path: Path):
  np.save(tmp_path / "a.npy", np.arange(100))
  np.save(tmp_path / "b.npy", np.arange(100))
  np.save(tmp_path / "c.npy", np.arange(1, 101))
  a, b, c = (read(checkpoint, **{"calibration.tokens": str(tmp_path / f"{name}.npy")}).digest for name in "abc")
  assert a == b != c


@pytest.mark.parametrize(("fields", "said"), [
    ({"calibration.sequences": 5}, "config.calibration.sequences=5: sequences that fill whole batches of 2"),
    ({"evaluation.sequences": -2}, "config.evaluation.sequences=-2"),
    ({"batch": 1, "evaluation.sequences": 1}, "at least two sequences"),
    ({"calibration.text": "absent.txt"}, "config.calibration: no file absent.txt"),
    ({"calibration.text": "{here}/t.txt", "calibration.tokens": "{here}/t.npy"}, "both given"),
    ({"calibration.text": "{here}/t.txt", "evaluation.text": "{here}/t.txt"}, "t.txt is what calibrates"),
    ({"calibration.text": "{here}/t.txt"}, "t.txt: has .* tokens, 6 sequences of 8 are asked for"),
    ({"calibration.text": "{here}/latin.txt"}, "latin.txt: cannot be read as UTF-8"),
    ({"calibration.tokens": "{here}/t.txt"}, "t.txt: cannot be read as .npy"),
    ({"calibration.tokens": "{here}/junk.npy"}, "junk.npy: cannot be read as .npy (?!.*(pickle|unsafe))"),
    ({"calibration.tokens": "{here}/lies.npy"}, "lies.npy: cannot be read as .npy"),
    ({"calibration.tokens": "{here}/float.npy"}, "float.npy: token ids are whole numbers"),
    ({"calibration.tokens": "{here}/large.npy"}, "large.npy: gives token 320, config.json says vocab_size 320"),
    ({"calibration.tokens": "{here}/negative.npy"}, "negative.npy: gives token -1"),
    ({"calibration.tokens": "{here}/few.npy"}, "few.npy: holds 3 sequences of 8 tokens, 6 of 8"),
])
def test_mistakes_are_explained(checkpoint: Path, tmp_path: Path, fields: dict, said: str):
  (tmp_path / "t.txt").write_text("the router")
  (tmp_path / "junk.npy").write_bytes(b"junk")
  header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (10**15,)}"
  (tmp_path / "lies.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
  (tmp_path / "latin.txt").write_bytes("Straße ".encode("latin-1") * 50)
  for name, array in (("float", np.ones(100)), ("large", np.full(100, 320)), ("negative", np.full(100, -1)),
                      ("few", np.ones((3, 8), int)), ("t", np.ones(100, int))):
    np.save(tmp_path / f"{name}.npy", array)
  fields = {k: v.format(here=tmp_path) if isinstance(v, str) else v for k, v in fields.items()}
  with pytest.raises(ValueError, match=said):
    read(checkpoint, **fields)


def test_a_checkpoint_without_tokenizer_is_told_what_to_do(tmp_path: Path):
  with pytest.raises(ValueError, match="tokenizer.json: not found; copy it .*tokens=FILE.npy.*:data_free"):
    read(tmp_path)
  (tmp_path / "spiece.model").write_bytes(b"\n")
  with pytest.raises(ValueError, match="tokenizer.json: not found; convert spiece.model once with transformers"):
    read(tmp_path)
  (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
  with pytest.raises(ValueError, match="tokenizer.json: cannot be read"):
    read(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path):
  vocabulary = {f"w{i}": i + 319 for i in range(3)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w2"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "mine.txt").write_text("w0 w2\n" * 90)
  with pytest.raises(ValueError, match="tokenizer.json: gives token 321, config.json says vocab_size 320"):
    read(tmp_path, **{"calibration.text": str(tmp_path / "mine.txt")})


def test_a_share_of_the_rows_has_its_end_taken_out():
  model = types.SimpleNamespace(vocab_size=64, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
  rows = np.tile(np.arange(2, 42), (4, 1))
  batch = user_text.corrupted(rows, model, 63, [0], density=0.3, endings=0.5)
  ends = [(row >= 42).sum() == 1 for row in batch["inputs"]]  # one sentinel, or one for each span
  assert ends == [True, True, False, False] and (batch["targets"] != switch.NO_TARGET).all()


def test_a_share_of_the_rows_repeats_its_input():
  model = types.SimpleNamespace(vocab_size=64, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
  rows = np.tile(np.arange(2, 42), (4, 1))
  batch = user_text.corrupted(rows, model, 63, [0], density=0.3, endings=0.25, repetitions=0.5)
  seen = [set(targets) - {1} <= set(inputs) for inputs, targets in zip(*batch.values(), strict=True)]
  assert seen == [False, True, True, False] and (batch["targets"] != switch.NO_TARGET).all()
  for endings, repetitions in ((-0.1, 0.5), (0.6, 0.5)):
    with pytest.raises(ValueError, match="at most 1 together"):
      user_text.corrupted(rows, model, 63, [0], endings=endings, repetitions=repetitions)


def test_spans_without_sentinels_in_the_vocabulary_take_ids_that_the_sequence_does_not_use():
  model = types.SimpleNamespace(vocab_size=64, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
  rows = np.stack([np.arange(2, 42), np.arange(24, 64)])
  batch = user_text.corrupted(rows, model, None, [0])
  for row, inputs, targets in zip(rows, batch["inputs"], batch["targets"], strict=True):
    sentinels = set(targets.tolist()) - set(row.tolist()) - {1, switch.NO_TARGET}
    assert len(sentinels) == 3 and min(sentinels) > 1  # two spans, and the end
    assert sentinels & set(inputs.tolist())
