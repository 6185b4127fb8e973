"""Switch Transformer (arXiv 2101.03961): an encoder-decoder like T5 whose sparse blocks send a token to one expert.

The blocks of the encoder come first, then those of the decoder. A state carries both residual streams through all of
them: blocks of the encoder change `encoder`, those of the decoder `decoder`.

An expert takes `expert_capacity` tokens of a sequence; those that come later skip it and keep their residual. What
counts as the sequence is the mode, one of `CAPACITY`:

- `sequence`: all tokens of a row, as in one forward pass of transformers 5.23 over it;
- `call`: as `sequence` in the encoder, but each token of the decoder counts for itself, as in cached generation with
  transformers, which counts anew in every call;
- `off`: no token is dropped.

Padding is never counted and never reaches an expert, wherever it stands. In transformers it is counted: that changes
nothing for rows padded on the right, while padding on the left displaces tokens of the text.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moeq_jax.models import decoder, layers, moe, switch_moe, t5_attention

CAPACITY = ("sequence", "call", "off")
PROJECTIONS = ("up", "down")
NO_TARGET = -100  # fills up targets; any negative number does

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchConfig:
  """What a Switch Transformer is made of; the names are Hugging Face's.

  Attributes:
    d_kv: size of an attention head.
    d_ff: F, of one expert and of the dense blocks.
    num_layers, num_decoder_layers: blocks of the encoder, of the decoder.
    num_experts: E, in every sparse block.
    expert_capacity: tokens of a sequence that an expert takes.
    encoder_sparse, decoder_sparse: which blocks have experts, counted within each stack.
    relative_attention_num_buckets, relative_attention_max_distance: see `t5_attention.buckets`.
    tie_word_embeddings: the embedding is the output projection, too, whose inputs are then divided by sqrt(d_model).
    separate_embeddings: encoder and decoder have an embedding each, and the common one is there but not read. So are
      untied models of transformers 5; those of transformers 4 share the embedding.
    decoder_start_token_id: what the decoder reads first.
    eos_token_id: ends a generated text; several may.
    pad_token_id: fills up the inputs of the encoder.
  """

  family: str = "switch_transformers"
  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  num_experts: int
  expert_capacity: int
  encoder_sparse: tuple[int, ...]
  decoder_sparse: tuple[int, ...]
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  tie_word_embeddings: bool = True
  separate_embeddings: bool = False
  decoder_start_token_id: int = 0
  eos_token_id: int | tuple[int, ...] = 1
  pad_token_id: int = 0

  @property
  def blocks(self) -> int:
    """Blocks of both stacks."""
    return self.num_layers + self.num_decoder_layers

  def sparse(self, layer: int) -> bool:
    """Whether block `layer`, counted over both stacks, has experts."""
    inside = layer - self.num_layers
    return inside in self.decoder_sparse if inside >= 0 else layer in self.encoder_sparse


class Block(nnx.Module):
  """A block of the encoder or the decoder: attention, in the decoder attention to the encoder, feed-forward network.

  Attributes:
    stack: `encoder` or `decoder`, the stream that it changes.
    mlp or moe: the feed-forward network of a dense or of a sparse block.
    final_norm: only in the last block of the encoder, applied to its output.
  """

  def __init__(self, config: SwitchConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    def norm() -> nnx.Param:
      return nnx.Param(jnp.ones(config.d_model, dtype))

    def attention() -> t5_attention.Attention:
      return t5_attention.Attention(config.d_model, config.num_heads, config.d_kv, dtype=dtype, rngs=rngs)

    self.eps, self.stack = config.layer_norm_epsilon, "encoder" if layer < config.num_layers else "decoder"
    self.attention_norm, self.attention = norm(), attention()
    if self.stack == "decoder":
      self.cross_norm, self.cross = norm(), attention()
    self.ffn_norm = norm()
    if config.sparse(layer):
      self.moe = switch_moe.SwitchMoE(config.d_model, config.d_ff, config.num_experts, config.expert_capacity,
                                      dtype=dtype, rngs=rngs)
    else:
      self.mlp = switch_moe.FeedForward(config.d_model, config.d_ff, dtype=dtype, rngs=rngs)
    if layer == config.num_layers - 1:
      self.final_norm = norm()

  def __call__(self, state: State, capacity: str, tap: moe.Tap = moe.no_tap) -> tuple[State, moe.Routing | None]:
    """The state after the block, and the routing of the stream's `B * S` tokens (None if the block is dense)."""
    if not hasattr(self, "moe"):
      pending, x = self._attend(state)
      return self.after(pending, self.mlp(x)), None
    pending, rows, routing = self.before(state, capacity)
    return self.after(pending, self.moe(rows, routing, tap)), routing

  def before(self, state: State, capacity: str) -> tuple[State, jax.Array, moe.Routing]:
    """What comes before the experts: `(pending, rows of the experts [T, D], routing)`; rows of weight 0 are zero."""
    pending, x = self._attend(state)
    real = state[f"{self.stack}_mask"] > 0
    if capacity == "call" and self.stack == "decoder":
      routing = self.moe.route(x.reshape(-1, 1, x.shape[-1]), real.reshape(-1, 1))
    else:
      routing = self.moe.route(x, real, dropping=capacity != "off")
    return pending, switch_moe.masked(x, routing), routing

  def after(self, pending: State, y: jax.Array) -> State:
    """Adds what the feed-forward network gave for the stream's tokens, `[..., D]`."""
    h = pending[self.stack]
    h = h + y.reshape(h.shape)
    return pending | {self.stack: layers.rms_norm(h, self.final_norm, self.eps) if hasattr(self, "final_norm") else h}

  def _attend(self, state: State) -> tuple[State, jax.Array]:
    """The state after attention, and the normed stream `[B, S, D]`."""
    h, seen = state[self.stack], (state["encoder_mask"] > 0)[:, None, None]
    x = layers.rms_norm(h, self.attention_norm, self.eps)
    keys, values = self.attention.keys_values(x)
    if self.stack == "encoder":
      h = h + self.attention(x, keys, values, bias=state["encoder_bias"], mask=seen)
    else:
      h = h + self.attention(x, keys, values, bias=state["decoder_bias"], causal=True)
      x = layers.rms_norm(h, self.cross_norm, self.eps)
      h = h + self.cross(x, *self.cross.keys_values(state["encoder"]), mask=seen)
    return state | {self.stack: h}, layers.rms_norm(h, self.ffn_norm, self.eps)


