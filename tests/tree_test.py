import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moeq_jax import tree


class Model(nnx.Module):
  def __init__(self):
    self.embedding = nnx.Param(jnp.ones((4, 2)))
    self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)])
    self.plain = jnp.ones(2)


NAMES = ["embedding", "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "plain"]


def test_names_do_not_depend_on_how_a_module_is_held():
  model = Model()
  assert tree.names(model) == NAMES
  assert tree.names(nnx.state(model)) == NAMES
  assert tree.names(nnx.to_pure_dict(nnx.state(model))) == NAMES
  model.embedding = jnp.zeros((4, 2))  # a parameter replaced by a bare array
  assert tree.names(model) == NAMES


def test_names_follow_the_order_of_the_leaves():
  values = {"b": [1, 2], "a": {"value": 3, "x": 4}}
  assert dict(zip(tree.names(values), jax.tree.leaves(values), strict=True)) == {
      "a/value": 3, "a/x": 4, "b/0": 1, "b/1": 2}


def test_two_leaves_of_one_name_are_refused():
  with pytest.raises(ValueError, match="several leaves have the name 'a/b'"):
    tree.names({"a": {"b": 1}, "a/b": 2})


def test_the_first_match_wins_and_every_match_is_returned():
  rules = [(r".*/bias", 16), (r"layers/0/.*", 4), (r"layers/\d+/.*", 2), (".*", 8)]
  assert tree.match(rules, NAMES) == {
      "embedding": 8, "layers/0/bias": 16, "layers/0/kernel": 4, "layers/1/bias": 16, "layers/1/kernel": 2, "plain": 8}
  assert list(tree.match(rules, NAMES)) == NAMES


def test_a_rule_matches_whole_names():
  with pytest.raises(tree.RuleError):
    tree.match([("layers", 1)], ["layers/0"])


def test_a_value_may_be_none():
  assert tree.match([("a", None), (".*", 1)], ["a", "b"]) == {"a": None, "b": 1}


def test_uncovered_names_are_all_named():
  with pytest.raises(tree.RuleError, match=r"no rule covers embedding, plain \(rules: layers/\.\*\)"):
    tree.match([("layers/.*", 4)], NAMES)
  with pytest.raises(tree.RuleError, match="rules: none"):
    tree.match([], ["a"])


def test_a_broken_expression_is_named():
  with pytest.raises(tree.RuleError, match=r"rule '\(' is not a regular expression"):
    tree.match([("(", 1)], [])


@hypothesis.given(st.lists(st.tuples(st.sampled_from(["a.*", ".*b", "a", "[ab]+", "c"]), st.integers())),
                  st.lists(st.text("abc", min_size=1, max_size=3), unique=True))
def test_match_agrees_with_trying_every_rule(rules, names):
  first = {n: next((v for p, v in rules if re.fullmatch(p, n)), "uncovered") for n in names}
  if "uncovered" in first.values():
    with pytest.raises(tree.RuleError):
      tree.match(rules, names)
  else:
    assert tree.match(rules, names) == first
