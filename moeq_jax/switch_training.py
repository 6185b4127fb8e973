"""Training a Switch Transformer: span corruption from random weights, then pairs of text and summary.

Part of the spine: it knows models and stages alike. Both runs leave a checkpoint in Hugging Face's format that goes on
from the last one, router norms over training in `model/training_log.jsonl`, and the routers from before the run in
`model/router_init.safetensors`: those of the random model after pre-training, those of the pre-trained one after
fine-tuning, whose norms arXiv 2604.06515 takes the norm change from.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers

from moeq_jax import artifacts, data, pairs, pretrain, steps, user_text
from moeq_jax.models import convert, families, switch
from moeq_jax.train import loop

END = "</s>"


def make_tokenizer(documents: Sequence[data.Document], vocabulary: int, sentinels: int) -> tokenizers.Tokenizer:
  """A byte-level tokenizer of T5's kind: padding is 0, sentinels count down from the last token, the first of them
  named `<extra_id_0>`, and the end of a text comes before them.

  Args:
    documents: to train it on.
    vocabulary: tokens in all.
    sentinels: how many there are.
  """
  tokenizer = data.train_tokenizer(documents, vocabulary - sentinels - 1)
  tokenizer.add_special_tokens([END, *(f"<extra_id_{i}>" for i in reversed(range(sentinels)))])
  return tokenizer


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
  """The tokenizer in a file; a special token that stands in a text is read as the characters that it is made of."""
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.encode_special_tokens = True
  return tokenizer


def _prepared(config: ml_collections.ConfigDict, workdir: Path) -> tokenizers.Tokenizer:
  path = workdir / "tokenizer.json"
  if not path.exists():
    documents = [d for d in data.training() if d.domain in config.mixture]
    tokenizer = make_tokenizer(documents, config.model.vocab_size, config.sentinels)
    artifacts.write_bytes(path, tokenizer.to_str(pretty=True).encode())
  return open_tokenizer(path)


def model_config(config: ml_collections.ConfigDict, tokenizer: tokenizers.Tokenizer) -> switch.SwitchConfig:
  """The sizes of the model, with the tokenizer's end of text."""
  return switch.SwitchConfig(eos_token_id=tokenizer.token_to_id(END), **config.model)


def _fit(model: switch.Switch, config: ml_collections.ConfigDict, batch: Callable[[int], Any],
         workdir: Path) -> switch.Switch:
  """Trains `model` as `config` says, and logs the norm of every router row."""
  schedule = loop.Schedule(steps=config.steps, warmup=config.warmup, peak=config.peak_rate, end=config.end_rate,
                           weight_decay=config.weight_decay, decay=config.decay_steps)
  loss = functools.partial(switch.training_loss, balance=config.balance, z=config.z,
                           dtype=jnp.dtype(config.compute_dtype), capacity=config.capacity)
  watch = lambda m: {"router_norm": np.round(np.linalg.norm(convert.routers(m), axis=-1), 5).tolist()}
  return loop.fit(model, loss, batch, schedule, workdir, watch=watch, log_every=config.log_every,
                  save_every=config.save_every)


def _write(workdir: Path, model: switch.Switch, sizes: switch.SwitchConfig, summary: dict[str, Any]) -> None:
  """Writes the checkpoint and what belongs to it; `router_init.safetensors` is there already. It is in float32: the
  norm change of a router row is small, and rounding both ends to bfloat16 would blur it."""
  out = workdir / "model"
  convert.save(out, model, sizes, np.float32)
  artifacts.write_bytes(out / "tokenizer.json", (workdir / "tokenizer.json").read_bytes())
  artifacts.write_bytes(out / "training_log.jsonl", (workdir / "log.jsonl").read_bytes())
  artifacts.write_json(out / "held_out.json", summary)
  print(json.dumps(summary, indent=1))


