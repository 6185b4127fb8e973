"""A small quantized model for the tests of export: random codes, one dense block and two with three experts."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moeq_jax import qtensor
from moeq_jax.export import native

SHAPES = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}  # K, N
EXPERTS, GROUP, BLOCKS = 3, 32, 3
UNIFORM = {l: dict.fromkeys(SHAPES, (4, 4, 4)) for l in (1, 2)}
LAYERS = {1: dict.fromkeys(SHAPES, (2, 2, 2)), 2: dict.fromkeys(SHAPES, (3, 3, 3))}
MIXED = {1: dict.fromkeys(SHAPES, (2, 8, 2)), 2: {"gate": (3, 4, 2), "up": (3, 4, 2), "down": (3, 4, 8)}}
CT, AFFINE = "rtn(grid=ct, group=32)", "gptq(group=32)"
FILES = {"config.json": json.dumps({"dtype": "bfloat16", "hidden_size": 64}).encode(), "tokenizer.json": b"{}"}

Plan = Mapping[int, Mapping[str, tuple[int, ...]]]


def names(layer: int, expert: int, projection: str) -> str:
  """As Mixtral calls its experts."""
  letter = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
  return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{letter}.weight"


def packed(plan: Mapping[str, tuple[int, ...]], codec: str = CT, seed: int = 0,
           shapes: Mapping[str, tuple[int, int]] = SHAPES) -> dict[str, qtensor.QTensor]:
  """A block's experts with random codes, scales and, but for the grid `ct`, zeros."""
  rng, made = np.random.default_rng(seed), {}
  for name, bits in plan.items():
    (rows, columns), widths = shapes[name], np.array(bits)[:, None, None]
    groups = -(-rows // GROUP)
    codes = (rng.integers(0, 256, (len(bits), rows, columns)) % 2**widths).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (len(bits), groups, columns)).astype(ml_dtypes.bfloat16)
    zero = np.broadcast_to(2.0 ** (widths - 1), scale.shape) if "ct" in codec else rng.uniform(0, 3, scale.shape)
    made[name] = qtensor.pack(codes, np.array(bits), scale, zero.astype(ml_dtypes.bfloat16), group=GROUP)
  return made


def others() -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
  """All other tensors: of each block, and of none."""
  rng = np.random.default_rng(7)
  draw = lambda *shape: rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
  blocks = []
  for l in range(BLOCKS):
    blocks.append({f"model.layers.{l}.input_layernorm.weight": draw(64),
                   f"model.layers.{l}.self_attn.q_proj.weight": draw(64, 64),
                   f"model.layers.{l}.self_attn.q_proj.bias": draw(64)})
    feed = "mlp.gate_proj" if l == 0 else "block_sparse_moe.gate"
    blocks[l][f"model.layers.{l}.{feed}.weight"] = draw(8, 64)
  return blocks, {"lm_head.weight": draw(10, 64), "model.norm.weight": draw(64)}


def save(directory: Path, plan: Plan = UNIFORM, codec: str = CT,
         files: Mapping[str, bytes] = FILES) -> native.Quantized:
  """Writes the model and opens it."""
  blocks, top = others()
  experts = [packed(plan[l], codec, seed=l) if l in plan else {} for l in range(BLOCKS)]
  native.save(directory, experts, blocks, top, files, {"codec": codec, "plan": None, "source": "random"})
  return native.open(directory)


def weights(model: native.Quantized) -> dict[str, np.ndarray]:
  """Every expert's weight `[N, K]` float32 by name, from the codes by numpy alone."""
  found = {}
  for l in range(model.layers):
    for projection, q in model.layer(l)[0].items():
      codes = qtensor.unpack(q).astype(np.float32)
      scale, zero = (np.asarray(a, np.float32).repeat(q.group, axis=1)[:, : q.K] for a in (q.scale, q.zero))
      for e, weight in enumerate((codes - zero) * scale):
        found[names(l, e, projection)] = weight.T
  return found
