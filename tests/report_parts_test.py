"""The parts of the report: headline, figures, bit maps, rank correlations, the table of the terminal."""

import base64
import io
import re

import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moeq_jax import report
from moeq_jax.report import damage as damage_lib
from moeq_jax.report import figures, maps, points, tables

FULL_LOSS = 3.0571


def _row(method: str, family: str, budget: float | None, increase: float, **more) -> dict:
  bits = 16.0 if budget is None else budget
  row = {
    "id": f"{method}-{budget}-{more.get('draw')}", "method": method, "family": family, "codec": "rtn(group=64)",
    "group": 64, "budget": budget, "nominal_bits": bits, "effective_bits": bits + 0.5, "file_mb": 6.5 + 2 * bits,
    "loss": FULL_LOSS + increase, "loss_delta": increase, "loss_delta_ci95": 0.002 + 0.04 * increase,
    "kl": 1.1 * increase, "router_agreement": 1 - increase,
  }  # fmt: skip
  return row | more


def _rows() -> list[dict]:
  """Full precision and 4 methods at 4 budgets; `random` has 5 draws."""
  rng = np.random.default_rng(0)
  methods = (("uniform", 1.0), ("random", 1.05), ("knapsack(router_grad_error)", 0.62), ("knapsack(damage)", 0.5))
  rows = [_row("full", "full", None, 0.0)]
  for budget, uniform in {1.5: 0.62, 2.0: 0.16, 2.5: 0.08, 3.0: 0.02}.items():
    for method, factor in methods:
      for draw in range(5) if method == "random" else (None,):
        increase = float(uniform * factor * (1 + 0.03 * rng.standard_normal()))
        rows.append(_row(method, method.split("(")[0], budget, increase, draw=draw))
  return rows


def _headline(rows: list[dict]) -> list[str]:
  return ["".join(parts).replace("\N{NO-BREAK SPACE}", " ") for parts in points.headline(points.aggregate(rows))]


def test_headline_compares_the_best_with_uniform():
  rows = [_row("uniform", "uniform", 2.0, 0.16), _row("knapsack(a)", "knapsack", 2.0, 0.08)]
  rows += [_row("b", "tiers", 2.0, 0.2)]
  assert _headline(rows) == [
    "At 2.0 bits, knapsack(a) adds 0.0800 ± 0.0052 nats per token where uniform adds 0.1600 ± 0.0084: 50% less. "
    "Both take 2.50 effective bits. Their 95% intervals do not overlap."
  ]


def test_headline_gives_the_paired_difference_where_rows_have_it():
  rows = [_row("uniform", "uniform", 2.0, 0.16)]
  rows += [_row("k", "knapsack", 2.0, 0.08, vs_uniform=-0.08, vs_uniform_ci95=0.01)]
  assert _headline(rows)[0].endswith(
    "Both take 2.50 effective bits. Paired over sequences, the difference is -0.0800 ± 0.0100."
  )


def test_headline_says_where_sizes_differ_and_intervals_overlap():
  rows = [_row("uniform", "uniform", 2.0, 0.16), _row("knapsack(a)", "knapsack", 2.0, 0.155, effective_bits=2.4)]
  assert _headline(rows)[0].endswith(
    ": 3% less. Their sizes differ: 2.400 and 2.500 effective bits. Their 95% intervals overlap."
  )


def test_headline_names_the_best_without_measured_damage():
  rows = [_row("uniform", "uniform", 2.0, 0.16), _row("m", "measured", 2.0, 0.05), _row("k", "knapsack", 2.0, 0.08)]
  assert _headline(rows)[0].endswith(" Without measured damage the best is k, 0.0800 ± 0.0052.")


def test_headline_admits_that_nothing_beats_uniform():
  rows = [_row("uniform", "uniform", 3.0, 0.02), _row("k", "knapsack", 3.0, 0.03)]
  assert _headline(rows) == [
    "At 3.0 bits, nothing beats uniform, which adds 0.0200 ± 0.0028 nats per token; next comes k, 0.0300 ± 0.0032."
  ]


