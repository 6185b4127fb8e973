"""Quantizes moeq-small, the model that comes with the project, by every method, and reports what each plan costs.

Command:   ./launch.sh            (which is ./launch.sh quickstart)
Hardware:  2 CPU cores, 3 GiB
Expected:  under 5 minutes; runs/quickstart/report.html
Options:   --config.checkpoint=DIR takes another checkpoint; --config=configs/quickstart.py:score=NAME adds a score to
           the report and the knapsack on it to the methods; `:norm=router_norm` ranks by the final router norms, for a
           checkpoint without router_init.safetensors; `:smoke` is the fewest plans and tokens, for a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may hold `smoke`, `score=NAME` and `norm=NAME`."""
  arg = common.parse_arg(arg, smoke=False, score="", norm="router_norm_change")
  config = ml_collections.ConfigDict()
  config.file = "configs/quickstart.py"  # the report names it in the command that remakes it
  config.task = "compare"
  config.seed = 0
  config.checkpoint = "experiments/models/moeq-small"
  config.compute_dtype = "float32"

  config.codec = "gptq(group=64)"
  config.widths = (1, 2, 3, 4)
  config.budgets = (1.5, 2.0, 2.5, 3.0)  # average nominal bits per expert weight
  config.methods = (
      "uniform",
      "random",
      f"tiers({arg.norm})",
      f"tiers({arg.norm}, levels=3)",
      f"tiers({arg.norm}, reverse=True)",
      "tiers(frequency)",
      "knapsack(weight_mse)",
      "knapsack(router_grad_error)",
      "knapsack(output_error)",
      "knapsack(fisher_error)",
      "knapsack(damage)",
  )
  config.draws = 5  # plans of each random method
  config.scores = (*dict.fromkeys((arg.norm, "router_norm")), "router_grad", "max_var", "frequency", "gate_weight",
                   "weight_mse", "router_grad_error", "output_error", "fisher_error")
  config.export = (("knapsack(router_grad_error)", 2.5),)

  config.domains = ("code", "wiki", "passages")
  config.length = 256
  config.batch = 12
  config.calibration = 32  # sequences of each domain
  config.evaluation = 12
  config.damage = ml_collections.ConfigDict(dict(sequences=12, bits=2))

  if arg.smoke:
    config.update(budgets=(2.5,), methods=("uniform", f"tiers({arg.norm})", "knapsack(router_grad_error)"),
                  scores=(arg.norm, "router_grad_error"), draws=2, domains=("wiki",), calibration=8,
                  evaluation=8, batch=8, export=(("knapsack(router_grad_error)", 2.5),))
    config.damage.sequences = 0
  if arg.score:
    config.scores = (*config.scores, arg.score)
    config.methods = (*config.methods, f"knapsack({arg.score})")
  return config
