"""`bench generate`: the widths that it packs, and ratios that come from its own speeds."""

import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import language_model, qtensor
from moeq_jax.bench import generate
from moeq_jax.models import decoder
from tests import tiny


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> language_model.LanguageModel:
  model = tiny.model()
  found = language_model.LanguageModel(tiny.CONFIG, {}, model.top, list(model.blocks),
                                       decoder.functions(jnp.float32), None, ())
  monkeypatch.setattr(language_model, "load", lambda _: found)
  return found


@pytest.mark.parametrize("budget", [2.5, 3.0, 6.0])
def test_the_packed_experts_have_the_budget(opened: language_model.LanguageModel, budget: float):
  for block, dense in zip(generate._packed(opened, budget, 64), opened.blocks, strict=True):
    for name, q in opened.functions.experts(block).items():
      assert qtensor.nominal_bits(q) == pytest.approx(budget)
      w = np.asarray(opened.functions.experts(dense)[name], np.float64)
      assert np.linalg.norm(np.asarray(qtensor.dequantize(q)) - w) < 0.6 * np.linalg.norm(w)


def test_ratios_are_to_dense_float32(opened: language_model.LanguageModel, capsys):
  found = generate.run(budgets=(2.5,), batches=(2,), tokens=3, rounds=1)
  assert [(row["experts"], row["dtype"]) for row in found["results"]] == [
      (kind, dtype) for kind in ("dense", "packed") for dtype in language_model.DTYPES]
  base = found["results"][0]["tokens_per_second"]
  for row in found["results"]:
    assert row["ratio_to_float32"] == pytest.approx(row["tokens_per_second"] / base)
  assert "tokens per second" in capsys.readouterr().out