def test_headline_without_uniform():
  assert _headline([_row("k", "knapsack", 2.0, 0.08)])[0].endswith("there is no uniform row to compare it with.")


def test_headline_takes_the_mean_of_draws_and_every_parity_is_a_name():
  rows = [_row("uniform", "uniform", 1.5, x, draw=i) for i, x in enumerate((0.5, 0.6, 0.7))]
  rows += [_row("k", "knapsack", 1.5, 0.3)]
  sentence = points.headline(points.aggregate(rows))[0]
  assert sentence[1::2] == ("k",)
  assert "where uniform adds 0.6000 (mean of 3 draws): 50% less." in sentence[2]


def test_methods_are_compared_only_under_one_codec_and_group():
  rows = [
    _row("uniform", "uniform", 2.0, 0.16),
    _row("uniform", "uniform", 2.0, 0.10, id="g", codec="gptq(group=128)", group=128),
    _row("k", "knapsack", 2.0, 0.12),
  ]
  sentences = _headline(rows)
  assert len(sentences) == 2
  assert "with gptq(group=128) only uniform was tried" in sentences[0]
  assert "with rtn(group=64), k adds" in sentences[1]
  table = tables.result_table(points.aggregate(rows), None)
  assert [len(group.lines) for group in table.groups] == [1, 2]


def test_the_loss_figure_draws_the_rows(monkeypatch):
  monkeypatch.setattr(figures, "picture", lambda name, caption, fig: (caption, fig))
  found = points.aggregate(_rows())
  caption, fig = figures.loss(found, FULL_LOSS, "loss")
  left, right = fig.axes
  order = list(figures.looks(found))
  for axes, field in ((left, "loss"), (right, "loss_delta")):
    for method, line in zip(order, axes.lines, strict=False):
      mine = [p for p in found if p.method == method]
      np.testing.assert_allclose(line.get_xdata(), [p.budget + 0.5 for p in mine])
      np.testing.assert_allclose(line.get_ydata(), [np.mean([r[field] for r in p.rows]) for p in mine])
  assert list(left.lines[-1].get_ydata()) == [FULL_LOSS, FULL_LOSS]
  top = left.get_ylim()[1]
  hidden = sum(np.mean([r["loss"] for r in p.rows]) > top for p in found)
  assert hidden > 0 and f"Left, {hidden} points lie above the range shown" in caption
  assert right.get_yscale() == "log"
  assert [text.get_text() for text in fig.legends[0].get_texts()] == [*order, "full precision"]
  bands = [band.get_paths()[0].vertices for band in left.collections]
  random = [r for r in _rows() if r["method"] == "random"]
  assert any(np.isclose(band[:, 1].max(), max(r["loss"] for r in random)) for band in bands)


def test_points_that_a_log_scale_cannot_show_are_counted():
  rows = [_row("uniform", "uniform", 2.0, 0.1), _row("k", "knapsack", 4.0, -0.001)]
  assert "Right, 1 point without a positive increase" in figures.loss(points.aggregate(rows), FULL_LOSS, "x").caption


def test_the_bit_map_shows_each_expert_its_bits():
  rng = np.random.default_rng(2)
  bits = rng.integers(1, 5, (5, 16))
  picture = maps.bit_maps([{"method": "m", "budget": 2.0, "bits": bits.tolist()}], [1, 2, 3, 4], 2.0)
  encoded = re.search(r"data:image/png;base64,\s*([^\"]+)", picture.svg)[1]
  pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)
  colors = [pixels[bits == b] for b in (1, 2, 3, 4)]
  assert all(np.ptp(c, axis=0).max() == 0 for c in colors)  # one colour for each width
  brightness = [c[0].sum() for c in colors]
  assert all(np.diff(brightness) < 0)  # darker with more bits
  for mean in bits.mean(1):
    assert f">{mean:.2f}<" in picture.svg


