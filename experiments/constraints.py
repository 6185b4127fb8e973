"""What does it cost that a file or a kernel wants one width for several matrices?

Claim under test: most of what mixed precision wins is in the choice between experts. Widths of their own for the
projections of an expert add little; one width for all experts of a layer loses most of it. On moeq-small it holds
(experiments/LOG.md, 2026-11-23).

Command:   ./launch.sh run --config=experiments/constraints.py --workdir=runs/constraints
Hardware:  2 CPU cores, 3 GiB
Expected:  about five minutes; runs/constraints/report.html, section "What deployability costs"
Options:   as in configs/quickstart.py
"""

import ml_collections

from configs import quickstart

CONSTRAINTS = ("none", "gate_equals_up", "expert", "per_layer_projection", "per_layer")
SCORES = ("router_grad_error", "output_error", "fisher_error")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The quickstart with three scores under every constraint, on four times as much held-out text; `arg` as there."""
  config = quickstart.get_config(arg)
  config.file = "experiments/constraints.py"  # the report names it in the command that remakes it
  config.methods = ("uniform", *(f"knapsack({score}, constraint={name})" for score in SCORES for name in CONSTRAINTS))
  config.budgets = (2.0, 2.5)
  config.scores = SCORES
  config.evaluation *= 4
  config.damage.sequences = 0
  config.export = ()
  return config


def sweep(add) -> None:
  """One point: all constraints are in one comparison."""
  add({})
