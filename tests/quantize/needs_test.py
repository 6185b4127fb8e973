"""Which sweeps a method needs is found by watching it; nothing is declared."""

import numpy as np
import pytest

from moeq_jax import codecs, registry, scores
from moeq_jax.quantize import needs

PROJECTIONS = ("gate", "up", "down")


def sweeps(method: str, codec: str = "rtn", **options) -> str:
  """The sweeps that a method needs, by first letters: forward, backward, errors, fisher, rows."""
  found = needs.of(method, 2.5, (1, 2, 3, 4), codecs.get(codec), options.pop("projections", PROJECTIONS),
                   options.pop("routers_init", False))
  return "".join(name[0] for name in ("forward", "backward", "errors", "fisher", "rows") if getattr(found, name))


@pytest.mark.parametrize(("method", "without_data", "with_gptq"), [
    ("uniform", "", "r"),
    ("random", "", "r"),
    ("tiers(router_norm)", "", "r"),
    ("tiers(router_norm, zeta=0)", "", "r"),
    ("tiers(frequency)", "f", "fr"),
    ("tiers(router_grad)", "fb", "fbr"),
    ("knapsack(weight_mse)", "e", "fer"),
    ("knapsack(router_norm, constraint=per_layer)", "e", "fer"),
    ("knapsack(max_var)", "e", "fer"),
    ("knapsack(output_error, constraint=none)", "fe", "fer"),
    ("knapsack(router_grad_error, widths=(2, 4))", "fbe", "fber"),
    ("knapsack(fisher_error)", "fbef", "fbefr"),
])
def test_only_what_a_method_reads_is_measured(method: str, without_data: str, with_gptq: str):
  assert (sweeps(method), sweeps(method, "gptq")) == (without_data, with_gptq)


def test_models_without_gate_are_watched_too():
  assert sweeps("tiers(max_var)", projections=("up", "down")) == ""
  assert sweeps("knapsack(output_error, constraint=gate_equals_up)", projections=("up", "down")) == "fe"


def test_errors_are_measured_on_the_way_unless_they_need_gradients():
  fused = lambda method: needs.of(method, 2.5, (2, 3), codecs.get("rtn"), PROJECTIONS, False).fused
  assert fused("knapsack(output_error)") and fused("knapsack(router_grad_error)")
  assert not fused("knapsack(fisher_error)") and not fused("knapsack(weight_mse)")


def test_a_new_score_is_watched_like_the_others(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(scores.SCORES, "mine", scores.Score(lambda e: e.stats.gate_weight * e.stats.router_norm))
  monkeypatch.setitem(scores.SCORES, "norm", scores.Score(
      lambda e: np.stack([np.square(layer["down"]).sum((1, 2)) for layer in e.experts])))
  assert (sweeps("tiers(mine)"), sweeps("tiers(norm)"), sweeps("knapsack(norm)")) == ("f", "", "e")


def test_what_streaming_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(scores.SCORES, "moment", scores.Score(lambda e: e.stats.moment_in.trace(axis1=2, axis2=3)))
  for method, said in (
      ("tiers(moment)", r"config.method=tiers\(moment\): reads stats.moment_in, which streaming does not keep"),
      ("knapsack(damage)", "score damage runs the whole model once for every expert"),
      ("tiers(router_norm_change)", "needs router_init.safetensors"),
      ("knapsack(output_error, constraint=layer)", "unknown constraint 'layer'")):
    with pytest.raises(ValueError, match=said):
      sweeps(method)
  with pytest.raises(registry.UnknownNameError, match="did you mean 'output_error'"):
    sweeps("knapsack(output_eror)")
  assert sweeps("tiers(router_norm_change)", routers_init=True) == ""
