"""ROUGE against values worked out by hand, and what happens to texts without words."""

import numpy as np
import pytest

from moeq_jax.evaluate import rouge


def test_scores_equal_hand_computed_ones():
  # Words 3 of 3 and 3 of 6 in common; bigrams 2 of 2 and 2 of 5; longest common subsequence 3.
  one = rouge.measure(["the cat sat"], ["the cat sat on the mat"]).scores[0]
  np.testing.assert_allclose(one, [2 * 1 * 0.5 / 1.5, 2 * 1 * 0.4 / 1.4, 2 * 1 * 0.5 / 1.5], rtol=1e-12)
  # Reversed words: all of them in common, no bigram, a subsequence of one.
  two = rouge.measure(["a b c"], ["c b a"]).scores[0]
  np.testing.assert_allclose(two, [1.0, 0.0, 1 / 3], rtol=1e-12)


def test_a_word_counts_as_often_as_both_sides_have_it():
  # "the" once of four in the generation, once of two in the reference: precision 1/4, recall 1/2.
  score = rouge.measure(["the the the the"], ["the dog"]).scores[0]
  np.testing.assert_allclose(score[0], 2 * 0.25 * 0.5 / 0.75, rtol=1e-12)


def test_rouge_lsum_matches_sentence_by_sentence():
  """Two sentences in the other order: a subsequence over the whole text finds one of them, one per sentence both."""
  scores = rouge.measure(["the dog ran. a cat sat."], ["a cat sat. the dog ran."]).scores[0]
  np.testing.assert_allclose(scores, [1.0, 4 / 5, 1.0], rtol=1e-12)  # bigrams: 5 on each side, that across differs
  assert rouge.sentences("One. Two! Three? 3.5 is no end.") == "One.\nTwo!\nThree?\n3.5 is no end."


def test_words_are_not_stemmed_and_case_does_not_matter():
  assert rouge.measure(["Returns"], ["return"]).scores[0, 0] == 0.0
  assert rouge.measure(["RETURN"], ["return"]).scores[0, 0] == 1.0


def test_empty_generations_score_zero_and_count():
  found = rouge.measure(["", " \n", "...", "right words"], ["some words", "a", "b", "right words"])
  assert found.empty == 3
  np.testing.assert_array_equal(found.scores[:3], 0.0)
  np.testing.assert_array_equal(found.scores[3], 1.0)
  assert found.scores.mean(axis=0)[0] == 0.25  # they stay in the mean


@pytest.mark.parametrize("reference", ["", "...", "日本"])
def test_a_reference_without_words_is_named(reference: str):
  with pytest.raises(rouge.RougeError, match="reference 1"):
    rouge.measure(["a", "b"], ["a", reference])


def test_as_many_generations_as_references_are_needed():
  with pytest.raises(rouge.RougeError, match="2 generations for 1 references"):
    rouge.measure(["a", "b"], ["a"])
  with pytest.raises(rouge.RougeError, match="at least one"):
    rouge.measure([], [])
