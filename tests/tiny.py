"""A tiny Mixtral for tests, random but of a size at which routing and quantization matter, and a numpy oracle of it.

Expert widths differ from the hidden size, layers and experts differ in scale, and their loads are uneven. In layer 1
the router rows are a, -a, c, -c, 0 and one more: two logits are always above zero, so expert 4 never sees a token.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from moeq_jax import artifacts, codecs, data, qtensor, scores
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.models import convert, decoder

CONFIG = decoder.DecoderConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=2)
WIDTHS = (1, 2, 3, 4)
UNROUTED = (1, 4)  # layer, expert
LENGTH = 24


@functools.cache
def model(seed: int = 0) -> decoder.Decoder:
  """A random model whose weights are bfloat16 values in float32, so that a checkpoint holds them exactly."""
  rng = np.random.default_rng(seed)
  normal = lambda shape: rng.normal(0, shape[-2] ** -0.5, shape)
  built = jax.eval_shape(lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(0)))
  leaves = []
  for name, leaf in convert.named_leaves(built).items():
    if "norm" in name:
      value = np.ones(leaf.shape)
    elif name.endswith("embedding"):
      value = rng.normal(0, 0.25, leaf.shape)
    elif name.endswith("router"):
      value = rng.normal(0, leaf.shape[1] ** -0.5, leaf.shape) * np.exp(rng.normal(0, 0.4, (leaf.shape[0], 1)))
      if name == f"blocks/{UNROUTED[0]}/moe/router":
        value[[1, 3]], value[UNROUTED[1]] = -value[[0, 2]], 0
    elif name.endswith("down"):
      value = 0.5 * normal(leaf.shape) * np.exp(rng.normal(0, 0.7, (leaf.shape[0], 1, 1)))
    else:
      value = normal(leaf.shape) * (1.5 if "moe" in name else 1)
    leaves.append(jnp.asarray(value.astype(ml_dtypes.bfloat16).astype(np.float32)))
  return jax.tree.unflatten(jax.tree.structure(built), leaves)


@functools.cache
def functions(dtype: str = "float32") -> decoder.Functions:
  """The functions of the model; one object for all tests, so that equal programs compile once."""
  return decoder.functions(jnp.dtype(dtype))


def tokens(batches: int, size: int = 4, length: int = LENGTH, seed: int = 0) -> list[np.ndarray]:
  """Random token batches `[size, length]` int32."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, CONFIG.vocab_size, (size, length)).astype(np.int32) for _ in range(batches)]


@functools.cache
def samples(batches: int = 32, size: int = 4, length: int = LENGTH) -> list[np.ndarray]:
  """Token batches drawn from `model()` itself: its loss on them is as low as can be, up to their noise."""
  tree, run, rows = model(), functions(), batches * size

  def logits(tokens: jax.Array) -> jax.Array:
    h = run.embed(tree.top, tokens)
    for block in tree.blocks:
      h, _ = run.block(block, h)
    return run.head(tree.top, h)

  @jax.jit
  def draw(first: jax.Array) -> jax.Array:
    def step(i: jax.Array, tokens: jax.Array) -> jax.Array:
      drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(0), i), logits(tokens)[:, i - 1])
      return tokens.at[:, i].set(drawn)

    return jax.lax.fori_loop(1, length, step, jnp.zeros((rows, length), jnp.int32).at[:, 0].set(first))

  first = np.random.default_rng(0).integers(0, CONFIG.vocab_size, rows)
  return list(np.asarray(draw(first)).reshape(batches, size, length))


@functools.cache
def stats() -> artifacts.Stats:
  """Calibration of `model()` on three batches."""
  return statistics.collect(functions(), model().top, list(model().blocks), tokens(3))


@functools.cache
def encoded(spec: str = "rtn(group=32)") -> tuple[tuple[artifacts.LayerCodes, ...], artifacts.ErrorTable]:
  """Codes of all layers of `model()` at `WIDTHS`, and their errors."""
  codec, ready = codecs.get(spec), candidates.shrink_unrouted(stats())
  layers = tuple(candidates.encode_layer(functions().experts(block), ready, layer, codec=codec, widths=WIDTHS)
                 for layer, block in enumerate(model().blocks))
  return layers, candidates.error_table(layers, widths=WIDTHS, codec=codec)


PLAN = np.array([[1, 2, 3, 4, 1, 2], [4, 4, 3, 2, 2, 1]])


