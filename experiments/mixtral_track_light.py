"""The Mixtral track for a model of a hundred million parameters: no measured damage, shorter and fewer sequences.

Damage measures every expert alone, which takes more than an hour for the 240 of SmolLM2-135M split into experts; all
else of experiments/mixtral_track.py is here.

Command:   ./launch.sh sweep --config=experiments/mixtral_track_light.py --config.checkpoint=runs/train_split/model \
             --workdir=runs/mixtral_track/smollm2-split
Hardware:  2 CPU cores, 6 GiB
Expected:  about three minutes a point; docs/mixtral_track.md, "What came out: SmolLM2, split"
"""

import ml_collections

from configs import common
from experiments import mixtral_track


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base; `arg` may be `smoke`."""
  config = mixtral_track.get_config(arg)
  config.file = "experiments/mixtral_track_light.py"
  if not common.parse_arg(arg, smoke=False).smoke:
    config.update(length=128, evaluation=8)
  return config


def sweep(add) -> None:
  """The points of mixtral_track, the first without measured damage."""
  mixtral_track.sweep(lambda point: add({name: value for name, value in point.items() if name != "damage.sequences"}))
