"""Decoder-only MoE language models of the Mixtral family, as plain pytrees.

A model is a stack of blocks. Stages do not run the whole network in one program: they call the three functions of
`Functions` (`embed`, `block`, `head`), each compiled once and used for every layer, so that a stage can stop between
layers, keep activations, or hold the weights of one layer at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moeq_jax.models import moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of a decoder; the names are those of Hugging Face's Mixtral config."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  num_local_experts: int
  num_experts_per_tok: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  tie_word_embeddings: bool = True
  max_position_embeddings: int = 2048


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
  """Root-mean-square norm over the last axis, in float32, back in the dtype of `x`."""
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  gain = weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (normed * gain).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (RoFormer, eq. 34; halves layout) on `[B, S, heads, head_dim]`."""
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x @ w` for `[..., K]` and `[K, N]` (`w` in any dtype; computed in that of `x`).

  The gradient of `w` is summed in float32: more exact, and XLA:CPU has no fast bfloat16 path for a transposed left
  operand.
  """
  return x @ w.astype(x.dtype)


def _dense_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  rows = lambda a: a.reshape(-1, a.shape[-1]).astype(jnp.float32)
  return dy @ w.astype(dy.dtype).T, (rows(x).T @ rows(dy)).astype(w.dtype)


dense.defvjp(lambda x, w: (dense(x, w), (x, w)), _dense_backward)


class Attention(nnx.Module):
  """Causal grouped-query attention with rotary positions."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    def init(k: int, n: int) -> nnx.Param:
      return nnx.Param(0.02 * jax.random.normal(rngs.params(), (k, n), dtype))

    self.head_dim, self.theta = config.head_dim, config.rope_theta
    self.q = init(config.hidden_size, config.num_attention_heads * config.head_dim)
    self.k = init(config.hidden_size, config.num_key_value_heads * config.head_dim)
    self.v = init(config.hidden_size, config.num_key_value_heads * config.head_dim)
    self.o = init(config.num_attention_heads * config.head_dim, config.hidden_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, S, D] -> [B, S, D]`."""

    def heads(weight: nnx.Param) -> jax.Array:
      return dense(x, weight[...]).reshape(*x.shape[:2], -1, self.head_dim)

    q, k, v = rotate(heads(self.q), self.theta), rotate(heads(self.k), self.theta), heads(self.v)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return dense(mixed.reshape(*x.shape[:2], -1), self.o[...])


class Block(nnx.Module):
  """Attention and mixture of experts, each behind a norm and with a residual."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.eps = config.rms_norm_eps
    self.attention_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
    self.moe_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
    self.attention = Attention(config, dtype=dtype, rngs=rngs)
    self.moe = moe.MoE(config.hidden_size, config.intermediate_size, config.num_local_experts,
                       config.num_experts_per_tok, dtype=dtype, rngs=rngs)

  def __call__(self, h: jax.Array, tap: moe.Tap = moe.no_tap) -> tuple[jax.Array, moe.Routing]:
    """`[B, S, D] -> [B, S, D]` and the routing of the `B * S` tokens."""
    h = h + self.attention(rms_norm(h, self.attention_norm, self.eps))
    rows = rms_norm(h, self.moe_norm, self.eps).reshape(-1, h.shape[-1])
    out, routing = self.moe(rows, tap)
    return h + out.reshape(h.shape), routing


class Top(nnx.Module):
  """What stands around the blocks: token embedding, final norm and output projection."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.hidden_size)
    self.eps, self.tied = config.rms_norm_eps, config.tie_word_embeddings
    self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
    self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
    if not self.tied:
      self.output = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

  def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`[B, S]` int32 -> `[B, S, D]` in `dtype`."""
    return self.embedding[...].astype(dtype)[tokens]

  def logits(self, h: jax.Array) -> jax.Array:
    """`[B, S, D] -> [B, S, V]` float32."""
    weight = self.embedding if self.tied else self.output
    return dense(rms_norm(h, self.norm, self.eps), weight[...].T).astype(jnp.float32)


class Decoder(nnx.Module):
  """A language model: `top` and `blocks`."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
    self.top = Top(config, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])


def init(config: DecoderConfig, seed: int) -> Decoder:
  """A decoder with random float32 parameters (normal, standard deviation 0.02)."""
  return Decoder(config, rngs=nnx.Rngs(seed))


def token_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Cross-entropy of each next token in nats: `[B, S, V]`, `[B, S]` -> `[B, S - 1]` float32."""
  logits, labels = logits[:, :-1], tokens[:, 1:, None]
  picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1])[None, None] == labels, logits, 0.0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - picked


