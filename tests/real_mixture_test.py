"""The two measurements of a real mixture: copies fail them, experts that differ and are chosen pass."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import real_mixture
from moeq_jax.models import decoder
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Subject:
  """As much of a subject as is read."""

  functions: decoder.Functions
  top: object
  blocks: list

  def sparse_blocks(self) -> list:
    return self.blocks


@pytest.fixture(scope="module")
def subject() -> Subject:
  model = tiny.model()
  return Subject(tiny.functions(), model.top, list(model.blocks))


def test_copies_are_alike_and_routing_does_not_matter(subject: Subject):
  blocks = []
  for block in subject.blocks:
    experts = {name: jnp.repeat(w[:1], len(w), axis=0) for name, w in subject.functions.experts(block).items()}
    blocks.append(subject.functions.with_experts(block, experts))
  found = real_mixture.measure(dataclasses.replace(subject, blocks=blocks), tiny.tokens(1))
  assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)
  assert found["random_routing"] == pytest.approx(0, abs=1e-5)


def test_random_experts_are_unlike_and_routing_changes_the_loss(subject: Subject):
  found = real_mixture.measure(subject, tiny.tokens(1))
  assert abs(found["mean_cosine"]) < 0.05
  assert abs(found["random_routing"]) > 1e-3


def test_random_routers_keep_their_lengths_and_nothing_else_changes(subject: Subject):
  drawn = real_mixture.random_routers(subject, 0)
  for old, new in zip(subject.blocks, drawn.blocks, strict=True):
    before, after = (np.asarray(subject.functions.router(block)) for block in (old, new))
    np.testing.assert_allclose(*(np.linalg.norm(r, axis=1) for r in (before, after)), rtol=1e-5, atol=1e-7)
    assert not np.allclose(before, after)
    for name, weight in subject.functions.experts(old).items():
      np.testing.assert_array_equal(weight, subject.functions.experts(new)[name])


def test_the_cosine_is_that_of_all_weights_together():
  experts = {"gate": np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), "down": np.array([[[1.0]], [[1.0]]])}
  assert real_mixture.mean_cosine(experts) == pytest.approx(0.5)
