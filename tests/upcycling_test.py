"""The command `upcycle`: what it writes opens as a Mixtral and computes what the dense model did."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from moeq_jax import language_model, main, runs, upcycling
from moeq_jax.models import convert, decoder, families
from tests import tiny_gguf

DENSE = decoder.DecoderConfig(
    family="llama", vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_local_experts=0, num_experts_per_tok=0, tie_word_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 288, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("dense")
  rng = np.random.default_rng(0)
  model = jax.tree.map(lambda leaf: rng.normal(0.1, 0.16, leaf.shape), families.abstract(DENSE))
  convert.save(folder, model, DENSE, np.float32)
  (folder / "tokenizer.json").write_text(tiny_gguf.trained().to_str())
  return folder


@functools.cache
def logits(place: Path) -> np.ndarray:
  return language_model.load(place).logits(TOKENS)


@pytest.mark.parametrize(("options", "sizes"), [
    (["--experts=3", "--top_k=2"], (3, 2, 48)),
    (["--experts=4", "--top_k=4", "--method=split"], (4, 4, 12)),
])
def test_the_model_computes_what_the_dense_one_did(dense: Path, tmp_path: Path, options: list[str], sizes: tuple):
  upcycling.command([str(dense), str(tmp_path / "moe"), "--dtype=float32", *options])
  found = language_model.load(tmp_path / "moe")
  config = found.config
  assert config.family == "mixtral"
  assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == sizes
  np.testing.assert_allclose(found.logits(TOKENS), logits(dense), atol=2e-4)
  assert logits(dense).std() > 0.1
  assert (tmp_path / "moe" / "tokenizer.json").is_file()
  routers = [block.moe.router[...] for block in found.blocks]
  assert not np.array_equal(*routers)


def test_fewer_parts_than_all_leave_something_out(dense: Path, tmp_path: Path):
  upcycling.command([str(dense), str(tmp_path / "moe"), "--dtype=float32", "--experts=4", "--method=split"])
  difference = np.abs(language_model.load(tmp_path / "moe").logits(TOKENS) - logits(dense)).max()
  assert 1e-3 < difference


def test_a_gguf_file_is_a_source(tmp_path: Path):
  source = tiny_gguf.write(tmp_path / "a.gguf")
  upcycling.command([str(source), str(tmp_path / "moe"), "--experts=2", "--dtype=float32"])
  moe, before = language_model.load(tmp_path / "moe"), language_model.load(source)
  np.testing.assert_allclose(moe.logits(TOKENS), before.logits(TOKENS), atol=2e-4)
  assert moe.encode("the token") == before.encode("the token")
  assert (moe.ends, moe.prefix) == (before.ends, before.prefix)


def test_equal_commands_write_equal_bytes(dense: Path, tmp_path: Path):
  for name in "ab":
    upcycling.command([str(dense), str(tmp_path / name), "--experts=2", "--method=split", "--seed=7"])
  files = sorted(path.name for path in (tmp_path / "a").iterdir())
  assert files == ["config.json", "model.safetensors", "tokenizer.json"]
  assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize(("options", "said"), [
    (["--method=cpoy"], "did you mean"), (["--top_k=9"], "--top_k=9"), (["--experts=0"], "--top_k=2"),
    (["--dtype=int8"], "--dtype=int8"), (["--seed=-1"], "--seed=-1: at least 0"), (["--exprts=2"], "exprts"),
])
def test_wrong_options_are_named(dense: Path, tmp_path: Path, options: list[str], said: str):
  with pytest.raises(runs.UsageError, match=said):
    upcycling.command([str(dense), str(tmp_path / "moe"), *options])
  assert not (tmp_path / "moe").exists()


def test_sources_and_places_that_will_not_do(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
  run = lambda *arguments: main.main(["main", "upcycle", *map(str, arguments)])
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  for experts in (5, 96):
    assert run(dense, tmp_path / "moe", "--method=split", f"--experts={experts}") == 2
    assert f"a network of width 48 cannot be split into {experts}" in capsys.readouterr().err
  assert run(dense, tmp_path / "full") == 2 and "not empty" in capsys.readouterr().err
  assert run(tmp_path / "none", tmp_path / "moe") == 2 and "not found" in capsys.readouterr().err
  assert run("experiments/models/moeq-small", tmp_path / "moe") == 2
  assert "dense model" in capsys.readouterr().err
  assert not (tmp_path / "moe").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["file"]