def test_a_map_of_projections_has_a_row_for_each_in_every_layer():
  bits = np.random.default_rng(2).integers(1, 5, (4, 8, 3))
  plans = [{"method": "m", "budget": 2.0, "bits": bits.tolist()}, {"method": "n", "budget": 2.0, "bits": [[4] * 8] * 4}]
  picture = maps.bit_maps(plans, [1, 2, 3, 4], 2.0)
  encoded = re.findall(r"data:image/png;base64,\s*([^\"]+)", picture.svg)
  pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))).convert("RGB")).astype(int)
  shown = bits.swapaxes(1, 2).reshape(12, 8)
  assert len(encoded) == 2 and pixels.shape[:2] == shown.shape
  brightness = [pixels[shown == b].sum(1) for b in (1, 2, 3, 4)]
  assert all(np.ptp(b) == 0 for b in brightness) and all(np.diff([b[0] for b in brightness]) < 0)
  for mean in bits.mean((1, 2)):
    assert f">{mean:.2f}<" in picture.svg
  assert "gate, up and down in this order" in picture.caption
  with pytest.raises(ValueError, match=r"bits of 'm' have shape \(1, 1, 1, 1\)"):
    maps.bit_maps([{"method": "m", "budget": 2.0, "bits": [[[[1]]]]}], [1], 2.0)


def test_budgets_of_the_maps():
  def shown(*budgets: float) -> list[float]:
    return maps.shown_budgets([{"method": "m", "bits": [[1]], "budget": budget} for budget in budgets])

  assert shown(3.0, 2.5, 2.0, 1.5) == [2.0, 2.5]
  assert shown(1.0, 1.25, 1.75, 3.0) == [1.25, 1.75]
  assert shown(4.0) == [4.0]
  assert shown() == []


def _spearman_by_hand(x: np.ndarray, y: np.ndarray) -> float:
  """Pearson's correlation of average ranks: how many are smaller, and half of the others that are equal."""
  ranks = [[(v < u).sum() + ((v == u).sum() - 1) / 2 for u in v] for v in (x, y)]
  return float(np.corrcoef(*ranks)[0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=20))
def test_spearman_with_ties(pairs):
  x, y = np.array(pairs, float).T
  value = damage_lib.spearman(x, y)
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    assert value is None
  else:
    assert value == pytest.approx(_spearman_by_hand(x, y), abs=1e-12)


def test_spearman_leaves_out_what_is_missing():
  x, y = np.array([1.0, 2.0, np.nan, 3.0, 4.0]), np.array([1.0, 2.0, 99.0, 4.0, 3.0])
  assert damage_lib.spearman(x, y) == pytest.approx(0.8)
  assert damage_lib.spearman(x[:3], y[:3]) is None


def test_inside_layers_differs_from_over_all():
  """A score that only knows the layer, and one that only knows the order inside."""
  mean = np.array([[1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0]])
  damage = damage_lib.Damage(mean, np.full(mean.shape, 0.1), 2, 8192)
  layer = damage_lib.agreement("layer", np.array([[4.0, 3.0, 2.0, 1.0], [14.0, 13.0, 12.0, 11.0]]), damage)
  order = damage_lib.agreement("order", np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]), damage)
  constant = damage_lib.agreement("constant", np.array([[1.0] * 4, [1.0, 2.0, 3.0, 4.0]]), damage)
  assert (layer.inside, order.inside) == (pytest.approx(-1.0), pytest.approx(1.0))
  assert layer.over_all == pytest.approx(1 - 6 * 40 / (8 * 63))
  assert order.over_all < 0.6
  assert constant.layers == (None, pytest.approx(1.0)) and constant.inside == pytest.approx(1.0)
  scores = {"l": [[4, 3, 2, 1]] * 2, "c": [[1] * 4] * 2, "o": [[1, 2, 3, 4]] * 2}
  assert [a.score for a in damage_lib.agreements(scores, damage)] == ["o", "l", "c"]


