"""The dequantized checkpoint: any tool opens it; of the size of the source, with the weights of the quantized model."""

from pathlib import Path

import numpy as np

from moeq_jax import artifacts, progress
from moeq_jax.export import native, shard_writer


def save(model: native.Quantized, directory: str | Path, names: shard_writer.Names, *, dtype: str | None = None,
         shard_bytes: int = shard_writer.SHARD_BYTES, advance: progress.Advance = lambda: None) -> Path:
  """Writes a quantized model as a Hugging Face checkpoint, in the memory of one packed block and one shard.

  Every expert is a tensor of its own, dequantized in float32 and rounded to the dtype of the source; all other tensors,
  config.json and the tokenizer files are those of the source.

  Args:
    model: the quantized model.
    directory: must not be there, or be empty; appears when all of it is written.
    names: how experts are called in the source.
    dtype: of the experts in the source, one of `shard_writer.DTYPES`; None: as config.json says.
    shard_bytes: most bytes of a file, unless a single tensor has more.
    advance: called after each of `model.layers + 1` parts.

  Returns:
    `directory`.

  Raises:
    shard_writer.ExportError: the directory is not empty, an unknown dtype, a weight too large for float16.
    native.QuantizedError: a file of the model is missing or damaged.
  """
  directory, kind = Path(directory), shard_writer.dtype_of(model.config, dtype)
  with shard_writer.new_directory(directory) as place:
    writer = shard_writer.ShardWriter(place, shard_bytes)
    for layer in range(model.layers):
      packed, others = model.layer(layer)
      for name, tensor in others.items():
        writer.add(name, tensor)
      for projection, q in packed.items():
        for expert in range(q.shape[0]):
          name = names(layer, expert, projection)
          writer.add(name, _weights(shard_writer.Expert.of(q, expert), kind, name).T)
      advance()
    for name, tensor in model.top().items():
      writer.add(name, tensor)
    writer.close()
    for name, content in model.files().items():
      artifacts.write_bytes(place / name, content)
    advance()
  return directory


def _weights(expert: shard_writer.Expert, dtype: np.dtype, name: str) -> np.ndarray:
  weights = expert.weights(dtype)
  if dtype == np.float16 and not np.isfinite(weights).all():
    raise shard_writer.ExportError(f"{name}: a weight does not fit float16; pass dtype='bfloat16'")
  return weights
