"""Quantizes one checkpoint, layer by layer from disk to disk: the model never has to fit into memory.

Command:   ./launch.sh run --config=configs/quantize.py --config.checkpoint=DIR --config.budget=2.5 --workdir=OUT
           or, in place of a budget in bits, --config.memory=20GiB: all files of the quantized model fit into it
Hardware:  memory for one layer as stored, and about as much again (Mixtral-8x7B: 2.9 GB a layer); no accelerator
Expected:  OUT/quantized, which `generate` and `evaluate` open, and OUT/report.html

The defaults are what did best in the comparison of methods (README.md, "Results"): GPTQ, and one knapsack over the
whole model on router gradient times weight error. That takes calibration text, a forward and a backward sweep, and
every expert encoded once at each width. Variants take less, separated by commas after the colon:

  configs/quantize.py:data_free   HQQ and the knapsack on weight error: no text, no tokenizer, no evaluation
  configs/quantize.py:deploy      what transformers opens: one symmetric 4-bit scheme, exported as compressed-tensors
                                  pack-quantized (the grid, `ct`, is chosen before encoding), and dequantized
  configs/quantize.py:blocks      widths by blocks of 64 neurons, and a score that tells neurons apart: what that brings
                                  is in docs/channelwise.md; opened by this project only
  configs/quantize.py:smoke       few and short sequences

Fields worth knowing, beside those above:

  method         uniform, tiers(SCORE), knapsack(SCORE, constraint=per_layer, widths=(2, 4)), ...
  codec          rtn, hqq or gptq, with group=32, 64, 128 or 0, and grid=ct for compressed-tensors
  calibration.text, evaluation.text       your own UTF-8 files; without them, text of the installed packages
  calibration.tokens, evaluation.tokens   .npy of token ids, for checkpoints without tokenizer.json
  calibration.sequences, evaluation.sequences, length, batch      how much of it; no sequence
                 is longer than the model has positions
  block          16, 32, 64 or 128: each block of so many neurons of each projection has a width of its own, in place
                 of whole experts; 0 for those (docs/channelwise.md; best with knapsack(fisher_error))
  sequential     GPTQ sees the inputs that the quantized layers before it give
  export         copies: "('hf',)", "('compressed-tensors',)", "('compressed-tensors(width=4)',)"
  pretrained     for tiers(router_norm_change): the checkpoint that this one was fine-tuned from, unless
                 router_init.safetensors is beside it; missing_routers=norm ranks by the final norm where neither
                 is there
  dry_run        checks every shape and prints memory, disk, sizes and hours; reads no weight
"""

import ml_collections
from ml_collections import config_dict

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may hold `data_free`, `blocks`, `deploy` and `smoke`."""
  arg = common.parse_arg(arg, data_free=False, blocks=False, deploy=False, smoke=False)
  config = ml_collections.ConfigDict()
  config.file = "configs/quantize.py"  # the report names it in the command that remakes it
  config.task = "quantize"
  config.seed = 0
  config.checkpoint = ""  # a directory in Hugging Face's format
  config.compute_dtype = "float32"

  config.budget = config_dict.placeholder(float)  # average nominal bits per expert weight
  config.memory = ""  # or what the quantized files may take together, like 20GiB
  config.method = "knapsack(router_grad_error)"
  config.codec = "gptq(group=64)"
  config.widths = (1, 2, 3, 4)
  config.block = 0
  config.sequential = False
  config.export = ()
  config.pretrained = ""
  config.missing_routers = "error"
  config.dry_run = False
  config.model = ml_collections.ConfigDict()  # sizes, where there is no checkpoint: for dry_run
  config.published = ml_collections.ConfigDict()  # numbers to compare with, shown by dry_run

  config.batch = 4
  config.length = 512
  config.calibration = ml_collections.ConfigDict(dict(sequences=64, text="", tokens=""))
  config.evaluation = ml_collections.ConfigDict(dict(sequences=24, text="", tokens=""))

  if arg.blocks:
    config.update(block=64, method="knapsack(fisher_error)")
  if arg.data_free:
    config.update(method="knapsack(weight_mse)", codec="hqq(group=64)")
    config.evaluation.sequences = 0
  if arg.deploy:
    if arg.blocks:
      raise ValueError("configs/quantize.py:blocks,deploy: compressed-tensors has one width for a projection of an"
                       " expert; take one of the two")
    config.update(method="uniform", codec="rtn(group=128, grid=ct)" if arg.data_free else "gptq(group=128, grid=ct)",
                  widths=(4,), budget=4.0, export=("compressed-tensors", "hf"))
  if arg.smoke:
    config.update(length=64)
    config.calibration.sequences, config.evaluation.sequences = 8, 8 * (config.evaluation.sequences > 0)
  return config
