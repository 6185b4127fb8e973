"""Mixtral-8x7B by the rule of arXiv 2604.06515: a row of its table, or a dry run of it.

Command:   ./launch.sh run --config=configs/paper/mixtral_8x7b.py:method=ours,bits=2.5 --config.checkpoint=DIR
               --config.calibration.text=WIKITEXT2-TRAIN.txt --config.evaluation.text=WIKITEXT2-TEST.txt --workdir=OUT
           then, for the table's column, in an environment with lm-evaluation-harness: python -m
               moeq_jax.evaluate.lm_eval run --model moeq --model_args checkpoint=OUT/quantized,python=.venv/bin/python
               --tasks piqa,boolq,arc_challenge,arc_easy,hellaswag,winogrande,mmlu,mathqa
           ./launch.sh run --config=configs/paper/mixtral_8x7b.py --config.dry_run=True   (no checkpoint needed)
Hardware:  2 CPU cores, 32 GiB of memory (a quarter of the sequences takes 16), 150 GB of disk; no accelerator
Expected:  not run by us. About 40 hours by the dry run's estimate, two thirds of them GPTQ, and the tasks besides;
           68.38 points at 2.5 bits (published, one run, no interval). Check full precision first: it must give
           72.72, or the tasks are not those of the table.
Options:   method=ours or uniform; bits as in the table (3, 2.75, 2.5, 2.25, 2.125, 2); levels=2 or 3 (by default two
           above 2 bits); variant=code (default) or paper; official=True takes the official code's weaker GPTQ
Differs:   attention, router and all else stay in bfloat16, where the official code quantizes them to 4 bits; text is
           what you give (the published calibration is 128 x 2048 tokens of WikiText-2 train, documents joined)
"""

import ml_collections

import configs.common
from configs.paper import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may hold `method`, `bits`, `levels`, `variant` and `official`."""
  arg = configs.common.parse_arg(arg, method="ours", bits=2.5, levels=0, variant="code", official=False)
  config = common.mixtral(common.MIXTRAL_8X7B, common.ROWS_8X7B, **arg)
  config.file = "configs/paper/mixtral_8x7b.py"
  return config