def packed(plan: np.ndarray = PLAN, sized: bool = False,
           spec: str = "rtn(group=32)") -> list[dict[str, qtensor.QTensor]]:
  """The experts of all layers at the widths of `plan` `[L, E]`."""
  return [apply.pack_layer(codes, bits, widths=WIDTHS, group=32, sized=sized)
          for codes, bits in zip(encoded(spec)[0], plan, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(run: decoder.Functions, top: Any, blocks: list[Any], batch: jax.Array) -> jax.Array:
  h = run.embed(top, batch)
  for block in blocks:
    h, _ = run.block(block, h)
  return run.head(top, h)


def logits(experts: list[dict[str, Any]]) -> np.ndarray:
  """`[B, S, V]` on one batch of `model()` with these experts (arrays or QTensors) in its layers."""
  blocks = apply.quantized_blocks(functions(), model().blocks, experts)
  return np.asarray(_logits(functions(), model().top, blocks, jnp.asarray(tokens(1)[0])))


def decoded(codes: artifacts.LayerCodes, bits: Any, group: int = 32) -> dict[str, np.ndarray]:
  """A layer's experts after quantization to `bits` (`[E]` or one for all), `[E, K, N]` float64, by numpy alone."""
  out = {}
  for name, bank in codes.codes.items():
    index = np.searchsorted(WIDTHS, np.broadcast_to(bits, bank.codes.shape[1]))
    q, scale, zero = (np.asarray(field, np.float64) for field in bank.choose(index))
    rows = q.shape[1]
    scale, zero = (a.repeat(group or rows, axis=1)[:, :rows] for a in (scale, zero))
    out[name] = (q - zero) * scale
  return out


def evidence(**changes: Any) -> scores.Evidence:
  """The evidence of `model()`; `changes` replace fields."""
  layers, errors = encoded()
  del layers
  routers = convert.routers(model())
  initial = routers * np.linspace(0.5, 1.5, routers.shape[1])[None, :, None] + 0.01
  found = scores.Evidence(stats(), errors, routers, initial.astype(np.float32),
                          [functions().experts(block) for block in model().blocks])
  return dataclasses.replace(found, **changes)


TEXT = ("the router sends every token to two experts . a small model reads few words and forgets most of them . "
        "bits are counted , scales are rounded , and nothing is dropped . ").split(" ")


def documents(count: int, seed: int, domain: str = "wiki", words: int = 300) -> list[data.Document]:
  """Synthetic documents of random words."""
  rng = np.random.default_rng(seed)
  return [data.Document(domain, f"{domain} {seed} {i}", " ".join(rng.choice(TEXT, words))) for i in range(count)]


def checkpoint(directory: Path, seed: int = 0) -> Path:
  """Writes `model(seed)`, a tokenizer and initial routers to `directory` in Hugging Face's format; equal bytes."""
  convert.save(directory, model(seed), CONFIG)
  tokenizer = data.train_tokenizer(documents(4, seed=123), CONFIG.vocab_size)
  artifacts.write_bytes(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
  initial = np.random.default_rng(seed).normal(0, 0.1, convert.routers(model(seed)).shape)
  convert.save_routers(directory / "router_init.safetensors", initial)
  return directory


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
  """What a layer did in `forward`, float64.

  Attributes:
    rows: `[T, D]`, input of the experts.
    chosen: `[T, 2]`, the experts of each token, best first.
    weights: `[T, 2]`, their routing weights.
    mids: `[T, 2, F]`, input of down.
  """

  rows: np.ndarray
  chosen: np.ndarray
  weights: np.ndarray
  mids: np.ndarray


def _norm(x: np.ndarray, weight: Any) -> np.ndarray:
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + CONFIG.rms_norm_eps) * np.asarray(weight, np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _attention(x: np.ndarray, attention: Any) -> np.ndarray:
  length, size = x.shape[1], CONFIG.head_dim
  weight = lambda name: np.asarray(getattr(attention, name).get_value(), np.float64)
  q, k, v = (np.moveaxis((x @ weight(name)).reshape(*x.shape[:2], -1, size), 2, 1) for name in "qkv")
  angle = np.arange(length)[:, None] * CONFIG.rope_theta ** (-np.arange(size // 2) / (size // 2))
  turn = lambda a: np.concatenate([a[..., : size // 2] * np.cos(angle) - a[..., size // 2 :] * np.sin(angle),
                                   a[..., size // 2 :] * np.cos(angle) + a[..., : size // 2] * np.sin(angle)], -1)
  repeat = q.shape[1] // k.shape[1]
  logits = turn(q) @ turn(k.repeat(repeat, 1)).swapaxes(-1, -2) / np.sqrt(size)
  logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
  mixed = np.moveaxis(softmax(logits) @ v.repeat(repeat, 1), 1, 2)
  return mixed.reshape(*x.shape[:2], -1) @ weight("o")


def forward(batch: np.ndarray, experts: Any = None, seed: int = 0) -> tuple[np.ndarray, list[Layer]]:
  """Logits `[B, S, V]` and what every layer did, in float64 numpy.

  Args:
    batch: `[B, S]` tokens.
    experts: per layer `{"gate", "up", "down"}` in place of the model's own, or None.
    seed: of the model.
  """
  tree, layers = model(seed), []
  embedding = np.asarray(tree.top.embedding.get_value(), np.float64)
  h = embedding[batch]
  for index, block in enumerate(tree.blocks):
    h = h + _attention(_norm(h, block.attention_norm.get_value()), block.attention)
    rows = _norm(h, block.ffn_norm.get_value()).reshape(-1, h.shape[-1])
    own = experts[index] if experts else functions().experts(block)
    gate, up, down = (np.asarray(own[name], np.float64) for name in artifacts.PROJECTIONS)
    logits = rows @ np.asarray(block.moe.router.get_value(), np.float64).T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    weights = softmax(np.take_along_axis(logits, chosen, 1))
    a = np.einsum("td,tkdf->tkf", rows, gate[chosen])
    mids = a / (1 + np.exp(-a)) * np.einsum("td,tkdf->tkf", rows, up[chosen])
    out = np.einsum("tkf,tkfd,tk->td", mids, down[chosen], weights)
    h = h + out.reshape(h.shape)
    layers.append(Layer(rows, chosen, weights, mids))
  return _norm(h, tree.top.norm.get_value()) @ embedding.T, layers


def sequence_losses(logits: np.ndarray, batch: np.ndarray) -> np.ndarray:
  """Mean next-token loss of each sequence, `[B]`."""
  log = np.log(softmax(logits))[:, :-1]
  return -np.take_along_axis(log, batch[:, 1:, None], -1)[..., 0].mean(-1)
