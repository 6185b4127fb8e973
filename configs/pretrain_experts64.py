"""Pre-trains moeq-experts64, a model of many small experts, for comparison with moeq-small.

Command:   ./launch.sh run --config=configs/pretrain_experts64.py --workdir=runs/pretrain_experts64
Hardware:  2 CPU cores, 4 GiB
Expected:  experiments/models/moeq-experts64/README.md
A killed run continues with the same command. `:smoke` shrinks it to a minute.

Four layers of 64 experts 64 wide, top-2. The balancing loss weighs five times as much as in moeq-small, and the prose
domains have three tenths of the text instead of a fifth. The text and the vocabulary are the same.
"""

import ml_collections

from configs import common, pretrain_small


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  config = pretrain_small.get_config(arg)
  config.balance = 0.01
  if common.parse_arg(arg, smoke=False).smoke:
    config.model.num_local_experts = 8
    return config
  config.model.update(hidden_size=192, intermediate_size=64, num_hidden_layers=4, num_attention_heads=3,
                      num_key_value_heads=1, num_local_experts=64, num_experts_per_tok=2)
  config.mixture = ml_collections.ConfigDict(dict(code=0.7, wiki=0.1, passages=0.2))
  config.steps = 736  # 6.0 million tokens
  config.warmup = 60
  config.peak_rate = 3e-3
  return config