def sequence_losses(model: Decoder, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Mean next-token loss of each sequence in nats: `[B, S]` -> `[B]` float32."""
  h = model.top.embed(tokens, dtype)
  for block in model.blocks:
    h, _ = block(h)
  return jnp.mean(token_losses(model.top.logits(h), tokens), axis=-1)


def training_loss(model: Decoder, tokens: jax.Array, *, balance: float, dtype: jnp.dtype) -> tuple[jax.Array, dict]:
  """Mean next-token loss plus `balance` times the mean load-balancing loss of the layers.

  Returns:
    The loss, and `{"loss": nats per token, "balance": mean balancing loss, "load": [L, E] share of rows}`.
  """
  h = model.top.embed(tokens, dtype)
  routings = []
  for block in model.blocks:
    h, routing = block(h)
    routings.append(routing)
  loss = jnp.mean(token_losses(model.top.logits(h), tokens))
  uneven = jnp.mean(jnp.stack([moe.load_balance_loss(r) for r in routings]))
  load = jnp.stack([r.group_sizes / jnp.sum(r.group_sizes) for r in routings])
  return loss + balance * uneven, {"loss": loss, "balance": uneven, "load": load}


@dataclasses.dataclass(frozen=True)
class Functions:
  """A model as stages see it: pure functions of the pytrees `model.top` and `model.blocks[l]`.

  All blocks have one structure, so that one compiled program serves every layer.

  Attributes:
    embed: `(top, tokens [B, S]) -> h [B, S, D]`.
    block: `(block, h, tap) -> (h, Routing)`.
    head: `(top, h) -> logits [B, S, V]` float32.
    losses: `(logits, tokens) -> [B, S - 1]` nats.
    router: `block -> [E, D]`.
    with_router: `(block, [E, D]) -> block`.
    experts: `block -> {"gate", "up", "down"}`, arrays or QTensors `[E, K, N]`.
    with_experts: `(block, {"gate", "up", "down"}) -> block`.
  """

  embed: Callable[..., jax.Array]
  block: Callable[..., Any]
  head: Callable[..., jax.Array]
  losses: Callable[..., jax.Array]
  router: Callable[[Any], jax.Array]
  with_router: Callable[[Any, jax.Array], Any]
  experts: Callable[[Any], dict[str, Any]]
  with_experts: Callable[[Any, Mapping[str, Any]], Any]


def _with(block: Block, values: Mapping[str, Any]) -> Block:
  """A copy of `block` whose MoE parameters in `values` are replaced."""
  copy = jax.tree.map(lambda leaf: leaf, block)
  for name, value in values.items():
    setattr(copy.moe, name, nnx.Param(value))
  return copy


@functools.cache
def functions(dtype: jnp.dtype) -> Functions:
  """The functions of any `Decoder`, computing in `dtype`; the same object for the same dtype, so that nothing compiled
  for one model of a kind is compiled again for the next."""
  return Functions(
      embed=lambda top, tokens: top.embed(tokens, dtype),
      block=lambda block, h, tap=moe.no_tap: block(h, tap),
      head=lambda top, h: top.logits(h),
      losses=token_losses,
      router=lambda block: block.moe.router.get_value(),
      with_router=lambda block, router: _with(block, {"router": router}),
      experts=lambda block: {name: getattr(block.moe, name).get_value() for name in ("gate", "up", "down")},
      with_experts=_with,
  )


def from_config(values: Mapping[str, Any]) -> DecoderConfig:
  """Reads a Hugging Face Mixtral `config.json` (transformers 5 and older spellings).

  `rope_theta` and `tie_word_embeddings`, where missing, are what transformers takes for Mixtral: 10^6 and false.

  Raises:
    ValueError: a field is missing or has a value that is not supported, named.
  """
  if values.get("model_type") != "mixtral":
    raise ValueError(f"config.json: model_type is {values.get('model_type')!r}; supported: 'mixtral'")
  if values.get("sliding_window"):
    raise ValueError("config.json: sliding_window is set; only full causal attention is supported")
  if values.get("hidden_act", "silu") != "silu":
    raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} is not supported; expected 'silu'")
  rope = values.get("rope_parameters") or {}
  if rope.get("rope_type", "default") != "default":
    raise ValueError(f"config.json: rope_type {rope['rope_type']!r} is not supported; expected 'default'")
  fields = dataclasses.fields(DecoderConfig)
  needed = {f.name for f in fields if f.default is dataclasses.MISSING} - {"head_dim"}
  if wrong := sorted(name for name in needed if type(values.get(name)) is not int):
    raise ValueError(f"config.json: {wrong[0]} is {values.get(wrong[0])!r}; a whole number is needed")
  known = {"tie_word_embeddings": False} | {k: v for k, v in values.items() if k in {f.name for f in fields}}
  known["rope_theta"] = float(rope.get("rope_theta") or values.get("rope_theta") or 1e6)
  if known.get("head_dim") is None:
    known["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
  config = DecoderConfig(**known)
  _check(config)
  return config


def _check(config: DecoderConfig) -> None:
  """Raises a ValueError if the sizes contradict one another."""
  c = config
  if c.num_attention_heads % c.num_key_value_heads:
    raise ValueError(f"config.json: num_attention_heads {c.num_attention_heads} is not a multiple of "
                     f"num_key_value_heads {c.num_key_value_heads}")
  if c.head_dim % 2:
    raise ValueError(f"config.json: head_dim {c.head_dim} is odd; rotary positions turn pairs")
  if not 1 <= c.num_experts_per_tok <= c.num_local_experts:
    raise ValueError(f"config.json: num_experts_per_tok {c.num_experts_per_tok} is not between 1 and "
                     f"num_local_experts {c.num_local_experts}")
