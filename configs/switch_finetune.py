"""Fine-tunes the small Switch Transformer on pairs of text and summary, with three seeds.

Command:   ./launch.sh sweep --config=configs/switch_finetune.py --workdir=runs/switch/finetuned
           (after configs/switch_pretrain.py with --workdir=runs/switch/pretrained)
Hardware:  2 CPU cores, 4 GiB
Expected:  about eight minutes a seed; docs/switch_track.md has the losses
Options:   --config.checkpoint=DIR is where the pre-trained model lies
A killed run continues with the same command. `:smoke` shrinks a seed to a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "switch_finetune"
  config.seed = 0  # of the order of the pairs
  config.checkpoint = "runs/switch/pretrained/model"

  config.balance = 0.01
  config.z = 0.001
  config.capacity = "sequence"
  config.compute_dtype = "bfloat16"

  config.mixture = ml_collections.ConfigDict(dict(code=0.5, wiki=0.5))
  config.inputs = 64  # tokens of a text, the end of the text included; longer ones are cut
  config.targets = 32  # of a summary
  config.batch = 64
  config.steps = 360
  config.decay_steps = 360  # of the learning rate
  config.warmup = 20
  config.peak_rate = 1e-3
  config.end_rate = 1e-4
  config.weight_decay = 0.01
  config.log_every = 10
  config.save_every = 60
  config.held_out_pairs = 192  # of each domain

  if arg.smoke:
    config.update(batch=4, inputs=32, targets=16, steps=10, decay_steps=10, warmup=2, log_every=5, save_every=5,
                  held_out_pairs=8)
  return config


def sweep(add) -> None:
  """One point per seed."""
  for seed in range(3):
    add({"seed": seed})
