"""The one door to the matmul of the experts, for plain arrays and packed weights, on every device.

Back-ends stand in one explicit table. Each says before anything is traced whether it takes a problem, because an error
while lowering under `jit` could not be caught. A back-end asked for by name either runs or fails with its reason.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax

from moeq_jax.kernels import cpu, cpu_int8, reference, varying
from moeq_jax.qtensor import QTensor


@functools.partial(jax.tree_util.register_dataclass, data_fields=["view"], meta_fields=["backend", "shape"])
@dataclasses.dataclass(frozen=True)
class Prepared:
  """Packed weights in the view of one back-end; a pytree, made by `prepare`.

  Attributes:
    view: what the back-end's module calls its view.
    backend: its name in `BACKENDS`.
    shape: `(E, K, N)`.
  """

  view: Any
  backend: str
  shape: tuple[int, int, int]


Weights = jax.Array | QTensor | Prepared


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to compute a grouped matmul.

  Attributes:
    supports: `((T, E, K, N), (dtype of x, dtype of w or None if packed), device) -> reason`, None if it can.
    forward: `(x, w, group_sizes, out_dtype) -> y`.
    backward: `(x, w, group_sizes, dy) -> (dx, dw)`; `dw` is None for packed weights.
    gated: `(x, gate, up, group_sizes, out_dtype) -> silu(x gate) * (x up)` for packed weights that are
      `cpu_loop.alike`, where that takes less than two products; else None.
    activations: which of `ACTIVATIONS` it computes with.
    proven: whether it has run on the device that it is made for; until then it is taken only when asked for by name.
    prepare: packed weights -> the view in which it reads them; None: it reads the QTensor as it is.
  """

  supports: Callable[[tuple[int, int, int, int], tuple[jnp.dtype, jnp.dtype | None], str], str | None]
  forward: Callable[[jax.Array, Weights, jax.Array, jnp.dtype], jax.Array]
  backward: Callable[[jax.Array, Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
  gated: Callable[..., jax.Array] | None = None
  activations: str = "exact"
  proven: bool = True
  prepare: Callable[[QTensor], Any] | None = None


def _late(module: str) -> dict[str, Callable[..., Any]]:
  """The functions of a module that is imported when one is called: importing Pallas takes a second."""
  def function(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(importlib.import_module(f"moeq_jax.kernels.{module}"), name)(*args, **kwargs)

  return {name: function(name) for name in ("supports", "forward", "backward", "prepare")}


ACTIVATIONS = ("exact", "int8")
BACKENDS = {  # in order of preference
  "pallas_tpu": Backend(**_late("pallas_tpu"), proven=False),
  "pallas_gpu": Backend(**_late("pallas_gpu")),
  "cpu": Backend(cpu.supports, cpu.forward, cpu.backward, cpu.gated),
  "cpu_int8": Backend(cpu_int8.supports, cpu_int8.forward, cpu_int8.backward, cpu_int8.gated, "int8"),
  "reference": Backend(reference.supports, reference.forward, reference.backward),
}
DTYPES = (jnp.float32, jnp.bfloat16)


def grouped_matmul(
  x: jax.Array,
  w: Weights,
  group_sizes: jax.Array,
  *,
  backend: str | None = None,
  out_dtype: jnp.dtype | None = None,
  activations: str = "exact",
) -> jax.Array:
  """`y[t] = x[t] @ w[e(t)]` for rows sorted by expert.

  Args:
    x: `[T, K]` float32 or bfloat16, the rows of expert 0 first. Its dtype is that of the products: float32 weights for
      float32 rows, bfloat16 weights with float32 accumulation for bfloat16 rows.
    w: `[E, K, N]` array, QTensor, or what `prepare` made of one. Inside `shard_map` a QTensor holds one shard.
    group_sizes: `[E]` integers, rows of each expert, zero allowed; they sum to T (checked where they are known: not
      inside `jit`, where rows that no expert has are undefined).
    backend: a name in `BACKENDS`; by default that of prepared weights, or the first proven one that takes the problem.
    out_dtype: float32 or bfloat16; by default that of x.
    activations: `"exact"`, or `"int8"`: rows are quantized to 8 bits where there are few (about half a percent of the
      output's norm is lost; the gradient is that of the exact product). Never used unless asked for.

  Returns:
    `[T, N]`. Differentiable in reverse mode in `x`, and in `w` if it is an array; a QTensor is a constant. `vmap` over
    `x` runs one matmul after the other.

  Raises:
    ValueError: shapes that do not fit, an unknown back-end, one that does not take the problem, or `vmap` over `w`.
  """
  x, group_sizes = jnp.asarray(x), checked(group_sizes, x, w)
  w = jax.tree.map(jnp.asarray, w)
  out_dtype = jnp.dtype(out_dtype or x.dtype)
  for name, dtype in (("x", x.dtype), ("out_dtype", out_dtype)):
    if dtype not in DTYPES:
      raise ValueError(f"grouped_matmul: {name} is {dtype}; it takes float32 and bfloat16")
  name = choose(x, w, backend, activations=activations)
  view = w.view if isinstance(w, Prepared) else w
  return _matmul(name, out_dtype, *varying.unify(x, view, group_sizes))


def prepare(q: QTensor, backend: str | None = None) -> QTensor | Prepared:
  """Packed weights as a back-end reads them, to be made once, when a model is loaded, and not at every call.

  Args:
    q: one shard.
    backend: a name in `BACKENDS`; by default none: `q` is kept, which every back-end reads and which has a gradient;
      where `pallas_gpu` takes it, it is viewed anew in every call.

  Returns:
    `q` itself where the back-end reads it as it is. Views of `pallas_gpu` are for inference: they have no gradient.

  Raises:
    ValueError: an unknown back-end, a damaged QTensor, or one that the back-end cannot view.
  """
  if backend is not None and backend not in BACKENDS:
    raise ValueError(f"prepare: unknown back-end {backend!r}; there are {list(BACKENDS)}")
  _check_packed(q)
  if backend is None or BACKENDS[backend].prepare is None:
    return q
  return Prepared(BACKENDS[backend].prepare(jax.tree.map(jnp.asarray, q)), backend, q.shape)


def checked(group_sizes: jax.Array, x: jax.Array, w: Weights) -> jax.Array:
  """The group sizes as int32, once everything is seen to fit that can be seen without values being known.

  Raises:
    ValueError: names what does not fit.
  """
  group_sizes = group_sizes if isinstance(group_sizes, jax.Array) else np.asarray(group_sizes)
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError(f"grouped_matmul: group_sizes are {group_sizes.dtype}, and numbers of rows are integers")
  if isinstance(w, QTensor):
    _check_packed(w)
  elif isinstance(w, Prepared):
    pass
  elif not (hasattr(w, "dtype") and jnp.issubdtype(w.dtype, jnp.floating)):
    raise ValueError(f"grouped_matmul: w is {getattr(w, 'dtype', type(w).__name__)}, and weights are floating-point"
                     " arrays or QTensors; packed bytes need their QTensor (qtensor.pack, container.load)")
  if x.ndim != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
    raise ValueError(
      f"grouped_matmul: x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape} are not [T, K], [E, K, N], [E]"
    )
  if not isinstance(group_sizes, jax.core.Tracer):
    sizes = np.asarray(group_sizes)
    if sizes.min(initial=0) < 0 or int(sizes.sum()) != x.shape[0]:
      raise ValueError(f"grouped_matmul: group_sizes sum to {int(sizes.sum())}, but x has {x.shape[0]} rows; the least"
                       f" is {sizes.min(initial=0)}")
  return jnp.asarray(group_sizes, jnp.int32)


def _check_packed(q: QTensor) -> None:
  if q.shards > 1:
    raise ValueError(f"grouped_matmul: w holds {q.shards} shards; call it inside shard_map, with shards.specs")
  known = not any(isinstance(leaf, jax.core.Tracer) for leaf in (q.bits, q.offset))
  (q.validate if known else q.validate_shapes)("grouped_matmul: w")


def choose(x: jax.Array, w: Weights, backend: str | None = None, device: str | None = None, *,
           activations: str = "exact") -> str:
  """The name of the back-end that takes `x @ w` on `device` (by default the platform that jax computes on).

  Raises:
    ValueError: no such back-end; the one asked for does not take the problem; none does. With every reason.
  """
  if isinstance(w, Prepared):
    if backend not in (None, w.backend):
      raise ValueError(f"grouped_matmul: w was prepared for {w.backend}, and {backend} cannot read it; give the"
                       " QTensor")
    backend = w.backend
  if backend is not None and backend not in BACKENDS:
    raise ValueError(f"grouped_matmul: unknown back-end {backend!r}; there are {list(BACKENDS)}")
  if activations not in ACTIVATIONS:
    raise ValueError(f"grouped_matmul: activations={activations!r} is not one of {ACTIVATIONS}")
  dtypes = x.dtype, None if isinstance(w, QTensor | Prepared) else w.dtype
  shape, reasons = (x.shape[0], *w.shape), []
  for name in [backend] if backend else (n for n, b in BACKENDS.items() if b.proven and b.activations == activations):
    reason = BACKENDS[name].supports(shape, dtypes, device or jax.default_backend())
    if reason is None:
      return name
    reasons.append(f"{name}: {reason}")
  raise ValueError(f"grouped_matmul: no back-end for (T, E, K, N) = {shape}, dtypes {dtypes}: {'; '.join(reasons)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(backend: str, out_dtype: jnp.dtype, x: jax.Array, w: Weights, group_sizes: jax.Array) -> jax.Array:
  run = functools.partial(BACKENDS[backend].forward, out_dtype=out_dtype)
  return refuse_batched_weights(run)(x, w, group_sizes)


def _forward(backend: str, out_dtype: jnp.dtype, x: jax.Array, w: Weights, group_sizes: jax.Array) -> Any:
  return _matmul(backend, out_dtype, x, w, group_sizes), (x, w, group_sizes)


def _backward(backend: str, out_dtype: jnp.dtype, saved: Any, dy: jax.Array) -> Any:
  del out_dtype
  dx, dw = refuse_batched_weights(BACKENDS[backend].backward)(*saved, dy)
  return dx, dw, None


_matmul.defvjp(_forward, _backward)


def refuse_batched_weights(run: Callable[..., Any]) -> Callable[..., Any]:
  """`run(x, w, ...)` with its own rule for `vmap`: one call after the other, and an error if `w` is batched."""
  call = custom_batching.custom_vmap(run)

  @call.def_vmap
  def rule(size: int, batched: Any, *args: Any) -> Any:
    if any(jax.tree.leaves(batched[1])):
      raise ValueError(
        "grouped_matmul: vmap over w would unpack every weight at every width at once; loop with lax.map or lax.scan"
      )

    def one(index: jax.Array) -> Any:
      return call(*jax.tree.map(lambda leaf, many: jnp.asarray(leaf)[index] if many else leaf, args, tuple(batched)))

    out = lax.map(one, jnp.arange(size))
    return out, jax.tree.map(lambda _: True, out)

  return call
