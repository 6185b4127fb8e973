"""Decoder-only language models, MoE and dense (Mixtral, Qwen MoE, OLMoE, Llama), as plain pytrees.

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

from moeq_jax.models import attention, layers, moe
from moeq_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """What a decoder is made of; the names are Hugging Face's where there is one.

  Attributes:
    family: `mixtral`, `qwen2_moe`, `qwen3_moe`, `olmoe` or `llama` (dense).
    intermediate_size: F, of one expert; of the feed-forward network where a model has no experts.
    num_local_experts: E; 0 for a dense model.
    rope_scaling: the items of `rope_parameters` beside the base frequency, none for the default rotation.
    norm_topk_prob: the weights of the chosen experts sum to one; else they are their shares of all experts.
    qkv_bias, o_bias: whether those projections have biases.
    qk_norm: `""` none, `"head"` an RMS norm over each head (Qwen3), `"whole"` over the whole projection (OLMoE).
    clip_qkv: queries, keys and values are clipped to this size.
    shared_size: width of the shared expert, 0 for none.
    dense_size: width of the feed-forward network in `dense_layers`.
    dense_layers: blocks without experts.
    sliding_windows: per block, how many positions a token sees (itself among them), `None` for all; `()` for all.
  """

  family: str = "mixtral"
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
  rope_scaling: tuple[tuple[str, Any], ...] = ()
  tie_word_embeddings: bool = True
  max_position_embeddings: int = 2048
  norm_topk_prob: bool = True
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: str = ""
  clip_qkv: float | None = None
  shared_size: int = 0
  dense_size: int = 0
  dense_layers: tuple[int, ...] = ()
  sliding_windows: tuple[int | None, ...] = ()

  def sparse(self, layer: int) -> bool:
    """Whether block `layer` is a mixture of experts."""
    return self.num_local_experts > 0 and layer not in self.dense_layers

  def rope(self) -> Rope:
    """The rotary positions of all blocks."""
    return Rope(self.head_dim, self.rope_theta, self.max_position_embeddings, self.rope_scaling)


class Block(nnx.Module):
  """Attention and a feed-forward network (`moe`, or `mlp` in a dense block), each behind a norm and with a residual."""

  def __init__(self, config: DecoderConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    c, make = config, {"dtype": dtype, "rngs": rngs}
    window = c.sliding_windows[layer] if c.sliding_windows else None
    self.eps = c.rms_norm_eps
    self.attention_norm = nnx.Param(jnp.ones(c.hidden_size, dtype))
    self.ffn_norm = nnx.Param(jnp.ones(c.hidden_size, dtype))
    self.attention = attention.Attention(
        c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.rope(), qkv_bias=c.qkv_bias, o_bias=c.o_bias,
        qk_norm=c.qk_norm, clip=c.clip_qkv, window=window, eps=self.eps, **make)
    if c.sparse(layer):
      self.moe = moe.MoE(c.hidden_size, c.intermediate_size, c.num_local_experts, c.num_experts_per_tok,
                         normalize=c.norm_topk_prob, shared_size=c.shared_size, **make)
    else:
      self.mlp = layers.FeedForward(c.hidden_size, c.dense_size if c.num_local_experts else c.intermediate_size, **make)

  def __call__(self, h: jax.Array, tap: moe.Tap = moe.no_tap) -> tuple[jax.Array, moe.Routing | None]:
    """`[B, S, D] -> [B, S, D]` and the routing of the `B * S` tokens, None in a dense block."""
    return self._feed(self._attend(h), tap)

  def cached(self, h: jax.Array, cache: attention.Cache, positions: jax.Array) -> tuple[jax.Array, attention.Cache]:
    """As `__call__`, for the tokens at `positions` `[B, S]`, which are added to the cache."""
    mixed, cache = self.attention.cached(layers.rms_norm(h, self.attention_norm, self.eps), cache, positions)
    return self._feed(h + mixed, moe.no_tap)[0], cache

  def before(self, h: jax.Array) -> tuple[jax.Array, jax.Array, moe.Routing]:
    """What comes before the experts: `(pending [B, S, D], rows of the experts [T, D], routing)`."""
    return self._enter(self._attend(h))

  def after(self, pending: jax.Array, y: jax.Array) -> jax.Array:
    """Adds what the experts gave, `[T, D]`, weighted and summed."""
    return pending + y.reshape(pending.shape)

  def _attend(self, h: jax.Array) -> jax.Array:
    return h + self.attention(layers.rms_norm(h, self.attention_norm, self.eps))

  def _rows(self, h: jax.Array) -> jax.Array:
    return layers.rms_norm(h, self.ffn_norm, self.eps).reshape(-1, h.shape[-1])

  def _enter(self, h: jax.Array) -> tuple[jax.Array, jax.Array, moe.Routing]:
    """`before`, from the residual stream after attention."""
    rows = self._rows(h)
    shared = self.moe.always(rows)
    return h if shared is None else h + shared.reshape(h.shape), rows, self.moe.route(rows)

  def _feed(self, h: jax.Array, tap: moe.Tap) -> tuple[jax.Array, moe.Routing | None]:
    """The feed-forward half, from the residual stream after attention."""
    if not hasattr(self, "moe"):
      return self.after(h, self.mlp(self._rows(h))), None
    pending, rows, routing = self._enter(h)
    return self.after(pending, self.moe.experts(rows, routing, tap)), routing


class Top(nnx.Module):
  """What stands around the blocks: token embedding, final norm and output projection."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.hidden_size)
    self.eps, self.tied = config.rms_norm_eps, config.tie_word_embeddings
    self.embedding = layers.normal(rngs, *shape, dtype=dtype)
    self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
    if not self.tied:
      self.output = layers.normal(rngs, *shape, dtype=dtype)

  def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`[B, S]` int32 -> `[B, S, D]` in `dtype`."""
    return self.embedding[...].astype(dtype)[tokens]

  def logits(self, h: jax.Array) -> jax.Array:
    """`[B, S, D] -> [B, S, V]` float32."""
    weight = self.embedding if self.tied else self.output
    return layers.unembed(layers.rms_norm(h, self.norm, self.eps), weight[...])


class Decoder(nnx.Module):
  """A language model: `top` and `blocks`."""

  def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
    self.top = Top(config, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List([Block(config, l, dtype=dtype, rngs=rngs) for l in range(config.num_hidden_layers)])


def init(config: DecoderConfig, seed: int) -> Decoder:
  """A decoder with random float32 parameters (normal, standard deviation 0.02)."""
  return build(config, jnp.float32, seed)


def build(config: DecoderConfig, dtype: jnp.dtype, seed: int = 0) -> Decoder:
  """A decoder with random parameters in `dtype`."""
  return Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))


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
  """Mean next-token loss plus `balance` times the mean load-balancing loss of the MoE layers (at least one).

  Returns:
    The loss, and `{"loss": nats per token, "balance": mean balancing loss, "load": [L, E] share of rows}`.
  """
  h = model.top.embed(tokens, dtype)
  routings = []
  for block in model.blocks:
    h, routing = block(h)
    routings += [] if routing is None else [routing]
  loss = jnp.mean(token_losses(model.top.logits(h), tokens))
  uneven = jnp.mean(jnp.stack([moe.load_balance_loss(r) for r in routings]))
  load = jnp.stack([r.group_sizes / jnp.sum(r.group_sizes) for r in routings])
  return loss + balance * uneven, {"loss": loss, "balance": uneven, "load": load}


@dataclasses.dataclass(frozen=True)
class Functions:
  """A model as stages see it: pure functions of the pytrees `model.top` and `model.blocks[l]`.

  Blocks of one structure share one compiled program. A state is a pytree of float arrays: here the residual stream `h`
  `[B, S, D]`. `before`, `expert` and `after` are a sparse block in three parts, for stages that hold one expert at a
  time: with `(pending, rows, routing) = before(block, state)`, the block gives
  `after(block, pending, sum_k routing.weights[t, k] * expert(experts[routing.experts[t, k]], rows[t]))`.

  Attributes:
    embed: `(top, batch) -> state`; a batch is tokens `[B, S]` int32.
    block: `(block, state, tap) -> (state, Routing)`, `None` in place of the routing where a block is dense.
    head: `(top, state) -> logits [B, S, V]` float32.
    losses: `(logits, batch) -> [B, S - 1]` nats.
    sparse: `block -> bool`.
    router: `block -> [E, D]`.
    with_router: `(block, [E, D]) -> block`.
    experts: `block -> {"gate", "up", "down"}`, arrays or QTensors `[E, K, N]`.
    with_experts: `(block, {"gate", "up", "down"}) -> block`.
    before: `(block, state) -> (pending, rows [T, D], Routing)`: attention, norm, router, shared expert.
    expert: `(weights {"gate": [K, N], ...}, rows [R, D], tap) -> [R, D]`, one expert; `tap(name, value) -> value` is
      called for `gate`, `up`, `mid` and `down`.
    after: `(block, pending, y [T, D]) -> state`.
  """

  embed: Callable[..., Any]
  block: Callable[..., Any]
  head: Callable[..., jax.Array]
  losses: Callable[..., jax.Array]
  sparse: Callable[[Any], bool]
  router: Callable[[Any], jax.Array]
  with_router: Callable[[Any, jax.Array], Any]
  experts: Callable[[Any], dict[str, Any]]
  with_experts: Callable[[Any, Mapping[str, Any]], Any]
  before: Callable[[Any, Any], tuple[Any, jax.Array, moe.Routing]]
  expert: Callable[..., jax.Array]
  after: Callable[[Any, Any, jax.Array], Any]


def with_moe(block: Any, values: Mapping[str, Any]) -> Any:
  """A copy of `block` whose MoE parameters in `values` are replaced."""
  copy = jax.tree.map(lambda leaf: leaf, block)
  for name, value in values.items():
    setattr(copy.moe, name, nnx.Param(value))
  return copy


def functions(dtype: Any) -> Functions:
  """The functions of any `Decoder`, computing in `dtype`; the same object for the same dtype, so that nothing compiled
  for one model of a kind is compiled again for the next."""
  return _functions(jnp.dtype(dtype))


@functools.cache
def _functions(dtype: jnp.dtype) -> Functions:
  return Functions(
      embed=lambda top, tokens: top.embed(tokens, dtype),
      block=lambda block, h, tap=moe.no_tap: block(h, tap),
      head=lambda top, h: top.logits(h),
      losses=token_losses,
      sparse=lambda block: hasattr(block, "moe"),
      router=lambda block: block.moe.router.get_value(),
      with_router=lambda block, router: with_moe(block, {"router": router}),
      experts=lambda block: {name: getattr(block.moe, name).get_value() for name in ("gate", "up", "down")},
      with_experts=with_moe,
      before=lambda block, h: block.before(h),
      expert=layers.swiglu,
      after=lambda block, pending, y: block.after(pending, y),
  )