@pytest.mark.parametrize("spread", [0.3, 2.5])
def test_the_scatter_shows_every_expert_with_its_error(monkeypatch, spread):
  monkeypatch.setattr(figures, "picture", lambda name, caption, fig: (caption, fig))
  rng = np.random.default_rng(5)
  mean = np.exp(rng.normal(-6, spread, (3, 8))) - 2e-4
  damage = damage_lib.Damage(mean, np.full(mean.shape, 3e-4), 2, 8192)
  score = rng.random(mean.shape)
  caption, fig = damage_lib.scatter({"score": score.tolist()}, damage)
  axes = fig.axes[0]
  low, high = axes.get_ylim()
  assert low < (mean - 3e-4).min() and high > (mean + 3e-4).max()
  assert (axes.get_yscale() == "symlog") == ("then logarithmic" in caption) == (spread > 1)
  for layer, container in enumerate(axes.containers):
    points_line, _, (bars,) = container.lines
    np.testing.assert_allclose(points_line.get_xydata(), np.stack([score[layer], mean[layer]], 1))
    np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], 6e-4)
  assert len(axes.containers) == 3


def test_chance_is_the_spread_of_unrelated_scores():
  rng = np.random.default_rng(3)
  damage = damage_lib.Damage(rng.random((5, 16)), np.full((5, 16), 0.1), 2, 8192)
  inside = [abs(damage_lib.agreement("x", rng.random((5, 16)), damage).inside) for _ in range(400)]
  assert 0.92 < np.mean(np.array(inside) < damage_lib.chance(damage)) < 0.98


def test_noise_share_is_one_for_noise_alone():
  rng = np.random.default_rng(4)
  stderr = np.full((20, 50), 0.3)
  noise, signal = (scale * rng.standard_normal(stderr.shape) for scale in (0.3, 3.0))
  assert damage_lib.Damage(1 + noise, stderr, 2, 1).noise_share() == pytest.approx(1.0, abs=0.1)
  assert damage_lib.Damage(signal, stderr, 2, 1).noise_share() == pytest.approx(0.01, rel=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------


def _printed(rows: list[dict], width: int) -> list[str]:
  console = rich.console.Console(width=width, file=io.StringIO(), record=True)
  report.terminal(rows, console)
  return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_terminal_shows_each_method_in_one_line_of_100_columns():
  lines = _printed(_rows(), 100)
  assert max(map(len, lines)) <= 100
  assert sum(line.startswith("* knapsack(damage)") for line in lines) == 4
  assert sum(line.startswith("* ") for line in lines) == 4
  row = next(r for r in _rows() if r["method"] == "knapsack(router_grad_error)" and r["budget"] == 2.0)
  start = lines.index("2.0 bits asked")
  line = next(line for line in lines[start:] if "knapsack(router_grad_error)" in line)
  assert line.split()[1:] == [
    "2.00", "2.50", "10.5", f"{row['loss']:.4f}", f"{row['loss_delta']:+.4f}", f"{row['loss_delta_ci95']:.4f}",
    f"{row['kl']:.4f}", f"{100 * row['router_agreement']:.1f}%",
  ]  # fmt: skip
  assert sum("random (5 draws)" in line for line in lines) == 4


def test_a_narrow_terminal_keeps_loss_and_increase():
  lines = _printed(_rows(), 70)
  assert max(map(len, lines)) <= 70
  assert lines[0].split() == ["method", "effective", "loss", "increase"]


def test_the_terminal_takes_markup_as_text_and_no_rows():
  assert _printed([], 100) == ["No rows yet."]
  assert any("[red]x[/red]" in line for line in _printed([_row("[red]x[/red]", "knapsack", 2.0, 0.1)], 100))
