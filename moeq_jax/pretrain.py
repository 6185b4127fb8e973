"""The pre-training run: text, tokenizer, training, export. Part of the spine: it knows models and stages alike."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers

from moeq_jax import artifacts, data
from moeq_jax.models import convert, decoder, hf_config
from moeq_jax.train import loop


def _tokenizer(config: ml_collections.ConfigDict, workdir: Path) -> tokenizers.Tokenizer:
  path = workdir / "tokenizer.json"
  if not path.exists():
    documents = [d for d in data.training() if d.domain in config.mixture]
    tokenizer = data.train_tokenizer(documents, config.model.vocab_size)
    artifacts.write_bytes(path, tokenizer.to_str(pretty=True).encode())
  return tokenizers.Tokenizer.from_file(str(path))


def token_streams(config: ml_collections.ConfigDict, workdir: Path, tokenizer: tokenizers.Tokenizer,
                  end: int | None = None) -> dict[str, Any]:
  """The training tokens, with the token `end` after each document (by default the tokenizer's end of text); kept in
  `tokens.npz` because reading and encoding takes a minute."""
  path = workdir / "tokens.npz"
  key = artifacts.key("tokens", data.VERSION, list(config.mixture), {"tokenizer": artifacts.digest(tokenizer.to_str())})
  if path.exists():
    arrays, meta = artifacts.load_arrays(path)
    if meta["key"] == key:
      return {k: data.TokenStream(v.astype(np.int32), meta["bytes"][k]) for k, v in arrays.items()}
  streams = data.encode((d for d in data.training() if d.domain in config.mixture), tokenizer, end)
  width = np.min_scalar_type(tokenizer.get_vocab_size() - 1)
  compact = {k: s.tokens.astype(width) for k, s in streams.items()}
  artifacts.save_arrays(path, compact, {"key": key, "bytes": {k: s.bytes for k, s in streams.items()}})
  return streams


def held_out_losses(model: decoder.Decoder, streams: dict[str, data.TokenStream], *, count: int, length: int,
                    dtype: jnp.dtype) -> dict[str, dict[str, float]]:
  """Held-out loss per domain: `{domain: {"nats_per_token", "nats_per_byte", "tokens"}}`."""

  @jax.jit
  def losses(model: decoder.Decoder, tokens: jax.Array) -> jax.Array:
    return decoder.sequence_losses(model, tokens, dtype)

  result = {}
  for domain, stream in sorted(streams.items()):
    tokens = stream.sequences(count, length)
    step = math.gcd(count, 16)
    mean = np.mean([losses(model, jnp.asarray(tokens[i : i + step])) for i in range(0, count, step)])
    per_byte = float(mean) * len(stream.tokens) / stream.bytes
    result[domain] = {"nats_per_token": float(mean), "nats_per_byte": per_byte, "tokens": count * (length - 1)}
  return result


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Trains a model from random weights and writes it to `workdir/model` in Hugging Face's Mixtral format.

  `workdir/model` receives config.json, model.safetensors (bfloat16), tokenizer.json, router_init.safetensors (the
  routers before training, float32), training_log.jsonl and held_out.json. Killed at any moment and started again, the
  run continues after its last checkpoint and ends with the same files.
  """
  tokenizer = _tokenizer(config, workdir)
  streams = token_streams(config, workdir, tokenizer)
  model_config = hf_config.read(dict(config.model, model_type="mixtral"))
  dtype = jnp.dtype(config.compute_dtype)
  model = decoder.init(model_config, config.seed)
  out = workdir / "model"
  convert.save_routers(out / "router_init.safetensors", convert.routers(model))
  schedule = loop.Schedule(steps=config.steps, warmup=config.warmup, peak=config.peak_rate, end=config.end_rate,
                           weight_decay=config.weight_decay)
  model = loop.fit(
      model,
      functools.partial(decoder.training_loss, balance=config.balance, dtype=dtype),
      lambda step: data.batch(streams, config.mixture, step, size=config.batch, length=config.length, seed=config.seed),
      schedule,
      workdir,
      watch=lambda m: {"router_norm": np.round(np.linalg.norm(convert.routers(m), axis=-1), 5).tolist()},
      log_every=config.log_every,
      save_every=config.save_every,
  )
  convert.save(out, model, model_config)
  artifacts.write_bytes(out / "tokenizer.json", (workdir / "tokenizer.json").read_bytes())
  artifacts.write_bytes(out / "training_log.jsonl", (workdir / "log.jsonl").read_bytes())
  shipped, _ = convert.load(out)
  held_out = data.encode((d for d in data.held_out() if d.domain in config.mixture), tokenizer)
  losses = held_out_losses(shipped, held_out, count=config.held_out_sequences, length=config.length, dtype=jnp.float32)
  summary = {
      "held_out": losses,
      "tokens_trained": config.steps * config.batch * config.length,
      "tokens_in_text": {k: len(s.tokens) for k, s in streams.items()},
  }
  artifacts.write_json(out / "held_out.json", summary)
  print(json.dumps(summary, indent=1))
