"""One expert at a time: its errors at every width, or its codes at the widths of a plan.

A projection is encoded in slabs of columns, which do not depend on each other: the codes are those of the whole matrix,
to the bit, and what is in memory beside the weights as stored is a few times `SLAB`, whatever the codec. GPTQ adds the
second moment of a projection's inputs and its factor, `[K, K]` float32 each, made from the rows when they are needed,
shared by all widths (and by gate and up, which have the same inputs), and freed.

An expert without rows has no output errors and no gradients. GPTQ sees a moment of zeros and gives the codes of RTN;
`encode_layer` of `candidates`, which has all experts of a layer at hand, gives such experts the layer's mean moment.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, channels, codecs
from moeq_jax.kernels.chunks import chunks, fill

SLAB = 64 << 20  # bytes of a slab in float32
_PANEL = 2048  # rows of a moment that are summed at once
_HIGHEST = jax.lax.Precision.HIGHEST


def expert_errors(weights: Mapping[str, np.ndarray], rows: np.ndarray | None, mids: np.ndarray | None, *,
                  codec: codecs.Codec, widths: Sequence[int], grad_sq: Mapping[str, np.ndarray] | None = None,
                  total_tokens: int = 1) -> dict[str, np.ndarray | None]:
  """Encodes one expert at every width and measures what that does; the codes are dropped.

  Args:
    weights: `{projection: [K, N]}` in the dtype that they are stored in, finite.
    rows: `[R, D]`, inputs of gate and up; None without calibration.
    mids: `[R, F]`, inputs of down; None without calibration.
    codec: the codec.
    widths: candidate bits.
    grad_sq: `{projection: [N]}`, sums over these rows of squared derivatives of the summed token loss; or None.
    total_tokens: calibration tokens of the layer, by which `fisher` is divided.

  Returns:
    What `artifacts.ErrorTable` holds of one expert: `weight`, `output` and `fisher` `[P, W]`, `norm` `[P]`, float64;
    `output` is None without rows, `fisher` without rows or `grad_sq`.

  Raises:
    ValueError: a codec that needs rows gets none, or cannot encode a width to some use.
  """
  codec.check_widths(widths)
  names = [name for name in artifacts.PROJECTIONS if name in weights]
  table = {name: np.zeros((len(names), len(widths))) for name in ("weight", "output", "fisher")}
  norm = np.zeros(len(names))
  for p, (name, inputs, factor) in enumerate(_with_inputs(names, rows, mids, codec)):
    excited = None if inputs is None else _square_sums(inputs)
    for columns in _slabs(weights[name].shape):
      w = jnp.asarray(weights[name][:, columns])
      norm[p] += _square_sum(w)
      for i, bits in enumerate(widths):
        _, delta = _encode(codec, w, jnp.int32(bits), factor)
        table["weight"][p, i] += _square_sum(delta)
        if inputs is not None:
          table["output"][p, i] += sum(float(_square_output(fill(inputs[place], size), delta))
                                       for place, size in chunks(len(inputs)))
        if inputs is not None and grad_sq is not None:
          table["fisher"][p, i] += _weighed(delta, excited, np.asarray(grad_sq[name], np.float32)[columns])
  if rows is not None:
    table["fisher"] *= 0.5 / max(len(rows), 1) / total_tokens
  have = {"weight": True, "output": rows is not None, "fisher": rows is not None and grad_sq is not None}
  return {field: values if have[field] else None for field, values in table.items()} | {"norm": norm}


def channel_errors(weights: Mapping[str, np.ndarray], rows: np.ndarray | None, mids: np.ndarray | None, *,
                   codec: codecs.Codec, widths: Sequence[int], grad_sq: Mapping[str, np.ndarray] | None = None,
                   total_tokens: int = 1) -> dict[str, np.ndarray | None]:
  """As `expert_errors`, neuron by neuron.

  Args:
    weights, rows, mids, codec, widths, grad_sq, total_tokens: as for `expert_errors`.

  Returns:
    What `channels.ChannelErrors` holds of one expert with `axis="neurons"`: `weight` and `fisher` `[J, W]` float32;
    `fisher` is None without rows or `grad_sq`.

  Raises:
    ValueError: as `expert_errors`.
  """
  codec.check_widths(widths)
  names = [name for name in artifacts.PROJECTIONS if name in weights]
  found: dict[str, list[np.ndarray]] = {"weight": [], "fisher": []}
  for name, inputs, factor in _with_inputs(names, rows, mids, codec):
    along, (k, n) = channels.along(name, "neurons"), weights[name].shape
    excited = np.zeros(k, np.float32) if inputs is None else _square_sums(inputs)
    gradients = np.zeros(n, np.float32) if grad_sq is None else np.asarray(grad_sq[name], np.float32)
    own = np.zeros((2, weights[name].shape[along], len(widths)))
    for columns in _slabs(weights[name].shape):
      w = jnp.asarray(weights[name][:, columns])
      place = columns if along else slice(None)
      for i, bits in enumerate(widths):
        _, delta = _encode(codec, w, jnp.int32(bits), factor)
        own[:, place, i] += np.asarray(_channel_sums(along, delta, excited, gradients[columns]), np.float64)
    for kind, sums in zip(found, own, strict=True):
      found[kind].append(sums)
  weight, fisher = (np.concatenate(parts) for parts in found.values())
  measured = rows is not None and grad_sq is not None
  fisher = (fisher * (0.5 / max(len(rows), 1) / total_tokens)).astype(np.float32) if measured else None
  return {"weight": weight.astype(np.float32), "fisher": fisher}


def encode_expert(weights: Mapping[str, np.ndarray], rows: np.ndarray | None, mids: np.ndarray | None,
                  bits: Mapping[str, int | np.ndarray], *, codec: codecs.Codec) -> dict[str, codecs.Encoded]:
  """The codes of one expert.

  Args:
    weights, rows, mids, codec: as for `expert_errors`; codecs without data take None for rows and mids.
    bits: the width of each projection: one number, or one for every group, `[1, N]` or `[G, 1]`
      (`neurons.group_widths`).

  Returns:
    `{projection: Encoded}` of numpy arrays, in the order of `artifacts.PROJECTIONS`.

  Raises:
    ValueError: a codec that needs rows gets none, or cannot encode a width to some use.
  """
  bits = {name: np.asarray(own, np.int32) for name, own in bits.items()}
  codec.check_widths(np.unique(np.concatenate([own.ravel() for own in bits.values()])).tolist())
  encoded = {}
  names = [name for name in artifacts.PROJECTIONS if name in weights]
  for name, _, factor in _with_inputs(names, rows, mids, codec):
    own = bits[name]
    parts = [jax.tree.map(np.asarray, _encode(codec, weights[name][:, columns],
                                              own[:, columns] if own.size > 1 and len(own) == 1 else own, factor)[0])
             for columns in _slabs(weights[name].shape)]
    encoded[name] = codecs.Encoded(*(np.concatenate(field, axis=1) for field in zip(*parts)))
  return encoded


def _slabs(shape: tuple[int, int]) -> list[slice]:
  """Cuts the columns of `[K, N]` into equal slabs of at most `SLAB` bytes (the last may be narrower)."""
  rows, columns = shape
  count = -(-4 * rows * columns // SLAB)
  width = -(-columns // count)
  return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def _with_inputs(names: Sequence[str], rows: np.ndarray | None, mids: np.ndarray | None,
                 codec: codecs.Codec) -> Iterator[tuple[str, np.ndarray | None, jax.Array | None]]:
  """Each projection with its inputs, and the factor of their moment where the codec needs one."""
  seen, factor = None, None
  for name in names:
    inputs = mids if name == "down" else rows
    if codec.needs_moment and inputs is None:
      raise ValueError(f"{codec} needs the inputs of the experts: give calibration text, or take rtn or hqq")
    if codec.needs_moment and inputs is not seen:
      factor = None  # freed before the next one is made
      factor = _factorise(codec, _moment(inputs))
      seen = inputs
    yield name, inputs, factor


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: codecs.Codec, w: jax.Array, bits: jax.Array,
            factor: jax.Array | None) -> tuple[codecs.Encoded, jax.Array]:
  """Codes of `[K, n]` columns in any dtype, and what they add to the weights, float32."""
  w = w.astype(jnp.float32)
  encoded = codec.encode(w, bits, factor=factor)
  return encoded, codecs.decode(encoded, codec.group, w.shape[0]) - w


# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------


def _moment(inputs: np.ndarray) -> jax.Array:
  """Sum over rows of `x x^T`: `[R, K] -> [K, K]` float32."""
  moment = jnp.zeros((inputs.shape[1],) * 2, jnp.float32)
  for place, size in chunks(len(inputs)):
    moment = _add_moment(moment, fill(inputs[place], size))
  return moment


@functools.partial(jax.jit, donate_argnums=0)
def _add_moment(moment: jax.Array, rows: jax.Array) -> jax.Array:
  rows = rows.astype(jnp.float32)
  for start in range(0, rows.shape[1], _PANEL):
    part = jnp.matmul(rows[:, start:start + _PANEL].T, rows, precision=_HIGHEST)
    moment = moment.at[start:start + _PANEL].add(part)
  return moment


def _factorise(codec: codecs.Codec, moment: jax.Array) -> jax.Array:
  """The factor of a moment, which is given up; where it can, the factor takes its place in memory."""
  fits = jax.eval_shape(codec.factorise, moment).shape == moment.shape
  return (_factorise_in_place if fits else _factorise_beside)(codec, moment)


_factorise_in_place = jax.jit(codecs.Codec.factorise, static_argnums=0, donate_argnums=1)
_factorise_beside = jax.jit(codecs.Codec.factorise, static_argnums=0)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def _square_sums(inputs: np.ndarray) -> np.ndarray:
  """Sum of squares of every input, `[R, K] -> [K]` float32: the diagonal of the moment."""
  total = np.zeros(inputs.shape[1])
  for place, _ in chunks(len(inputs)):
    total += np.square(inputs[place].astype(np.float32)).sum(axis=0, dtype=np.float64)
  return total.astype(np.float32)


@jax.jit
def _square_sum(values: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(values.astype(jnp.float32)))


@jax.jit
def _square_output(rows: jax.Array, delta: jax.Array) -> jax.Array:
  """`sum_r ||x_r dW||^2` of rows `[R, K]`."""
  return jnp.sum(jnp.square(jnp.matmul(rows.astype(jnp.float32), delta, precision=_HIGHEST)))


@jax.jit
def _weighed(delta: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
  """`sum_kn inputs_k outputs_n dW_kn^2`."""
  return jnp.sum(jnp.matmul(inputs, jnp.square(delta), precision=_HIGHEST) * outputs)


@functools.partial(jax.jit, static_argnums=0)
def _channel_sums(along: int, delta: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
  """Of every column (`along` 1) or row (0) of `[K, n]`: the squares of `delta`, and the same weighed as in `_weighed`;
  `[2, n]` or `[2, K]`."""
  squared = jnp.square(delta)
  if along:
    return jnp.stack([jnp.sum(squared, axis=0), jnp.matmul(inputs, squared, precision=_HIGHEST) * outputs])
  return jnp.stack([jnp.sum(squared, axis=1), jnp.matmul(squared, outputs, precision=_HIGHEST) * inputs])
