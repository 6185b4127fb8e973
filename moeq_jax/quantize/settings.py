"""What a config of the task `quantize` may say, checked before any work."""

import ml_collections

from moeq_jax import codecs, user_text
from moeq_jax.allocate import methods
from moeq_jax.quantize import blocks, exports, room


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in the config, so that they are not found after hours of work.

  Raises:
    ValueError: names the field and the remedy.
  """
  if not config.checkpoint and not config.dry_run:
    raise ValueError("config.checkpoint: no checkpoint given; --config.checkpoint=DIR names a directory in Hugging"
                     " Face's format")
  if config.compute_dtype not in ("float32", "bfloat16"):
    raise ValueError(f"config.compute_dtype={config.compute_dtype!r}: it is 'float32' or 'bfloat16'")
  if config.missing_routers not in ("error", "norm"):
    raise ValueError(f"config.missing_routers={config.missing_routers!r}: it is 'error', or 'norm' to rank by the"
                     " final norm")
  if config.seed < 0 or config.batch < 1 or config.length < 2:
    raise ValueError(f"config.seed={config.seed}, config.batch={config.batch}, config.length={config.length}: a seed is"
                     " at least 0, a batch at least 1 sequence, a sequence at least 2 tokens")
  if (config.budget is None) == (not config.memory):
    raise ValueError("one of --config.budget=BITS (average bits per expert weight, like 2.5) and --config.memory=SIZE"
                     " (of the quantized files, like 20GiB) is needed" + (", not both" if config.memory else ""))
  if config.memory:
    room.parse_bytes(config.memory)
  codec = codecs.get(config.codec)
  codec.check_widths(config.widths)
  middle = sum(config.widths) / max(len(config.widths), 1)
  methods.check([config.method], [middle if config.memory else config.budget], tuple(config.widths))
  if config.sequential and not codec.needs_moment:
    raise ValueError(f"config.sequential: {codec.name} does not look at inputs, so it makes no difference; leave it"
                     " out")
  blocks.check(config.method, codec, exports.kinds(config.export))
  exports.check(config.export, codec.spec.grid, codec.name)
  user_text.check(config)
