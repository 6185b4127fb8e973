"""Does a small change of router norm say which experts of a Switch Transformer need bits?

The Switch track of arXiv 2604.06515 (its figure of ROUGE-2 against bits) on a model of our own. Claim under test: with
two widths and the same counts in every layer, experts ranked by a small norm change lose less than by frequency, gate
weight or at random, and MaxVar helps further. docs/switch_track.md says what came out.

Command:   ./launch.sh sweep --config=experiments/switch_track.py --workdir=runs/switch/track
           (after configs/switch_pretrain.py and configs/switch_finetune.py)
Hardware:  2 CPU cores, 4 GiB
Expected:  docs/switch_track.md; a killed sweep continues with the same command
Options:   --config.checkpoint=DIR with the run command for one model;
           `:smoke` is the fewest plans and pairs
"""

import ml_collections

from configs import common

SEEDS = 3


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may hold `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "switch_track"
  config.seed = 0  # of the random plans
  config.checkpoint = "runs/switch/finetuned/seed=0/model"
  config.pretrained = ""  # a checkpoint whose routers are those from before, in place of router_init.safetensors
  config.fall_back_to_norm = False  # rank by the final norm where the routers from before are not known
  config.compute_dtype = "float32"
  config.capacity = "sequence"

  config.codec = "hqq(group=0)"  # one scale for each output row, as in the paper's code
  config.widths = (2, 3)
  config.budgets = (2.0, 2.125, 2.25, 2.5, 2.75, 2.875, 3.0)
  config.methods = (
      "uniform",
      "tiers(router_norm_change, zeta=0)",
      "tiers(router_norm_change)",
      "tiers(router_norm_change, zeta=0, reverse=True)",
      "tiers(router_norm, zeta=0)",
      "tiers(frequency, zeta=0)",
      "tiers(gate_weight, zeta=0)",
      "knapsack(router_grad_error)",
      "knapsack(output_error)",
      "random",
  )
  config.draws = 20
  config.draws_written = 5  # of which the model writes summaries
  config.scores = ("router_norm_change", "router_norm", "frequency", "gate_weight", "max_var", "router_grad_error",
                   "output_error", "fisher_error")

  config.domains = ("code", "wiki")
  config.inputs = 64
  config.targets = 32
  config.most = 32  # new tokens of a summary
  config.batch = 96
  config.calibration = 384  # pairs of the training side
  config.evaluation = 192  # held-out pairs for the loss
  config.written = 96  # of which the model writes summaries
  config.damage = 192  # other held-out pairs
  config.damage_bits = 2

  if arg.smoke:
    config.update(budgets=(2.0, 2.5), draws=2, draws_written=1, batch=4, calibration=8, evaluation=8, written=4,
                  damage=8, most=8, inputs=32, targets=16,
                  methods=("uniform", "tiers(router_norm_change)", "random"))
  return config


def sweep(add) -> None:
  """One point per seed of the fine-tuning."""
  for seed in range(SEEDS):
    add({"checkpoint": f"runs/switch/finetuned/seed={seed}/model"})
