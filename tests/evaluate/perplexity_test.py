"""Evaluation against float64 numpy and `decoder.sequence_losses`, and of the full-precision model against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import steps
from moeq_jax.assemble import apply
from moeq_jax.evaluate import perplexity
from moeq_jax.models import decoder
from tests import tiny

EXPERTS = tiny.CONFIG.num_local_experts
BATCHES = tiny.tokens(2, seed=3)


@functools.cache
def reference() -> perplexity.Reference:
  return perplexity.reference(tiny.functions(), tiny.model().top, list(tiny.model().blocks), BATCHES)


def quantized(bits: np.ndarray) -> list:
  """The blocks of a plan `[L, E]`, from packed buffers of one size."""
  packed = [apply.pack_layer(codes, row, widths=tiny.WIDTHS, group=32, sized=True)
            for codes, row in zip(tiny.encoded()[0], bits, strict=True)]
  return apply.quantized_blocks(tiny.functions(), tiny.model().blocks, packed)


def measure(blocks: list) -> perplexity.Measured:
  return perplexity.measure(tiny.functions(), tiny.model().top, blocks, BATCHES, reference())


def test_full_precision_against_itself():
  measured = measure(list(tiny.model().blocks))
  np.testing.assert_array_equal(measured.loss, reference().loss)
  np.testing.assert_array_equal(measured.kl, np.zeros(8))
  assert measured.router_agreement == 1.0


def test_losses_equal_those_of_the_whole_model_and_of_numpy():
  whole = jax.jit(lambda model, tokens: decoder.sequence_losses(model, tokens, jnp.float32))
  ours = np.concatenate([whole(tiny.model(), jnp.asarray(batch)) for batch in BATCHES])
  theirs = np.concatenate([tiny.sequence_losses(tiny.forward(batch)[0], batch) for batch in BATCHES])
  np.testing.assert_allclose(reference().loss, ours, rtol=1e-5)
  np.testing.assert_allclose(reference().loss, theirs, rtol=1e-5)
  assert reference().loss.dtype == np.float64


def test_chosen_experts_equal_numpy():
  for batch, chosen in zip(BATCHES, reference().chosen, strict=True):
    for ours, layer in zip(chosen, tiny.forward(batch)[1], strict=True):
      assert ours.shape == (batch.size, EXPERTS) and (ours.sum(1) == 2).all()
      assert np.take_along_axis(ours, layer.chosen, 1).all()


def test_a_quantized_model_against_numpy():
  plan = np.random.default_rng(0).choice(tiny.WIDTHS, (2, EXPERTS))
  measured = measure(quantized(plan))
  experts = [tiny.decoded(codes, row) for codes, row in zip(tiny.encoded()[0], plan, strict=True)]
  losses, divergence, same = [], [], []
  for batch in BATCHES:
    full, before = tiny.forward(batch)
    logits, after = tiny.forward(batch, experts)
    p, q = (np.log(tiny.softmax(x)) for x in (full, logits))
    losses.append(tiny.sequence_losses(logits, batch))
    divergence.append((np.exp(p) * (p - q)).sum(-1).mean(-1))
    same += [(np.sort(a.chosen, 1) == np.sort(b.chosen, 1)).all(1).mean() for a, b in zip(before, after, strict=True)]
  np.testing.assert_allclose(measured.loss, np.concatenate(losses), rtol=1e-4)
  np.testing.assert_allclose(measured.kl, np.concatenate(divergence), rtol=1e-2)
  assert measured.router_agreement == pytest.approx(np.mean(same), abs=0.006)  # at most one token of 192 on the edge
  assert 0.3 < measured.router_agreement < 1 and measured.kl.min() > 0


def test_more_bits_bring_it_nearer():
  found = [measure(quantized(np.full((2, EXPERTS), bits))) for bits in tiny.WIDTHS]
  divergence = [m.kl.mean() for m in found]
  agreement = [m.router_agreement for m in found]
  assert divergence == sorted(divergence, reverse=True) and divergence[0] > 20 * divergence[3]
  assert agreement == sorted(agreement) and agreement[3] > 0.9


def test_one_compilation_serves_several_plans():
  rng = np.random.default_rng(1)
  measure(quantized(np.full((2, EXPERTS), 2)))
  before = steps.block._cache_size()
  found = [measure(quantized(rng.choice(tiny.WIDTHS, (2, EXPERTS)))).loss.mean() for _ in range(3)]
  assert steps.block._cache_size() == before
  assert len(set(found)) == 3


def test_paired_differences():
  loss, baseline = np.array([1.0, 2.0, 4.0], np.float32), np.array([0.5, 1.5, 2.0])
  mean, stderr = perplexity.paired(loss, baseline)
  assert mean == pytest.approx(1.0)
  assert stderr == pytest.approx(np.sqrt(((0.5) ** 2 + (0.5) ** 2 + 1.0) / 2 / 3))
  assert perplexity.paired(loss + 7, baseline + 7) == pytest.approx((mean, stderr))


def test_batches_of_another_text_are_refused():
  with pytest.raises(ValueError, match="shorter|longer"):
    perplexity.measure(tiny.functions(), tiny.model().top, list(tiny.model().blocks), BATCHES[:1], reference())
