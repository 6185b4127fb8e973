"""The page of one quantized model: what report.json says stands on it, and nothing else is needed to read it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeq_jax import report


def data(**changes: Any) -> dict[str, Any]:
  """A `report.json` as `quantize/summary.py` writes it."""
  bits = np.random.default_rng(0).choice([1, 2, 4], (3, 5))
  found = {
      "page": "quantized", "title": "mine: 2.48 bits per expert weight", "command": "./launch.sh run --config=x",
      "config_hash": "cafe", "versions": {"jax": "1.2"}, "model": {"name": "mine", "experts": 5},
      "bytes": {"before": {"experts": 8_000_000_000, "other": 500_000_000}, "after": 1_700_000_000,
                "experts_after": 1_200_000_000},
      "bits": {"asked": 2.5, "nominal": 2.4817, "effective": 2.9817, "stored": 2.9902},
      "widths": [1, 2, 3, 4],
      "plan": {"method": "knapsack(fisher_error)", "budget": 2.5, "bits": bits.tolist(), "constraint": "expert",
               "predicted": 0.0123, "lower_bound": 0.0122, "projections": ["gate", "up", "down"], "units": "nats",
               "draw": None},
      "constraints": [{"constraint": "none", "predicted": 0.0111, "ratio": 0.902, "bits": 2.4999},
                      {"constraint": "expert", "predicted": 0.0123, "ratio": 1.0, "bits": 2.48}],
      "evaluation": {"full": 3.1234, "loss": 3.2345, "loss_delta": 0.1111, "loss_delta_ci95": 0.0222,
                     "perplexity": 25.4, "sequences": 24, "about": "my text"},
      "unrouted": [[2, 4]], "sweeps": ["Encoding sweep: gptq."], "policies": ["Norms stay."],
      "exports": [{"name": "hf", "bytes": 8_500_000_000}],
      "tools": [{"what": "quantized", "opens": "moeq_jax"}, {"what": None, "opens": "transformers, with deploy"}],
  }
  return found | changes


def pages(folder: Path, **changes: Any) -> tuple[str, str]:
  """The text of page and markdown."""
  (folder / "report.json").write_text(json.dumps(data(**changes)))
  assert report.write(folder) == folder / "report.html"
  return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def cells(page: str, table: str) -> list[list[str]]:
  """The lines of a table."""
  body = re.search(rf'<table id="{table}">(.*?)</table>', page, re.DOTALL)[1]
  lines = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
  return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in lines]


def test_the_numbers_are_on_the_page(tmp_path: Path):
  page, markdown = pages(tmp_path)
  for text in (page, markdown):
    assert "8.50 GB became 1.70 GB: 5.0 times smaller" in text
    assert all(number in text for number in ("2.482", "2.982", "2.990", "3.1234", "3.2345", "+0.1111 ± 0.0222"))
    assert "block 2, expert 4" in text and "within its noise" not in text
  assert cells(page, "sizes-table")[1:] == [
      ["experts", "8.00 GB", "1.20 GB"], ["all else", "500.00 MB", "500.00 MB"], ["together", "8.50 GB", "1.70 GB"],
      ["copy: hf", "", "8.50 GB"]]
  assert cells(page, "constraints-table")[1:] == [["none", "0.0111", "0.902", "2.500"],
                                                  ["expert", "0.0123", "1.000", "2.480"]]
  bits = np.array(data()["plan"]["bits"])
  assert [line[:2] for line in cells(page, "shares-table")[1:]] == [
      [str(width), str((bits == width).sum())] for width in (1, 2, 3, 4)]
  assert (tmp_path / "figures" / "bits-2_5.png").is_file() and page.count("<svg") == 1


def test_the_page_needs_nothing_else(tmp_path: Path):
  page, _ = pages(tmp_path)
  assert not re.search(r'<(script|link|img|iframe)|(src|href)="(?!#|data:)|@import', page)
  anchors, ids = (re.findall(rf'{name}="#?([\w-]+)"', page) for name in ('<a href', ' id'))
  assert set(anchors) <= set(ids) and len(ids) == len(set(ids))


def test_what_is_missing_is_said(tmp_path: Path):
  page, markdown = pages(tmp_path, evaluation=None, constraints=[], unrouted=[], exports=[])
  assert "not measured" in page and "not measured" in markdown
  assert "without costs" in page and "No warnings." in page and "copy:" not in page


def test_a_difference_inside_its_noise_is_called_so(tmp_path: Path):
  noisy = data()["evaluation"] | {"loss_delta": -0.01, "loss_delta_ci95": 0.02}
  assert "-0.0100 ± 0.0200, which is within its noise" in pages(tmp_path, evaluation=noisy)[0]


def test_projections_have_maps_of_their_own(tmp_path: Path):
  bits = np.random.default_rng(1).choice([1, 2, 3], (3, 5, 3))
  page, _ = pages(tmp_path, plan=data()["plan"] | {"bits": bits.tolist(), "constraint": "none"})
  assert all(re.search(rf"<text[^>]*>{name}</text>", page) for name in ("gate", "up", "down"))
  assert cells(page, "shares-table")[1][1] == str((bits == 1).sum())
  assert '<tr class="best"><th scope="row">none</th>' in page


def test_many_experts_without_tokens_are_counted_not_listed(tmp_path: Path):
  page, _ = pages(tmp_path, unrouted=[[0, e] for e in range(100)])
  assert "1 expert saw no calibration token: block 2, expert 4." in pages(tmp_path)[0]
  assert "100 experts saw no calibration token" in page and "and 60 more" in page and "expert 41" not in page


def test_hostile_names_stay_text(tmp_path: Path):
  page, _ = pages(tmp_path, title="<script>a</script>", command="run '<b>' & more", policies=["<i>"])
  assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page and "<i>" not in page


def test_equal_input_gives_equal_bytes(tmp_path: Path):
  first = pages(tmp_path)
  picture = (tmp_path / "figures" / "bits-2_5.png").read_bytes()
  assert pages(tmp_path) == first and (tmp_path / "figures" / "bits-2_5.png").read_bytes() == picture


def test_bits_that_do_not_fit_are_named(tmp_path: Path):
  with pytest.raises(ValueError, match="report.json: the bits of the plan have shape"):
    pages(tmp_path, plan=data()["plan"] | {"bits": [1, 2]})
