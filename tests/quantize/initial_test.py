"""The routers before training: from beside the checkpoint, from the pre-trained one, or declared to be missing."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from moeq_jax import runs, workspace
from moeq_jax.models import convert, decoder
from moeq_jax.quantize import initial, planning, subject, task
from tests import tiny

METHOD = "tiers(router_norm_change, zeta=0)"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
  """A fine-tuned checkpoint without initial routers, and the one that it was fine-tuned from."""
  root = tmp_path_factory.mktemp("pair")
  fine, before = tiny.checkpoint(root / "fine"), tiny.checkpoint(root / "before", seed=1)
  (fine / initial.ROUTERS).unlink()
  return fine, before


def config(fine: Path, *settings: str):
  return runs.load_config("configs/quantize.py:data_free", [f"--config.{s}" for s in (
      f"checkpoint={fine}", "budget=2.5", f"method={METHOD}", "codec=rtn(group=32)", *settings)])


def load(fine: Path, *settings: str) -> np.ndarray | None:
  source = convert.open_checkpoint(fine)
  return initial.load(config(fine, *settings), source, (2, 6, 64))


def other(directory: Path, **changes: int) -> Path:
  """A random checkpoint of other sizes."""
  sizes = dataclasses.replace(tiny.CONFIG, **changes)
  convert.save(directory, decoder.Decoder(sizes, rngs=nnx.Rngs(0)), sizes)
  return directory


def test_the_pre_trained_checkpoint_gives_its_routers(pair: tuple[Path, Path]):
  fine, before = pair
  np.testing.assert_array_equal(load(fine, f"pretrained={before}"), convert.routers(tiny.model(1)))
  assert load(fine) is None


def test_the_file_beside_the_checkpoint_comes_first(pair: tuple[Path, Path], tmp_path: Path):
  fine = Path(shutil.copytree(pair[0], tmp_path / "fine"))
  routers = np.random.default_rng(0).normal(size=(2, 6, 64)).astype(np.float32)
  convert.save_routers(fine / initial.ROUTERS, routers)
  np.testing.assert_array_equal(load(fine, f"pretrained={pair[1]}"), routers)


def test_the_plan_ranks_by_the_change(pair: tuple[Path, Path], tmp_path: Path):
  fine, before = pair
  runs.execute(config(fine, f"pretrained={before}"), tmp_path / "run")
  bits = np.array(json.loads((tmp_path / "run" / "plan.json").read_text())["bits"])
  norm = lambda seed: np.linalg.norm(convert.routers(tiny.model(seed)).astype(np.float64), axis=-1)
  change = norm(0) - norm(1)
  for layer in range(2):
    order = np.argsort(change[layer], kind="stable")
    np.testing.assert_array_equal(np.sort(np.flatnonzero(bits[layer] == 3)), np.sort(order[:3]))
  assert not np.array_equal(np.argsort(change, axis=1), np.argsort(norm(0), axis=1))


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_local_experts": 4}, "has 4 experts in a layer, .* has 6; it is not what that was fine-tuned from"),
    ({"num_hidden_layers": 1}, "has 1 MoE layers, .* has 2"),
    ({"hidden_size": 32}, r"its routers are \(6, 32\), those of .* \(6, 64\)"),
])
def test_another_model_s_routers_are_refused_by_name(pair: tuple[Path, Path], tmp_path: Path, changes: dict, said: str):
  with pytest.raises(ValueError, match=f"config.pretrained={tmp_path}.*{said}"):
    load(pair[0], f"pretrained={other(tmp_path / 'other', **changes)}")


@pytest.mark.parametrize("shape", [(2, 4, 64), (2, 6, 32), (3, 6, 64)])
def test_a_file_of_routers_of_another_model_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path, shape: tuple):
  fine = Path(shutil.copytree(pair[0], tmp_path / "fine"))
  convert.save_routers(fine / initial.ROUTERS, np.zeros(shape, np.float32))
  with pytest.raises(convert.CheckpointError, match=f"{initial.ROUTERS}.*(shape|another model)"):
    load(fine)


def test_missing_routers_are_an_error_unless_the_config_says_otherwise(pair: tuple[Path, Path], tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture):
  with pytest.raises(ValueError, match="router_norm_change needs .*--config.pretrained=DIR.*missing_routers=norm"):
    task.run(config(pair[0]), tmp_path / "error")
  assert not [p for p in (tmp_path / "error").iterdir() if p.name not in runs.NOTES]
  with caplog.at_level("WARNING"):
    runs.execute(config(pair[0], "missing_routers=norm"), tmp_path / "norm")
  assert "tiers(router_norm, zeta=0) in place of tiers(router_norm_change, zeta=0)" in caplog.text
  plan = json.loads((tmp_path / "norm" / "plan.json").read_text())
  assert plan["method"] == "tiers(router_norm, zeta=0)"
  rows = (tmp_path / "norm" / "rows.jsonl").read_text()
  assert "router_norm, zeta=0" in rows and "router_norm_change" not in rows


def test_methods_without_the_change_need_no_routers(pair: tuple[Path, Path]):
  for method in ("uniform", "tiers(router_norm)", "knapsack(weight_mse)"):
    given = config(pair[0], f"method={method}")
    assert initial.resolved(given, convert.open_checkpoint(pair[0])) is given


def test_an_expert_that_no_token_reached_is_named_and_kept(tmp_path: Path):
  """`tiny` has one: its weights are rounded to nearest, not zeroed."""
  checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
  np.save(tmp_path / "tokens.npy", np.concatenate(tiny.tokens(2)))
  runs.execute(runs.load_config("configs/quantize.py:smoke", [f"--config.{s}" for s in (
      f"checkpoint={checkpoint}", "budget=2.5", "method=tiers(frequency, zeta=0)", "codec=rtn(group=32)",
      f"length={tiny.LENGTH}", f"calibration.tokens={tmp_path / 'tokens.npy'}", "evaluation.sequences=0")]),
      tmp_path / "run")
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  assert report["unrouted"] == [list(tiny.UNROUTED)]
  bits = np.array(json.loads((tmp_path / "run" / "plan.json").read_text())["bits"])
  assert bits[tiny.UNROUTED] == 2  # the least frequent expert gets the low width
  assert any("no calibration token are stored at 2 bits" in said for said in report["policies"])
  opened = subject.open_source(workspace.Workdir(tmp_path / "open"), str(checkpoint), "float32")
  assert planning.routers(opened).shape == (2, 6, 64)
