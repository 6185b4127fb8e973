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
