"""What the configs of the router-norm paper's tables share: the models' sizes and the published numbers.

The numbers are those of arXiv 2604.06515 as far as they could be found; docs/paper.md says where, and which of them
contradict each other. Memory is in the table's own count (`moeq_jax/allocate/accounting.py`).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import quantize

MIXTRAL_8X7B = dict(
    model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False)
MIXTRAL_8X22B = MIXTRAL_8X7B | dict(
    hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
    max_position_embeddings=65536)
SWITCH_BASE_64 = dict(
    model_type="switch_transformers", vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12,
    num_decoder_layers=12, num_heads=12, num_experts=64, expert_capacity=64, num_sparse_encoder_layers=6,
    num_sparse_decoder_layers=6, relative_attention_num_buckets=32, relative_attention_max_distance=128,
    tie_word_embeddings=True)

# Method, then bits: the table's memory and the mean accuracy of its eight zero-shot tasks, None where none was found.
Rows = Mapping[tuple[str, float], tuple[float | None, float | None]]
ROWS_8X7B: Rows = {
    ("fp16", 16.0): (96.8, 72.72), ("uniform", 3.0): (19.3, 70.85), ("uniform", 2.0): (13.1, 58.73),
    ("ours", 2.75): (17.7, 70.01), ("ours", 2.5): (16.1, 68.38), ("ours", 2.25): (14.5, 65.79),
    ("ours", 2.125): (13.8, 64.26), ("ours", 2.0): (13.1, 62.56),
    ("pmq", 2.75): (17.7, 69.85), ("pmq", 2.5): (16.1, 67.53), ("pmq", 2.25): (14.5, 65.16),
    ("pmq", 2.0): (13.1, 62.83),
    ("hessian", 2.5): (17.0, 67.18), ("hessian", 2.25): (15.3, 63.47), ("hessian", 2.0): (13.6, 58.85),
    ("bsp", 2.5): (17.0, 49.07), ("slim_llm", 2.0): (13.6, 44.49),
}
ROWS_8X22B: Rows = {
    ("fp16", 16.0): (281.2, 76.31), ("uniform", 3.0): (57.5, 65.48), ("uniform", 2.0): (38.6, 36.53),
    ("ours", 2.5): (46.7, 60.10), ("ours", 2.25): (43.0, 59.17), ("ours", 2.0): (38.6, 55.34),
    ("ours", 1.75): (35.2, 51.44),
    ("pmq", 2.5): (46.7, 60.69), ("pmq", 2.25): (43.0, 55.35), ("pmq", 2.0): (38.6, 54.80),
    ("pmq", 1.75): (35.2, 47.87),
}
# ROUGE-2 on CNN/DailyMail, digitised from a figure, +-0.02; full precision 19.87.
ROUGE_2: Mapping[tuple[str, float], float] = {
    ("uniform", 3.0): 19.84, ("uniform", 2.0): 17.45,
    **{("norm_change", b): r for b, r in ((2.125, 17.87), (2.25, 18.01), (2.5, 19.49), (2.75, 19.79), (2.875, 19.91))},
    **{("norm_change_maxvar", b): r
       for b, r in ((2.125, 19.01), (2.25, 19.05), (2.5, 19.35), (2.75, 19.61), (2.875, 19.81))},
    **{("frequency", b): r for b, r in ((2.125, 17.89), (2.25, 18.30), (2.5, 18.46), (2.75, 19.83), (2.875, 19.81))},
    **{("gate_weight", b): r for b, r in ((2.125, 18.03), (2.25, 18.18), (2.5, 18.10), (2.75, 18.30), (2.875, 19.81))},
}


def mixtral(model: Mapping[str, Any], rows: Rows, method: str, bits: float, levels: int, variant: str,
            official: bool) -> ml_collections.ConfigDict:
  """A row of a Mixtral table on the task `quantize`.

  Args:
    model: values of config.json.
    rows: the table.
    method: `ours` or `uniform`; the other methods of the table are numbers to compare with.
    bits: average nominal bits per expert weight.
    levels: of the tiers; 0 takes two above 2 bits, as the memory column does, and three at 2 bits and below.
    variant: of the tiers' rules, `code` or `paper`.
    official: the GPTQ variant of the official code in place of ours.

  Raises:
    ValueError: a method or bits that the table does not have, or a method that is not there to be run.
  """
  row = lookup(rows, method, bits)
  levels = levels or (2 if bits > 2 else 3)
  config = quantize.get_config()
  config.codec = "gptq_official(group=128)" if official else "gptq(group=128)"
  config.widths = (1, 2, 3)
  config.method = "uniform"
  if method == "ours":
    options = [f"levels={levels}"] * (levels != 2) + [f"variant={variant}"] * (variant != "paper")
    config.method = f"tiers({', '.join(['router_norm', *options])})"
  elif method != "uniform":
    raise ValueError(f"method={method}: {row[1]} points at {bits:g} bits are a number to compare with; run 'ours' or"
                     " 'uniform', or any method of the project by --config.method")
  config.budget = bits
  config.sequential = True  # each layer sees what the quantized ones before it give
  config.batch, config.length = 4, 2048
  config.calibration.sequences, config.evaluation.sequences = 128, 128
  config.model = ml_collections.ConfigDict(dict(model))
  published = {"memory_gb": row[0], "mean_accuracy_of_8_tasks": row[1]}
  config.published = ml_collections.ConfigDict({name: value for name, value in published.items() if value is not None})
  return config


def lookup(rows: Mapping[tuple[str, float], Any], method: str, bits: float) -> Any:
  """The row of a table.

  Raises:
    ValueError: it has no such row; lists those of the method, or the methods.
  """
  if (method, bits) in rows:
    return rows[method, bits]
  have = [b for name, b in rows if name == method]
  if not have:
    raise ValueError(f"method={method}: the table has {', '.join(dict.fromkeys(name for name, _ in rows))}")
  raise ValueError(f"bits={bits:g}: the table has {method} at {', '.join(f'{b:g}' for b in have)}; any other budget is"
                   " set by --config.budget")
