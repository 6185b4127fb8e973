"""The published memory column, cell by cell: which of them this accounting reproduces, and which it does not."""

import pytest

from configs.paper import common
from moeq_jax.allocate import accounting, methods

PARTS = {
    "8x7b": accounting.Parts(32 * 8 * 3 * 4096 * 14336, 32 * (2 * 4096**2 + 2 * 4096 * 1024), 2 * 32000 * 4096),
    "8x22b": accounting.Parts(56 * 8 * 3 * 6144 * 16384, 56 * (2 * 6144**2 + 2 * 6144 * 1024), 2 * 32000 * 6144)}
TABLES = {"8x7b": common.ROWS_8X7B, "8x22b": common.ROWS_8X22B}

# Every cell of the column for uniform widths and for the paper's method: model, method, bits, levels, and what comes
# out here, GiB to two digits.
REPRODUCED = [
    ("8x7b", "uniform", 3.0, 1, 19.26), ("8x7b", "ours", 2.75, 2, 17.69), ("8x7b", "ours", 2.5, 2, 16.11),
    ("8x7b", "ours", 2.25, 2, 14.54), ("8x7b", "ours", 2.125, 2, 13.75),
    ("8x22b", "uniform", 3.0, 1, 57.51), ("8x22b", "uniform", 2.0, 1, 38.61)]
NOT_REPRODUCED = [
    ("8x7b", "uniform", 2.0, 1, 12.96), ("8x7b", "ours", 2.0, 3, 13.23),
    ("8x22b", "ours", 2.5, 2, 48.06), ("8x22b", "ours", 2.25, 2, 43.34), ("8x22b", "ours", 2.0, 3, 39.40),
    ("8x22b", "ours", 1.75, 3, 35.46)]


def cell(model: str, method: str, bits: float, levels: int, variant: str = "code") -> float:
  counts = {int(bits): 8} if method == "uniform" else methods.tier_counts(bits, (1, 2, 3), 8, levels, variant)
  return accounting.memory(PARTS[model], counts)


@pytest.mark.parametrize(("model", "method", "bits", "levels", "ours"), REPRODUCED)
def test_reproduced_cells(model: str, method: str, bits: float, levels: int, ours: float):
  found = cell(model, method, bits, levels)
  assert found == pytest.approx(ours, abs=0.005)
  assert f"{found:.1f}" == f"{TABLES[model][method, bits][0]:.1f}"


@pytest.mark.parametrize(("model", "method", "bits", "levels", "ours"), NOT_REPRODUCED)
def test_cells_that_are_not_reproduced(model: str, method: str, bits: float, levels: int, ours: float):
  """By two levels or three, by the code's counts or the paper's."""
  assert cell(model, method, bits, levels) == pytest.approx(ours, abs=0.005)
  for levels, variant in ((2, "code"), (3, "code"), (3, "paper")):
    assert f"{cell(model, method, bits, levels, variant):.1f}" != f"{TABLES[model][method, bits][0]:.1f}"
    if method == "uniform":
      break


def test_every_cell_of_both_methods_is_in_one_of_the_lists():
  listed = {row[:3] for row in REPRODUCED + NOT_REPRODUCED}
  assert len(listed) == len(REPRODUCED) + len(NOT_REPRODUCED)
  assert listed == {(model, method, bits) for model, rows in TABLES.items() for method, bits in rows
                    if method in ("uniform", "ours")}


def test_cells_of_the_peers_are_counted_otherwise_for_some():
  """PMQ has the cells of the paper's own method; Hessian, BSP and Slim-LLM have others at the same bits."""
  rows = common.ROWS_8X7B
  assert all(rows["pmq", bits][0] == rows["ours", bits][0] for name, bits in rows if name == "pmq")
  implied = {name: accounting.packed_bits_of(PARTS["8x7b"], rows[name, bits][0]) - bits
             for name, bits in rows if bits == 2.5}
  assert implied["ours"] == pytest.approx(0.1, abs=0.01)  # half of the experts at 3.2 bits
  assert implied["hessian"] == implied["bsp"] == pytest.approx(0.27, abs=0.01)


def test_packed_bits_and_their_inverse():
  assert accounting.packed_bits({3: 2, 2: 6}) == pytest.approx(2.3)
  assert accounting.packed_bits({1: 2, 2: 4, 3: 2}) == pytest.approx(2.05)
  gib = accounting.memory(PARTS["8x7b"], {3: 5, 1: 3})
  assert accounting.packed_bits_of(PARTS["8x7b"], gib) == pytest.approx((5 * 3.2 + 3) / 8)
  assert accounting.memory(PARTS["8x7b"], {2: 1}, 3) == pytest.approx(
      accounting.memory(PARTS["8x7b"], {2: 1}) - PARTS["8x7b"].attention / 8 / 2**30)
  with pytest.raises(ValueError, match="at least one expert"):
    accounting.packed_bits({})
