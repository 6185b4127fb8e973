"""The allocate benchmark agrees with HiGHS, reports a limit that was hit, and prints nothing after its table."""

import json

from moeq_jax.bench import allocate


def test_both_solvers_agree_on_every_instance(capfd):
  result = allocate.run(units=48, repeats=1)
  assert len(result["results"]) == sum(len(case.seeds) for case in allocate.CASES)
  assert result["equal"] == result["compared"] == len(result["results"])
  for row in result["results"]:
    assert row["units"] == 48 and row["equal"] is True and row["highs_status"] == "optimal"
    assert row["ratio_to_highs"] == row["highs_seconds"] / row["seconds"]
    assert 0 <= row["relative_gap"] < 1e-10 and row["unused_budget"] >= 0
  assert json.loads(json.dumps(result)) == result
  printed = capfd.readouterr().out
  assert printed.count("yes") == len(result["results"]) and "Highs" not in printed


def test_a_time_limit_is_reported():
  case = allocate.CASES[-1]
  cost, weight, budget = case.instance(0)
  _, status, seconds = allocate.highs(cost, weight, budget, limit=1e-3)
  assert status == "time limit" and seconds < 5


def test_many_rows_get_a_certified_gap_and_highs_its_largest_instance(capfd):
  result = allocate.run(units=1 << 18, repeats=1, highs_seconds=0.3)
  large = result["large"]
  assert large["units"] == 1 << 18 and large["method"] == "lagrangian"
  assert 0 <= large["relative_gap"] <= 1e-6 and 0 <= large["share_of_budget_unused"] < 1e-6
  assert large["bound"] <= large["value"]
  assert [row["units"] for row in result["highs"]] == [4096 * 2**i for i in range(len(result["highs"]))]
  assert [row["highs_status"] for row in result["highs"]][-1] == "time limit"
  for row in result["highs"]:
    exact, ours = row["exact"], row["lagrangian"]
    assert ours["bound"] <= exact["value"] <= ours["value"] <= exact["value"] * (1 + 1e-6)
    if row["highs_status"] == "optimal":
      assert abs(exact["value"] - row["highs_value"]) <= 1e-9 * exact["value"]
  assert json.loads(json.dumps(result)) == result
  assert "Highs" not in capfd.readouterr().out
