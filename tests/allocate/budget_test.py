"""Bytes that are promised are kept, by whichever plan, and not much is left over."""

from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax import container, planar, qtensor
from moeq_jax.allocate import budget, problem

WIDTHS = (1, 2, 3, 4)


def packed(shape: tuple[int, int, int], bits: np.ndarray, group: int) -> qtensor.QTensor:
  """A tensor of zero codes with the widths `bits` `[E]`."""
  experts, k, n = shape
  scale = np.ones((experts, -(-k // planar.layout(k, n, group).group), n), ml_dtypes.bfloat16)
  return qtensor.pack(np.zeros(shape, np.uint8), bits, scale, scale, group=group)


@st.composite
def models(draw):
  """`(shapes, group, other bytes, average)` of a few layers, K padded or not, projections of one or several sizes."""
  experts, hidden, ffn = draw(st.integers(1, 6)), draw(st.integers(1, 200)), draw(st.integers(1, 200))
  layers, gated = draw(st.integers(1, 3)), draw(st.booleans())
  up, down = (experts, hidden, ffn), (experts, ffn, hidden)
  group = draw(st.sampled_from([0, 32, 64, 128]))
  return ([up, up, down] if gated else [up, down]) * layers, group, draw(st.integers(0, 10**6)), draw(st.floats(1, 4))


@hypothesis.given(models(), st.integers(0, 10**6))
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_plan_within_the_bits_fits_the_bytes(model, seed: int):
  shapes, group, others, average = model
  random = np.random.default_rng(seed)
  sizes = np.concatenate([[k * n] * experts for experts, k, n in shapes])
  least = sum(qtensor.stored_bytes(packed(shape, np.ones(shape[0], int), group)) for shape in shapes)
  codes = sum(int(np.prod(shape)) for shape in shapes) / 8
  total = others + least + budget.margin(shapes) + int((average - 1) * codes)
  allowed = budget.bits_for_bytes(total, others, shapes, group, widths=WIDTHS)
  assert 1 <= allowed <= 4
  # The worst plan for the file gives the bits to the tensors that are padded most; others are drawn at random.
  padding = np.concatenate([[planar.layout(k, n, group).k_block / k] * experts for experts, k, n in shapes])
  for order in (np.argsort(-padding, kind="stable"), random.permutation(len(sizes))):
    left, bits = problem.budget_bits(allowed, sizes) - int(sizes.sum()), np.ones(len(sizes), int)
    for cell in order:
      bits[cell] += min(3, left // sizes[cell])
      left -= (bits[cell] - 1) * sizes[cell]
    split = np.split(bits, np.cumsum([shape[0] for shape in shapes])[:-1])
    stored = qtensor.stored_bytes(*(packed(shape, own, group) for shape, own in zip(shapes, split, strict=True)))
    assert others + stored + budget.margin(shapes) <= total


def test_all_bytes_are_used_where_nothing_is_padded():
  shapes, group = [(8, 256, 512), (8, 512, 256)] * 4, 64
  for average in (1.0, 1.7, 2.5, 3.99):
    exact = sum(e * k * n for e, k, n in shapes) * (average + 32 / group) / 8 + 8 * 8 * len(shapes)
    total = int(np.ceil(exact)) + 1000 + budget.margin(shapes)
    assert budget.bits_for_bytes(total, 1000, shapes, group, widths=WIDTHS) == pytest.approx(average, abs=2e-4)
  assert budget.bits_for_bytes(10**12, 0, shapes, group, widths=WIDTHS) == 4.0


@pytest.mark.parametrize("experts", [1, 64])
def test_the_margin_holds_the_headers_of_a_layer(tmp_path: Path, experts: int):
  """A layer as files hold it: three packed tensors, twenty others with long names, and the plan of 32 layers."""
  shapes = [(experts, 64, 32), (experts, 64, 32), (experts, 32, 64)]
  tensors = {f"blocks.31.experts.{i}": packed(shape, np.full(experts, 4), 32) for i, shape in enumerate(shapes)}
  others = {f"model.layers.31.a_name_of_a_parameter_that_is_rather_long.{i}.weight": np.zeros(8) for i in range(20)}
  plan = {"bits": np.full((32, experts, 3), 4).tolist()}
  container.save(tmp_path / "layer", tensors | others, {"plan": plan})
  payload = qtensor.stored_bytes(*tensors.values()) + sum(array.nbytes for array in others.values())
  assert (tmp_path / "layer").stat().st_size - payload < budget.margin(shapes)


def test_too_few_bytes_are_refused_with_what_is_needed():
  shapes = [(8, 4096, 14336)] * 2 + [(8, 14336, 4096)]
  with pytest.raises(ValueError, match=r"0.10 GiB hold no plan.*at width 1 the model takes 0.21 GiB"):
    budget.bits_for_bytes(int(0.1 * 2**30), 0, shapes, 128, widths=WIDTHS)
  with pytest.raises(ValueError, match=r"0.19 MiB hold no plan.* takes 0.\d\d MiB \(\d{6} bytes\), 0.10 MiB of them"):
    budget.bits_for_bytes(200_000, 100_000, [(6, 64, 96)] * 6, 64, widths=WIDTHS)
  found = budget.bits_for_bytes(2**29, 0, shapes, 128, widths=WIDTHS)
  weights = sum(e * k * n for e, k, n in shapes)
  assert found == pytest.approx(8 * 2**29 / weights - 0.25, abs=2e-3)
