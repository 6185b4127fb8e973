"""The training run: text, tokenizer, training, export. Part of the spine: it knows models and stages alike.

It begins with random weights, or goes on with a checkpoint that the config names.
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers

from moeq_jax import artifacts, data, registry
from moeq_jax.models import convert, decoder, hf_config
from moeq_jax.train import loop

# What `config.text` may name, functions of `data`: all of the training text, or the part of it that is read in seconds.
TEXTS = ("training", "calibration")


def _documents(config: ml_collections.ConfigDict) -> Iterator[data.Document]:
  name = config.get("text", "training")
  if name not in TEXTS:
    raise ValueError(f"config.text={name!r}{registry.did_you_mean(name, TEXTS)}: it is one of {', '.join(TEXTS)}")
  return (d for d in getattr(data, name)() if d.domain in config.mixture)


def _text_key(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What the text's name adds to the key of its tokens; nothing for all of it."""
  name = config.get("text", "training")
  return {} if name == "training" else {"text": name}


def _tokenizer(config: ml_collections.ConfigDict, workdir: Path, source: Path | None) -> tokenizers.Tokenizer:
  """That of the checkpoint to go on with, else one trained on the text; kept in `tokenizer.json`."""
  path = workdir / "tokenizer.json"
  if source is not None and not path.exists():
    if not (source / "tokenizer.json").is_file():
      raise convert.CheckpointError(f"{source / 'tokenizer.json'}: not found; copy it beside config.json")
    artifacts.write_bytes(path, (source / "tokenizer.json").read_bytes())
  if not path.exists():
    documents = list(_documents(config))
    tokenizer = data.train_tokenizer(documents, config.model.vocab_size)
    artifacts.write_bytes(path, tokenizer.to_str(pretty=True).encode())
  return tokenizers.Tokenizer.from_file(str(path))


def token_streams(config: ml_collections.ConfigDict, workdir: Path, tokenizer: tokenizers.Tokenizer,
                  end: int | None = None) -> dict[str, Any]:
  """The training tokens, with the token `end` after each document (by default the tokenizer's end of text); kept in
  `tokens.npz` because reading and encoding takes a minute."""
  path = workdir / "tokens.npz"
  key = artifacts.key("tokens", data.VERSION, list(config.mixture),
                      {"tokenizer": artifacts.digest(tokenizer.to_str())} | _text_key(config))
  if path.exists():
    arrays, meta = artifacts.load_arrays(path)
    if meta["key"] == key:
      return {k: data.TokenStream(v.astype(np.int32), meta["bytes"][k]) for k, v in arrays.items()}
  streams = data.encode(_documents(config), tokenizer, end)
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


def _start(config: ml_collections.ConfigDict, source: Path | None) -> tuple[decoder.Decoder, decoder.DecoderConfig]:
  """The model before training, float32: random, or read from the checkpoint `source`."""
  if source is None:
    model_config = hf_config.read(dict(config.model, model_type="mixtral"))
    return decoder.init(model_config, config.seed), model_config
  model, model_config = convert.load(source)
  if model_config.family != "mixtral":
    raise convert.CheckpointError(f"{source}: is of family {model_config.family}; training goes on with a checkpoint of"
                                  " family mixtral, such as `upcycle` writes")
  return model, model_config


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Trains a model and writes it to `workdir/model` in Hugging Face's Mixtral format.

  It begins with random weights of the sizes `config.model`, or, where `config.checkpoint` names a directory, with the
  checkpoint there, whose tokenizer, sizes and special tokens it keeps.

  `workdir/model` receives config.json, model.safetensors (bfloat16), tokenizer.json, router_init.safetensors (the
  routers before training, float32), training_log.jsonl and held_out.json. Killed at any moment and started again, the
  run continues after its last checkpoint and ends with the same files.
  """
  source = Path(config.checkpoint) if config.get("checkpoint") else None
  model, model_config = _start(config, source)
  tokenizer = _tokenizer(config, workdir, source)
  streams = token_streams(config, workdir, tokenizer)
  dtype = jnp.dtype(config.compute_dtype)
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
  if source is not None:  # what training does not know stays: the tokens that begin and end a text
    artifacts.write_json(out / "config.json", convert.read_config(source)[1] | {"dtype": "bfloat16"})
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
