"""Which claims of arXiv 2604.06515 about Mixtral hold in small models that differ from each other?

Claims under test: experts whose router norm changed little need the bits (so that the rule beats its reverse, random
orders and uniform widths at the same budget); MaxVar finds those that the norm misses; three levels and the paper's
counts are better than two, or than the code's; and all this does not hang on the group, on a quantized router, on
sequential calibration or on the calibration windows. One factor at a time is changed from a base: GPTQ, group 64, two
levels, 2.5 bits, routers as stored, one encoding for all plans, calibration windows of set 0.

Command:   ./launch.sh sweep --config=experiments/mixtral_track.py --workdir=runs/mixtral_track/moeq-small
           the same for other models, each in a folder of its name: --config.checkpoint=DIR
           PYTHONPATH=. .venv/bin/python -m experiments.mixtral_track_summary runs/mixtral_track
Hardware:  2 CPU cores, 4 GiB
Expected:  docs/mixtral_track.md
Options:   fields as in configs/quickstart.py; `:smoke` is the fewest plans and tokens. The order wants
           router_init.safetensors beside the checkpoint (the routers from before training)
"""

import ml_collections

from configs import common, quickstart

RULE = "tiers(router_norm_change)"
REVERSE = "tiers(router_norm_change, reverse=True)"
THREE = ("tiers(router_norm_change, levels=3)", "tiers(router_norm_change, levels=3, variant='code')")
ORDERS = ("uniform", "random", RULE, REVERSE, "tiers(router_norm_change, zeta=0)",
          "tiers(router_norm_change, variant='code')", *THREE, "tiers(frequency)", "knapsack(router_grad_error)")
SCORES = ("router_norm_change", "router_norm", "max_var", "frequency", "router_grad", "weight_mse", "fisher_error")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base, with the two orders that every factor is measured on; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = quickstart.get_config("smoke" if arg.smoke else None)
  config.file = "experiments/mixtral_track.py"  # the report names it in the command that remakes it
  config.methods = ("uniform", RULE, REVERSE)
  config.budgets = (2.5,)
  config.widths = (1, 2, 3)
  config.scores = SCORES
  config.draws = 2
  config.export = ()
  config.router_bits = 16
  config.sequential = False
  config.calibration_set = 0
  config.damage.sequences = 0
  if not arg.smoke:
    config.calibration = 16
  return config


def sweep(add) -> None:
  """All orders with measured damage, each factor alone, and other budgets; what says most comes first."""
  add({"methods": ORDERS, "damage.sequences": 12})
  add({"router_bits": 4})
  for number in (1, 2):
    add({"calibration_set": number})
  add({"sequential": True})
  add({"codec": "gptq(group=128)"})
  add({"methods": ("uniform", RULE, REVERSE, *THREE), "budgets": (1.75, 2.0)})
