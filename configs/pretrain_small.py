"""Pre-trains moeq-small, the shipped Mixture-of-Experts model, from random weights.

Command:   ./launch.sh run --config=configs/pretrain_small.py --workdir=runs/pretrain_small
Hardware:  2 CPU cores, 5 GiB
Expected:  about an hour and a half; held-out losses in experiments/models/moeq-small/README.md
A killed run continues with the same command. `:smoke` shrinks it to a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "pretrain"
  config.seed = 0

  config.model = ml_collections.ConfigDict(
      dict(vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
           num_key_value_heads=2, head_dim=64, num_local_experts=16, num_experts_per_tok=2,
           max_position_embeddings=256, rope_theta=10_000.0, tie_word_embeddings=True)
  )
  config.balance = 0.002  # weak: experts may specialise, and some see few tokens
  config.compute_dtype = "bfloat16"

  config.mixture = ml_collections.ConfigDict(dict(code=0.8, wiki=0.1, passages=0.1))
  config.batch = 32
  config.length = 256
  config.steps = 1536  # 12.6 million tokens
  config.warmup = 100
  config.peak_rate = 2e-3
  config.end_rate = 1e-4
  config.weight_decay = 0.1
  config.log_every = 16
  config.save_every = 64
  config.held_out_sequences = 128  # per domain

  if arg.smoke:
    config.model.update(vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                        num_local_experts=4, head_dim=16, num_attention_heads=2, num_key_value_heads=1)
    config.update(batch=4, length=64, steps=20, warmup=5, log_every=5, save_every=10, held_out_sequences=4)
    config.mixture = ml_collections.ConfigDict(dict(wiki=0.5, passages=0.5))
  return config
