"""Random weights of the golden models, made alike where the golden files are made and where they are tested.

Nothing is stored: a tensor is a function of its Hugging Face name, its shape and the model's seed. numpy alone, so that
both environments can import it.
"""

from collections.abc import Sequence

import numpy as np

KINDS = {  # mean, standard deviation
    "weight": (0.0, 0.3), "norm": (1.0, 0.3), "router": (0.0, 1.0),
    "query": (0.0, 0.1),  # where attention is not scaled
    "gain": (3.0, 0.3),  # a wide norm before the logits, so that they differ
}


def tensor(name: str, shape: Sequence[int], seed: int, kind: str = "weight") -> np.ndarray:
  """A normal tensor in float32 whose values are bfloat16 numbers, so that a checkpoint of either type holds them.

  Args:
    name: of the tensor in the checkpoint; tensors of other names are other draws.
    shape: as in the checkpoint.
    seed: of the model.
    kind: a name in `KINDS`.
  """
  mean, deviation = KINDS[kind]
  drawn = np.random.default_rng([seed, *name.encode()]).normal(mean, deviation, tuple(shape)).astype(np.float32)
  return (drawn.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
