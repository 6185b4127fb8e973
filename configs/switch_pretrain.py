"""Pre-trains a small Switch Transformer (encoder-decoder, 4 MoE layers of 32 experts) by span corruption.

Command:   ./launch.sh run --config=configs/switch_pretrain.py --workdir=runs/switch/pretrained
Hardware:  2 CPU cores, 5 GiB
Expected:  an hour and more; docs/switch_track.md has the losses. configs/switch_finetune.py goes on from it.
A killed run continues with the same command. `:smoke` shrinks it to a minute.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "switch_pretrain"
  config.seed = 0

  config.model = ml_collections.ConfigDict(  # 14.2 million weights in experts
      dict(vocab_size=4096, d_model=192, d_kv=48, d_ff=288, num_layers=4, num_decoder_layers=4, num_heads=4,
           num_experts=32, expert_capacity=64, encoder_sparse=(1, 3), decoder_sparse=(1, 3), tie_word_embeddings=False))
  config.sentinels = 32
  config.balance = 0.01
  config.z = 0.001
  config.capacity = "sequence"
  config.compute_dtype = "bfloat16"

  config.mixture = ml_collections.ConfigDict(dict(code=0.5, wiki=0.35, passages=0.15))
  config.density = 0.25  # more targets for the encoder's work than T5's 0.15
  config.endings = 0.25  # of the windows: their end is the target, one span (UL2's sequential denoising)
  config.repetitions = 0.25  # of the windows: the targets repeat a part of the input, so that the decoder reads it
  config.repeating_steps = 300  # the first ones, which have nothing else: learned late, reading is not learned
  config.batch = 32
  config.length = 112  # tokens of text: 93 of input, 38 targets, an end of text each
  config.steps = 6000  # 21.5 million tokens of text, some of it twice
  config.decay_steps = 6000  # of the learning rate
  config.warmup = 100
  config.peak_rate = 2e-3
  config.end_rate = 1e-4
  config.weight_decay = 0.01
  config.log_every = 10
  config.save_every = 100
  config.held_out_sequences = 128  # per domain

  if arg.smoke:
    config.model.update(vocab_size=512, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
                        num_experts=4, encoder_sparse=(1,), decoder_sparse=(1,))
    config.update(batch=4, length=64, steps=20, decay_steps=20, repeating_steps=5, warmup=5, log_every=5,
                  save_every=10, held_out_sequences=4)
    config.mixture = ml_collections.ConfigDict(dict(wiki=0.7, passages=0.3))
  return config
