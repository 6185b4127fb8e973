"""Does the theory of arXiv 2604.06515 hold in the model it speaks of?

Claims under test, all for a two-layer expert-choice MoE (docs/theory.md has the model and the results): (i) Lambda of
irrelevant experts falls like 1 / sqrt(d); (ii) Lambda orders the relevant experts by the frequency of their token;
(iii) so do their activations, in the ratio (1 - alpha) / alpha; (iv) the experts of rare tokens need
log2((1 - alpha) / alpha) more bits for the same relative error; (v) with them at b_h and the others that much lower no
input is wrong.

Command:   ./launch.sh run --config=experiments/theory.py --workdir=runs/theory
Hardware:  2 CPU cores, 2 GiB
Expected:  an hour on busy cores; runs/theory/tables.md and figures/ (docs/theory.md)
Options:   `:smoke` one small setting of each design with two seeds, in seconds
"""

import ml_collections

from configs import common

ALPHAS = (0.2, 0.1, 0.05)
DIMS = (128, 256, 512, 1024, 2048)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `smoke`."""
  arg = common.parse_arg(arg, smoke=False)
  config = ml_collections.ConfigDict()
  config.task = "theory"
  config.file = "experiments/theory.py"
  config.seeds = 20
  config.bases = 1  # random bases of each seed
  config.test = 2048  # inputs
  config.every = 5  # steps between two tests
  config.most = 4000  # steps of training
  config.quantized = (
      *(f"B(alpha={alpha})" for alpha in ALPHAS),  # to the first 100% test accuracy
      *(f"B(alpha={alpha}, margin=0.05)" for alpha in ALPHAS),  # to a margin that quantization can spend
      *(f"A(alpha={alpha})" for alpha in ALPHAS),
      *(f"B(alpha={alpha}, dim=2048)" for alpha in ALPHAS[1:]),  # nearer to equal MaxVar
  )
  # Lambda against d: to the first 100%, to a margin of 0.05, and that again with routers of equal norm at the start;
  # and one training that goes on long after the hinge saturated.
  config.trained = (
      *(f"B(alpha=0.1, dim={dim})" for dim in DIMS[:-2]),
      *(f"B(alpha=0.1, dim={dim}, margin=0.05)" for dim in DIMS if dim != 1024),
      *(f"B(alpha=0.1, dim={dim}, margin=0.05, router_init={0.01 * (1024 / dim) ** 0.5:.6f})"
        for dim in (128, 512, 2048)),
      "B(alpha=0.1, margin=0.5)",
  )
  if arg.smoke:
    small = "dim=64, tokens=6, batch=64, init=0.02"
    config.update(seeds=2, bases=1, test=256, most=1000, trained=(f"B(alpha=0.2, {small.replace('64', '32', 1)})",),
                  quantized=(f"A(alpha=0.2, {small})", f"B(alpha=0.2, {small})"))
  return config


def sweep(add) -> None:
  """One point: all settings are in one run, which goes on where it was."""
  add({})