def held_out_losses(model: switch.Switch, sizes: switch.SwitchConfig, batches: Sequence[dict[str, np.ndarray]],
                    capacity: str) -> np.ndarray:
  """The sum of each row's losses in nats, and its number of targets, in float32: `[rows, 2]`."""
  functions, found = families.functions(sizes, jnp.float32, capacity=capacity), []
  for batch in batches:
    on_device = jax.tree.map(jnp.asarray, batch)
    state = steps.embed(functions, model.top, on_device)
    for block in model.blocks:
      state = steps.block(functions, block, state)[0]
    mean = np.asarray(steps.sequence_losses(functions, model.top, state, on_device))  # over padding, too
    found.append(np.stack([mean * batch["targets"].shape[1], np.sum(batch["targets"] >= 0, axis=1)], axis=1))
  return np.concatenate(found)


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------------------


def pretrain_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Trains a Switch Transformer from random weights by span corruption and writes it to `workdir/model`.

  Killed at any moment and started again, the run continues after its last checkpoint and ends with the same files.
  """
  tokenizer = _prepared(config, workdir)
  sizes = model_config(config, tokenizer)
  streams = pretrain.token_streams(config, workdir, tokenizer, sizes.eos_token_id)
  corrupt = functools.partial(user_text.corrupted, model=sizes, first=sizes.vocab_size - 1, density=config.density)

  def batch(step: int) -> dict[str, np.ndarray]:
    rows = data.batch(streams, config.mixture, step, size=config.batch, length=config.length, seed=config.seed)
    shares = {"repetitions": 1.0} if step <= config.repeating_steps else {
        "endings": config.endings, "repetitions": config.repetitions}
    return corrupt(rows, seed=[config.seed, step], **shares)

  model = switch.init(sizes, config.seed)
  convert.save_routers(workdir / "model" / "router_init.safetensors", convert.routers(model))
  model = _fit(model, config, batch, workdir)
  held_out = data.encode((d for d in data.held_out() if d.domain in config.mixture), tokenizer, sizes.eos_token_id)
  losses = {}
  for domain, stream in sorted(held_out.items()):
    windows, losses[domain] = stream.sequences(config.held_out_sequences, config.length), {}
    for kind in ("spans", "endings", "repetitions"):
      share = {} if kind == "spans" else {kind: 1.0}
      batches = [corrupt(windows[i:i + config.batch], seed=[config.seed, 0, i], **share)
                 for i in range(0, len(windows), config.batch)]
      total, count = held_out_losses(model, sizes, batches, config.capacity).sum(axis=0)
      losses[domain][kind] = {"nats_per_target": float(total / count), "targets": int(count)}
  _write(workdir, model, sizes, {"held_out": losses, "sequences_trained": config.steps * config.batch,
                                 "tokens_in_text": {name: len(stream.tokens) for name, stream in streams.items()}})


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def encode_pairs(found: Sequence[pairs.Pair], tokenizer: tokenizers.Tokenizer, end: int, inputs: int,
                 targets: int) -> tuple[list[list[int]], list[list[int]]]:
  """Pairs as tokens: those of text and summary, each with the end of a text; cut to `inputs` and `targets` tokens."""
  sides = [[p.text for p in found], [p.summary for p in found]]
  return tuple([[*encoded.ids, end][:most] for encoded in tokenizer.encode_batch(side, add_special_tokens=False)]
               for side, most in zip(sides, (inputs, targets), strict=True))


def _training_pairs(config: ml_collections.ConfigDict, workdir: Path, tokenizer: tokenizers.Tokenizer,
                    end: int) -> dict[str, np.ndarray]:
  """`{"inputs": [n, S], "targets": [n, T], "domain": [n]}` of the training pairs, filled up with -1; the domain is a
  place in `pairs.DOMAINS`. Kept in `pairs.npz`, because reading takes a minute."""
  path, sizes = workdir / "pairs.npz", [config.inputs, config.targets]
  key = artifacts.key("pairs", pairs.VERSION, sizes, {"tokenizer": artifacts.digest(tokenizer.to_str())})
  if path.exists():
    arrays, meta = artifacts.load_arrays(path)
    if meta["key"] == key:
      return arrays
  found = pairs.training()
  arrays = {"domain": np.array([pairs.DOMAINS.index(p.domain) for p in found], np.int32)}
  for name, rows, most in zip(("inputs", "targets"), encode_pairs(found, tokenizer, end, *sizes), sizes, strict=True):
    arrays[name] = np.array([row + [-1] * (most - len(row)) for row in rows], np.int32)
  artifacts.save_arrays(path, arrays, {"key": key})
  return arrays


def pair_batch(arrays: dict[str, np.ndarray], mixture: dict[str, float], step: int, *, size: int, seed: int,
               pad: int) -> dict[str, np.ndarray]:
  """The batch of one step: pairs drawn at random, their domains by `mixture`; a function of `(seed, step)` alone."""
  rng = np.random.default_rng([seed, step])
  share = np.array([mixture[name] for name in pairs.DOMAINS])
  rows = np.array([rng.choice(np.flatnonzero(arrays["domain"] == domain))
                   for domain in rng.choice(len(share), size=size, p=share / share.sum())])
  inputs, targets = arrays["inputs"][rows], arrays["targets"][rows]
  return {"inputs": np.where(inputs < 0, pad, inputs), "targets": np.where(targets < 0, switch.NO_TARGET, targets)}


def pair_batches(found: Sequence[pairs.Pair], size: int, tokenizer: tokenizers.Tokenizer, sizes: switch.SwitchConfig,
                 inputs: int, targets: int) -> list[dict[str, np.ndarray]]:
  """Pairs as batches of `size` rows, all of one shape: `inputs` tokens and `targets` tokens."""
  sides = encode_pairs(found, tokenizer, sizes.eos_token_id, inputs, targets)
  filled = [np.array([row + [fill] * (most - len(row)) for row in rows], np.int32) for rows, most, fill in
            zip(sides, (inputs, targets), (sizes.pad_token_id, switch.NO_TARGET), strict=True)]
  return [{"inputs": filled[0][i:i + size], "targets": filled[1][i:i + size]} for i in range(0, len(found), size)]


def finetune_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Trains a pre-trained Switch Transformer on pairs of text and summary and writes it to `workdir/model`.

  Killed at any moment and started again, the run continues after its last checkpoint and ends with the same files.

  Raises:
    convert.CheckpointError: `config.checkpoint` cannot be read, or is of another family.
  """
  source = Path(config.checkpoint)
  model, sizes = convert.load(source)
  if not isinstance(sizes, switch.SwitchConfig):
    raise convert.CheckpointError(f"{source}: is of family {sizes.family}; this run takes a Switch Transformer, as"
                                  " configs/switch_pretrain.py makes it")
  artifacts.write_bytes(workdir / "tokenizer.json", (source / "tokenizer.json").read_bytes())
  tokenizer = open_tokenizer(workdir / "tokenizer.json")
  arrays = _training_pairs(config, workdir, tokenizer, sizes.eos_token_id)
  convert.save_routers(workdir / "model" / "router_init.safetensors", convert.routers(model))
  batch = functools.partial(pair_batch, arrays, config.mixture, size=config.batch, seed=config.seed,
                            pad=sizes.pad_token_id)
  model = _fit(model, config, batch, workdir)
  losses = {}
  for domain in pairs.DOMAINS:
    held_out = [p for p in pairs.held_out() if p.domain == domain][:config.held_out_pairs]
    batches = pair_batches(held_out, config.batch, tokenizer, sizes, config.inputs, config.targets)
    total, count = held_out_losses(model, sizes, batches, config.capacity).sum(axis=0)
    losses[domain] = {"nats_per_target": float(total / count), "targets": int(count)}
  found = {name: int(np.sum(arrays["domain"] == i)) for i, name in enumerate(pairs.DOMAINS)}
  _write(workdir, model, sizes, {"held_out": losses, "pairs_trained": config.steps * config.batch, "pairs": found})
