"""Multiple choice: the choosing by hand, the scoring by a bigram model, the intervals by simulation."""

import json
import math

import numpy as np
import pytest

from moeq_jax.evaluate import questions, tasks, text
from moeq_jax.evaluate.questions import Question
from tests.evaluate import toy


def test_three_ways_of_choosing():
  question = Question("c", ("ab", "abcdefgh", "äöü€"), 1)
  found = tasks.answer(question, [-4.0, -8.0, -5.9])
  assert found.chosen == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}  # -4; -8/8; -5.9/9
  assert found.row() == {"loglikelihoods": [-4.0, -8.0, -5.9], "chosen": found.chosen, "gold": 1}
  assert json.loads(json.dumps(found.row())) == found.row()


def test_ties_go_to_the_first():
  assert tasks.answer(Question("c", ("a", "b"), 1), [-1.0, -1.0]).chosen == dict.fromkeys(tasks.METRICS, 0)


def test_scores_are_the_log_likelihoods_of_space_and_choice():
  asked = [Question("where is the cat", ("on it", "in the hat", "out"), 0), Question("", ("up", "down"), 1)]
  found = tasks.score(asked, toy.scorer())
  for question, answered in zip(asked, found, strict=True):
    context = toy.encode(question.context) or [toy.PREFIX]
    for choice, nats in zip(question.choices, answered.loglikelihoods, strict=True):
      tokens = [context[-1], *toy.encode(f" {choice}")]
      assert nats == pytest.approx(sum(toy.TABLE[a, b] for a, b in zip(tokens, tokens[1:])))
    assert answered.chosen["acc"] == int(np.argmax(answered.loglikelihoods)) and answered.gold == question.gold


def test_a_perfect_scorer_is_always_right():
  asked = questions.read("openbookqa", 50)
  right = {(q.context, q.choices[q.gold]) for q in asked}
  scorer = text.Scorer(
      encode=lambda part, special: [part.strip()], prefix=str, length=10, joint=False,
      loglikelihoods=lambda pairs: [(0.0 if (a[0], b[0]) in right else -1.0, True) for a, b in pairs])
  assert tasks.accuracy(tasks.score(asked, scorer))["acc"] == tasks.Estimate(1.0, 0.0)


def answers(chosen: list[int], gold: list[int], nats: list[float]) -> list[tasks.Answer]:
  return [tasks.Answer((n, -9.0), dict.fromkeys(tasks.METRICS, c), g)
          for c, g, n in zip(chosen, gold, nats, strict=True)]


def test_differences_are_paired():
  gold = [0, 0, 0, 0]
  ours, theirs = answers([0, 0, 1, 1], gold, [-1, -2, -3, -4]), answers([0, 1, 1, 0], gold, [-1.5, -2, -2, -4])
  found = tasks.paired(ours, theirs)
  assert found["acc"].mean == 0.0 and found["changed"].mean == 0.5
  assert found["acc"].half == pytest.approx(tasks.NORMAL_95 * math.sqrt(2 / 3) / 2)
  assert found["gold_nats"].mean == pytest.approx(-0.125)
  assert set(found) == {"acc", "acc_norm", "acc_bytes", "changed", "changed_norm", "changed_bytes", "gold_nats"}
  same = tasks.paired(ours, ours)
  assert all(value == tasks.Estimate(0.0, 0.0) for value in same.values())


def test_answers_to_other_questions_are_not_compared():
  with pytest.raises(ValueError, match="other questions"):
    tasks.paired(answers([0], [0], [-1]), answers([0], [1], [-1]))
  with pytest.raises(ValueError, match="other questions"):
    tasks.paired(answers([0, 1], [0, 1], [-1, -1]), answers([0], [0], [-1]))


def test_intervals_hold_the_truth_in_95_of_100_cases():
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(2000):
    found = tasks.estimate(rng.random(300) < 0.6)
    inside += abs(found.mean - 0.6) <= found.half
  assert 0.93 < inside / 2000 < 0.97


def test_one_row_has_no_interval():
  assert math.isnan(tasks.estimate([1.0]).half)


# ---------------------------------------------------------------------------------------------------------------------
# The sets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "choices"), [
    ("piqa", 1500, 2), ("boolq", 3270, 2), ("siqa", 1954, 3), ("openbookqa", 500, 4), ("commonsenseqa", 1220, 5),
    ("mmlu", 2850, 4), ("logiqa", 1000, 4)])
def test_every_row_of_a_set_is_a_question(name: str, rows: int, choices: int):
  read = questions.read(name)
  assert len(read) == rows
  assert {len(q.choices) for q in read} == {choices}
  assert {q.gold for q in read} == set(range(choices))
  share = np.bincount([q.gold for q in read]) / rows
  assert share.min() > 0.5 / choices and share.max() < 1.5 / choices
  assert all(q.context.strip() and all(q.choices) for q in read)
  assert questions.read(name, 3) == read[:3]


def test_wordings():
  first = questions.read("piqa", 1)[0]
  assert first == Question("Question: dresser\nAnswer:",
                           ("replace drawer with bobby pin", "finish, woodgrain with bobby pin"), 1)
  boolq = questions.read("boolq", 1)[0]
  assert boolq.context.endswith("\nQuestion: does ethanol take more energy make that produces?\nAnswer:")
  assert (boolq.choices, boolq.gold) == (("no", "yes"), 0)
  siqa = questions.read("siqa", 1)[0]
  assert siqa.context.startswith("Q: Tracy didn't") and siqa.context.endswith("before this?\nA:")
  letters = questions.read("commonsenseqa", 1)[0]
  assert letters.context.endswith("at a what?\nA. bank\nB. library\nC. department store\nD. mall\nE. new york\nAnswer:")
  assert letters.choices == tuple("ABCDE")
  assert "\nChoices:\nA. Civic Park is" in questions.read("logiqa", 1)[0].context


def test_options_are_taken_apart():
  assert questions.options("\nA. one\nB.  two  words \nC. with\na line") == ("one", "two words", "with a line")
  for wrong in ("", "one", "B. one\nA. two", "A. one\nC. two", "A. \nB. two"):
    assert questions.options(wrong) is None
