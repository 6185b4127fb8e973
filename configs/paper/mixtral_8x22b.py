"""Mixtral-8x22B by the rule of arXiv 2604.06515: a row of its table, or a dry run of it.

Command:   ./launch.sh run --config=configs/paper/mixtral_8x22b.py:method=ours,bits=2.25 --config.checkpoint=DIR
               --config.calibration.text=WIKITEXT2-TRAIN.txt --config.evaluation.text=WIKITEXT2-TEST.txt --workdir=OUT
           then the eight tasks as in configs/paper/mixtral_8x7b.py
           ./launch.sh run --config=configs/paper/mixtral_8x22b.py --config.dry_run=True   (no checkpoint needed)
Hardware:  2 CPU cores, 48 GiB of memory (a quarter of the sequences takes 24), 400 GB of disk; no accelerator
Expected:  not run by us. About 125 hours by the dry run's estimate, and the tasks besides; 59.17 points at 2.25 bits
           (published, one run, no interval), where full precision gives 76.31 and uniform 3 bits 65.48: their quantizer
           loses eleven points before any tiers
Options:   method=ours or uniform; bits as in the table (3, 2.5, 2.25, 2, 1.75); levels, variant, official as for 8x7B
"""

import ml_collections

import configs.common
from configs.paper import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may hold `method`, `bits`, `levels`, `variant` and `official`."""
  arg = configs.common.parse_arg(arg, method="ours", bits=2.25, levels=0, variant="code", official=False)
  config = common.mixtral(common.MIXTRAL_8X22B, common.ROWS_8X22B, **arg)
  config.file = "configs/paper/mixtral_8x22b.py"
  return config
