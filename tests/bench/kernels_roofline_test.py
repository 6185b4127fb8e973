"""The arithmetic of the rooflines, and that the figure is written."""

import json
from pathlib import Path

import pytest

from moeq_jax import qtensor
from moeq_jax.bench import kernels_roofline as roofline
from moeq_jax.bench import kernels_tpu_static

SHAPE = 8, 4096, 14336


def test_experts_with_rows():
  assert roofline.active(1, 8) == pytest.approx(1)
  assert roofline.active(2, 8) == pytest.approx(1 + 7 / 8)
  assert roofline.active(10_000, 8) == pytest.approx(8)


def test_times_are_bytes_over_bandwidth_and_products_over_rate():
  chip = roofline.Chip(bandwidth=1e9, rate=1e12, source="")
  by_bytes, by_products = roofline.times(chip, (1, 256, 512), 3, 2)
  assert by_bytes == pytest.approx((256 * 512 / 4 + 2 * 512 * 4 + 2 * 3 * (256 + 512)) / 1e9)
  assert by_products == pytest.approx(2 * 3 * 256 * 512 / 1e12)


@pytest.mark.parametrize("chip", roofline.CHIPS)
@pytest.mark.parametrize("bits", qtensor.WIDTHS)
def test_at_the_crossover_products_take_as_long_as_bytes(chip: str, bits: int):
  rows = roofline.crossover(roofline.CHIPS[chip], SHAPE, bits) * SHAPE[0]
  by_bytes, by_products = roofline.times(roofline.CHIPS[chip], SHAPE, rows, bits)
  assert by_products == pytest.approx(by_bytes, rel=0.05)  # at 1 bit, one expert in eight may have none


def test_counts_become_seconds():
  entry = {"chip": "v5e", "bits": 2, "copy_cycles": 100, "few_rows_bundles": 300, "prefill_bfloat16": 1000,
           "prefill_ratios": {"256": 1.5, "1024": 1.25}}
  tile, clock = (1, 512, 512), kernels_tpu_static.CHIPS["v5e"].clock
  assert roofline.counted(entry, tile, 16) == pytest.approx(300 / clock)
  assert roofline.counted(entry, tile, 256) == pytest.approx(1500 / clock)
  assert roofline.counted(entry, tile, 1024) == pytest.approx(5000 / clock)
  assert roofline.counted({**entry, "copy_cycles": 6000}, tile, 1024) == pytest.approx(6000 / clock)


def test_the_counts_that_are_kept_cover_every_chip_and_width_and_are_within_the_bound():
  entries = json.loads((Path(__file__).parents[2] / roofline.COUNTS).read_text())["results"]
  assert [(e["chip"], e["bits"]) for e in entries] == [(c, b) for c in ("v5e", "v6e") for b in qtensor.WIDTHS]
  assert all(max(e["prefill_ratios"].values()) <= kernels_tpu_static.BOUND for e in entries)


def test_the_figure_is_written(tmp_path: Path):
  entry = {"chip": "v6e", "bits": 3, "copy_cycles": 100, "few_rows_bundles": 300, "prefill_bfloat16": 1000,
           "prefill_ratios": {"256": 1.5}}
  (tmp_path / "counts.json").write_text(json.dumps({"results": [entry]}))
  result = roofline.run(figure=str(tmp_path / "a.png"), counts=str(tmp_path / "counts.json"))
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  assert result["estimates"]
  with pytest.raises(FileNotFoundError):
    roofline.run(figure=str(tmp_path / "c.png"), counts=str(tmp_path / "none.json"))
