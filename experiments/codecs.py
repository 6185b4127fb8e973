"""Does the choice of codec and group change which allocation wins?

Claim under test: the knapsack on measured errors beats uniform widths under every codec, and a better codec (GPTQ)
leaves it less to win.

Command:   ./launch.sh sweep --config=experiments/codecs.py --workdir=runs/codecs
Hardware:  2 CPU cores, 3 GiB
Expected:  about four minutes; each point's folder holds its own report
"""

import ml_collections

from configs import quickstart

CODECS = ("rtn(group=64)", "hqq(group=64)", "gptq(group=64)", "rtn(group=0)", "hqq(group=0)", "gptq(group=0)")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The quickstart with fewer methods and without measured damage; `arg` as there."""
  config = quickstart.get_config(arg)
  config.file = "experiments/codecs.py"  # the report names it in the command that remakes it
  config.methods = ("uniform", "knapsack(weight_mse)", "knapsack(output_error)", "knapsack(fisher_error)")
  config.budgets = (2.0, 2.5, 3.0)
  config.draws = 3
  config.damage.sequences = 0
  config.export = ()
  return config


def sweep(add) -> None:
  """One point per codec and group."""
  for codec in CODECS:
    add({"codec": codec})