class Top(nnx.Module):
  """What stands around the blocks: embedding, both tables of position biases, the decoder's last norm, output."""

  def __init__(self, config: SwitchConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    c = config
    self.eps, self.tied, self.furthest = c.layer_norm_epsilon, c.tie_word_embeddings, c.relative_attention_max_distance
    self.start, self.pad = c.decoder_start_token_id, c.pad_token_id

    def normal(rows: int, columns: int, deviation: float = 1.0) -> nnx.Param:
      return layers.normal(rngs, rows, columns, deviation=deviation, dtype=dtype)

    self.embedding = normal(c.vocab_size, c.d_model)
    if c.separate_embeddings:
      self.encoder_embedding, self.decoder_embedding = (normal(c.vocab_size, c.d_model) for _ in range(2))
    self.encoder_bias, self.decoder_bias = (
        normal(c.relative_attention_num_buckets, c.num_heads, c.d_model**-0.5) for _ in range(2))
    self.norm = nnx.Param(jnp.ones(c.d_model, dtype))
    if not self.tied:
      self.output = normal(c.vocab_size, c.d_model)

  def embed(self, batch: Mapping[str, jax.Array], dtype: jnp.dtype) -> State:
    """The state before the first block, for a batch as `batch` (below) makes it.

    Returns:
      `encoder` `[B, S, D]` and `decoder` `[B, T, D]`; `encoder_bias` `[1, H, S, S]` and `decoder_bias` `[1, H, T, T]`;
      `encoder_mask` `[B, S]` and `decoder_mask` `[B, T]`, 0 at padding. All in `dtype`.
    """
    inputs, targets = batch["inputs"], batch["targets"]
    previous = jnp.where(targets < 0, self.pad, targets)[:, :-1]
    shifted = jnp.concatenate([jnp.full_like(targets[:, :1], self.start), previous], axis=1)
    return {
        "encoder": self.read("encoder", inputs, dtype),
        "decoder": self.read("decoder", shifted, dtype),
        "encoder_bias": self.bias("encoder", inputs.shape[1]).astype(dtype),
        "decoder_bias": self.bias("decoder", targets.shape[1]).astype(dtype),
        "encoder_mask": (inputs != self.pad).astype(dtype),
        "decoder_mask": (targets >= 0).astype(dtype),
    }

  def read(self, stack: str, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What a stack begins with, `[B, S]` int32 -> `[B, S, D]` in `dtype`."""
    return getattr(self, f"{stack}_embedding", self.embedding)[...].astype(dtype)[tokens]

  def bias(self, stack: str, length: int) -> jax.Array:
    """The bias on the logits of self-attention in a stack, `[1, H, length, length]`."""
    table = self.encoder_bias if stack == "encoder" else self.decoder_bias
    return t5_attention.position_bias(table[...], length, furthest=self.furthest, bidirectional=stack == "encoder")

  def bias_at(self, position: jax.Array, length: int) -> jax.Array:
    """The row of `bias("decoder", length)` for the query at `position` `[]`: `[1, H, 1, length]`."""
    return t5_attention.bias_at(self.decoder_bias[...], position, length, furthest=self.furthest)

  def logits(self, h: jax.Array) -> jax.Array:
    """`[B, T, D] -> [B, T, V]` float32, from the decoder's stream."""
    h = layers.rms_norm(h, self.norm, self.eps)
    weight, h = (self.embedding, h * h.shape[-1] ** -0.5) if self.tied else (self.output, h)
    return layers.unembed(h, weight[...])


class Switch(nnx.Module):
  """A Switch Transformer: `top` and `blocks`."""

  def __init__(self, config: SwitchConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
    self.top = Top(config, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List([Block(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.blocks)])


def build(config: SwitchConfig, dtype: jnp.dtype, seed: int = 0) -> Switch:
  """A Switch Transformer with random parameters in `dtype`."""
  return Switch(config, dtype=dtype, rngs=nnx.Rngs(seed))


NEIGHBOUR = 6.0  # nats by which a head begins to prefer the token beside its own


def init(config: SwitchConfig, seed: int) -> Switch:
  """A Switch Transformer with random float32 parameters, to be trained with Adam.

  T5's own values suit Adafactor, whose steps are relative to the size of a parameter. Adam's are absolute: a large
  embedding learns slowly, and position biases that begin near zero, the only positions there are, take a thousand steps
  to matter. So embedding and output begin small, position biases large, and what is written to the streams small.

  A decoder that reads its encoder finds there what it has just written, and takes what follows. Three things are laid
  down for that (in the spirit of mimetic initialization, arXiv 2305.09828): a head of the encoder for either neighbour
  of a token and one of the decoder for the last one; keys of cross-attention that are its queries, so that tokens find
  their like; and an untied output that begins as a small copy of the embedding. All three are needed: repeating the
  input is then learned in 150 steps, and otherwise has not begun by then (docs/switch_track.md).
  """
  model = build(config, jnp.float32, seed)
  scale = lambda parameter, factor: parameter.set_value(factor * parameter.get_value())
  top = model.top
  scale(top.embedding, 0.3)
  after = config.relative_attention_num_buckets // 2 + 1  # the bucket of the next token; that of the last one is 1
  for table, near in ((top.encoder_bias, (1, after)), (top.decoder_bias, (1,))):
    scale(table, 1.5 * config.d_model**0.5)
    for head, bucket in enumerate(near[:config.num_heads]):
      table.set_value(table.get_value().at[bucket, head].add(NEIGHBOUR))
  if not config.tie_word_embeddings:
    top.output.set_value(0.1 * top.embedding.get_value())
  for block in model.blocks:
    written = [block.attention.o, (block.moe if hasattr(block, "moe") else block.mlp).down]
    if block.stack == "decoder":
      written.append(block.cross.o)
      block.cross.k.set_value(block.cross.q.get_value() * config.d_kv**0.5)  # of the keys' usual size
    for parameter in written:
      scale(parameter, 0.3)
  return model


def batch(inputs: list[list[int]], targets: list[list[int]], config: SwitchConfig) -> dict[str, np.ndarray]:
  """Texts of several lengths as one batch, filled up on the right.

  Args:
    inputs: what the encoder reads, without padding.
    targets: what the decoder is to write, its end-of-text token included.
    config: names the padding.

  Returns:
    `{"inputs": [B, S], "targets": [B, T]}` int32, filled up with `pad_token_id` and `NO_TARGET`.
  """
  filled = {}
  for name, rows, fill in (("inputs", inputs, config.pad_token_id), ("targets", targets, NO_TARGET)):
    filled[name] = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for line, row in zip(filled[name], rows, strict=True):
      line[:len(row)] = row
  return filled


def losses(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
  """Cross-entropy of each target in nats, 0 where it is negative (padding): `[B, T, V]` -> `[B, T]` float32."""
  targets = batch["targets"]
  label = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
  picked = jnp.sum(jnp.where(label, logits, 0.0), axis=-1)
  return jnp.where(targets < 0, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked)


def training_loss(model: Switch, batch: Mapping[str, jax.Array], *, balance: float, z: float, dtype: jnp.dtype,
                  capacity: str = "sequence") -> tuple[jax.Array, dict]:
  """Mean loss of a target, plus the two losses of the routers, which are means over the MoE layers (at least one).

  Args:
    model: float32 parameters.
    batch: as `batch` makes it.
    balance: weight of the load-balancing loss (Switch Transformer, eq. 4), 0.01 there.
    z: weight of the router z-loss, the mean square of the log-sum-exp of a token's logits (ST-MoE, arXiv 2202.08906,
      eq. 5), 0.001 there.
    dtype: of the activations.
    capacity: the mode, one of `CAPACITY`.

  Returns:
    The loss, and `{"loss": nats per target, "balance": mean balancing loss, "z": mean z-loss, "load": [L, E] share of
    the tokens, "dropped": [L] share of the tokens beyond the capacity}`. Padding counts in none of them.
  """
  state, routers = model.top.embed(batch, dtype), []
  for block in model.blocks:
    state, routing = block(state, capacity)
    if routing is not None:
      routers.append(_router_losses(routing, state[f"{block.stack}_mask"].reshape(-1) > 0))
  loss = jnp.sum(losses(model.top.logits(state["decoder"]), batch)) / jnp.sum(batch["targets"] >= 0)
  metrics = {name: jnp.stack([layer[name] for layer in routers]) for name in routers[0]}
  metrics |= {name: jnp.mean(metrics[name]) for name in ("balance", "z")}
  return loss + balance * metrics["balance"] + z * metrics["z"], {"loss": loss, **metrics}


def _router_losses(routing: moe.Routing, real: jax.Array) -> dict[str, jax.Array]:
  """The losses and shares of one MoE layer; `real` `[T]` bool is false at padding."""
  experts, tokens = routing.logits.shape[-1], jnp.sum(real)
  mean = lambda values: jnp.sum(jnp.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0), axis=0) / tokens
  load = mean(jax.nn.one_hot(routing.experts[:, 0], experts))
  return {
      "balance": experts * jnp.sum(load * mean(jax.nn.softmax(routing.logits, axis=-1))),
      "z": mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2),
      "load": load,
      "dropped": mean((routing.weights[:, 0] == 0).astype(jnp.float32)),
  }


@dataclasses.dataclass(frozen=True)
class Functions(decoder.Functions):
  """See `decoder.Functions`. States and batches are those of `Top.embed`; losses are `[B, T]`, and 0 at padding.

  Attributes:
    dtype: of the activations.
    capacity: the mode, one of `CAPACITY`.
  """

  dtype: jnp.dtype
  capacity: str


def functions(dtype: jnp.dtype, capacity: str = "sequence") -> Functions:
  """The functions of any `Switch`, computing in `dtype`; the same object for the same arguments.

  Args:
    dtype: of the activations.
    capacity: one of `CAPACITY`.

  Raises:
    ValueError: no such mode.
  """
  if capacity not in CAPACITY:
    raise ValueError(f"capacity {capacity!r} is not one of {', '.join(CAPACITY)}")
  return _functions(jnp.dtype(dtype), capacity)


@functools.cache
def _functions(dtype: jnp.dtype, capacity: str) -> Functions:
  return Functions(
      dtype=dtype,
      capacity=capacity,
      embed=lambda top, batch: top.embed(batch, dtype),
      block=lambda block, state, tap=moe.no_tap: block(state, capacity, tap),
      head=lambda top, state: top.logits(state["decoder"]),
      losses=losses,
      sparse=lambda block: hasattr(block, "moe"),
      router=lambda block: block.moe.router.get_value(),
      with_router=lambda block, router: decoder.with_moe(block, {"router": router}),
      experts=lambda block: {name: getattr(block.moe, name).get_value() for name in PROJECTIONS},
      with_experts=decoder.with_moe,
      before=lambda block, state: block.before(state, capacity),
      expert=switch_moe.feed_forward,
      after=lambda block, pending, y: block.after(pending, y),
  )
