"""Multiple choice by log-likelihood: which answer a model finds likeliest, and what changed against another model.

Three ways of choosing, as in lm-evaluation-harness 0.4.13: `acc` takes the choice of the largest log-likelihood,
`acc_norm` divides it by the characters of the choice first, `acc_bytes` by its UTF-8 bytes. Accuracies of two models on
the same rows are compared row by row: the difference has a much smaller error than either accuracy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeq_jax.evaluate import text
from moeq_jax.evaluate.questions import Question

METRICS = ("acc", "acc_norm", "acc_bytes")
NORMAL_95 = 1.959964  # a normal variable stays within so many standard deviations 95% of the time


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model did with one question.

  Attributes:
    loglikelihoods: of the choices, nats.
    chosen: `{metric: index of the choice}` for each of `METRICS`; ties go to the first.
    gold: the right one.
  """

  loglikelihoods: tuple[float, ...]
  chosen: dict[str, int]
  gold: int

  def row(self) -> dict[str, Any]:
    """The answer as JSON-able values."""
    return dataclasses.asdict(self) | {"loglikelihoods": list(self.loglikelihoods)}


def answer(question: Question, loglikelihoods: Sequence[float]) -> Answer:
  """Chooses among the choices of a question by their log-likelihoods."""
  nats = np.asarray(loglikelihoods, np.float64)
  sizes = {"acc": np.ones(len(nats)), "acc_norm": np.array([len(c) for c in question.choices]),
           "acc_bytes": np.array([len(c.encode()) for c in question.choices])}
  chosen = {metric: int(np.argmax(nats / sizes[metric])) for metric in METRICS}
  return Answer(tuple(nats.tolist()), chosen, question.gold)


def score(questions: Sequence[Question], scorer: text.Scorer) -> list[Answer]:
  """Puts the questions to a model, all in one call of `scorer.loglikelihoods`.

  Raises:
    ValueError: a question cannot be scored (a choice adds no token).
  """
  pairs = [(question.context, f" {choice}") for question in questions for choice in question.choices]
  found = iter(text.loglikelihoods(scorer, pairs))
  return [answer(question, [next(found)[0] for _ in question.choices]) for question in questions]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over rows, and half of its 95% confidence interval (normal approximation; NaN for a single row)."""

  mean: float
  half: float


def estimate(values: Sequence[float]) -> Estimate:
  """The mean of `values` and half of its 95% interval."""
  array = np.asarray(values, np.float64)
  half = NORMAL_95 * array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
  return Estimate(float(array.mean()), float(half))


def _right(answers: Sequence[Answer], metric: str) -> np.ndarray:
  return np.array([float(a.chosen[metric] == a.gold) for a in answers])


def accuracy(answers: Sequence[Answer]) -> dict[str, Estimate]:
  """The share of right answers by each of `METRICS`."""
  return {metric: estimate(_right(answers, metric)) for metric in METRICS}


def paired(answers: Sequence[Answer], against: Sequence[Answer]) -> Mapping[str, Estimate]:
  """How the answers of one model differ from another's to the same questions, first minus second.

  Returns:
    `acc`, `acc_norm`, `acc_bytes`: difference of the accuracies; `changed`, `changed_norm`, `changed_bytes`: share of
    questions that are answered otherwise; `gold_nats`: change of the right answer's log-likelihood.

  Raises:
    ValueError: the answers are to other questions.
  """
  if [(a.gold, len(a.loglikelihoods)) for a in answers] != [(b.gold, len(b.loglikelihoods)) for b in against]:
    raise ValueError("the two models were asked other questions; evaluate both on the same set and limit")
  found = {m: estimate(_right(answers, m) - _right(against, m)) for m in METRICS}
  for metric in METRICS:
    moved = [float(a.chosen[metric] != b.chosen[metric]) for a, b in zip(answers, against)]
    found[metric.replace("acc", "changed")] = estimate(moved)
  nats = [a.loglikelihoods[a.gold] - b.loglikelihoods[b.gold] for a, b in zip(answers, against)]
  return found | {"gold_nats": estimate(nats)}
