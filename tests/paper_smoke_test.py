"""The smoke run of the paper's method checks plans by a rule of its own; that rule, and that it can refuse a plan."""

from pathlib import Path

import hypothesis
import ml_collections
import numpy as np
import pytest
from hypothesis import strategies as st

from configs.paper import smoke
from moeq_jax import runs
from moeq_jax.allocate import methods, tiers
from moeq_jax.models import convert
from tests import tiny


@hypothesis.given(st.integers(0, 2**32), st.sampled_from([4, 8, 16]), st.booleans())
def test_the_rule_written_again_is_that_of_the_plans(seed: int, k: int, whole: bool):
  random = np.random.default_rng(seed)
  order = random.permutation(k).tolist()
  maxvar = random.integers(0, 12, k).astype(float) if whole else np.exp(random.normal(0, 1, k))
  assert smoke.one_pass(order, maxvar) == tiers.rerank(order, maxvar, variant="code").tolist()
  if (maxvar > 0).all():  # the text lets equal zeros pass each other for ever
    assert smoke.until_stable(order, maxvar) == tiers.rerank(order, maxvar).tolist()


@pytest.mark.parametrize(("run", "counts"), smoke.EXPECTED.items())
def test_the_expected_counts_are_those_of_the_tables(run: tuple[str, str], counts: dict[int, int]):
  kind, variant = run
  budget, widths, experts, levels = (1.75, (1, 2, 3), 16, 3) if kind == "mixtral" else (2.5, (2, 3), 8, 2)
  assert methods.tier_counts(budget, widths, experts, levels, variant) == counts


def test_a_plan_that_is_not_the_rule_s_is_refused(tmp_path: Path):
  checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
  config = ml_collections.ConfigDict(dict(checkpoint=str(checkpoint), pretrained=""))
  routers = convert.routers(tiny.model()).astype(np.float64)
  initial = convert.load_routers(checkpoint / "router_init.safetensors", routers.shape).astype(np.float64)
  orders = tiers.order(np.linalg.norm(routers, axis=-1) - np.linalg.norm(initial, axis=-1))
  gates = [[np.asarray(w, np.float64) for w in tiny.functions().experts(block)["gate"]]
           for block in tiny.model().blocks]
  ranked = np.stack([tiers.rerank(o, [g.var(axis=0).max() for g in layer]) for o, layer in zip(orders, gates)])
  bits = tiers.assign(ranked, (2, 3, 1), (1, 2, 3))
  moved = smoke.check("tiny", config, bits, {1: 2, 2: 3, 3: 1}, "paper")
  assert moved == sum(list(a).index(e) < list(b).index(e) for a, b in zip(ranked, orders) for e in range(6))
  bits[1, ranked[1, 0]], bits[1, ranked[1, -1]] = 1, 3
  with pytest.raises(ValueError, match="tiny, layer 1: the plan gives"):
    smoke.check("tiny", config, bits, {1: 2, 2: 3, 3: 1}, "paper")


def test_the_config_loads_and_names_a_checkpoint_that_is_there():
  config = runs.load_config("configs/paper/smoke.py")
  assert config.task == "experiment" and (runs.ROOT / config.checkpoint / "router_init.safetensors").is_file()


def test_an_experiment_must_define_what_it_runs(tmp_path: Path):
  file = tmp_path / "empty.py"
  file.write_text("from ml_collections import config_dict\n\n\ndef get_config():\n"
                  f"  return config_dict.ConfigDict(dict(task='experiment', file={str(file)!r}))\n")
  with pytest.raises(runs.UsageError, match="must define run"):
    runs.execute(runs.load_config(str(file)), tmp_path / "run")
