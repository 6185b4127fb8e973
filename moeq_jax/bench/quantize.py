"""How fast the codecs encode one large matrix, beside plain numpy with the same formulas."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import codecs, progress
from moeq_jax.bench import _numpy_codecs

BITS = (2, 4)
CODECS = ("rtn", "hqq", "gptq")  # those that `_numpy_codecs` has, too


@dataclasses.dataclass(frozen=True)
class _Case:
  """One matrix `w [K, N]` and the second moment `[K, K]` of its inputs, both float32."""

  w: np.ndarray
  moment: np.ndarray


def run(rows: int = 4096, columns: int = 4096, group: int = 128, repeats: int = 3) -> dict[str, Any]:
  """Weights per second of RTN, HQQ and GPTQ at 2 and 4 bits, and the ratio to numpy in the same run.

  The time is the median of `repeats` runs after one that compiles; numpy runs once. Both encode the same float32
  matrix, and both squared errors are given: weights for RTN and HQQ, outputs for GPTQ.

  Args:
    rows: K, inputs of the matrix.
    columns: N, its outputs.
    group: rows that share a scale.
    repeats: timed runs per codec and width.

  Returns:
    A JSON-able dictionary with one entry per codec and width under `results`.
  """
  case = _case(rows, columns)
  results = []
  with progress.bar("quantize", len(CODECS) * len(BITS)) as advance:
    for name in CODECS:
      codec = codecs.get(f"{name}(group={group})")
      encode = jax.jit(codec.encode)
      started = time.perf_counter()
      encode = encode.lower(case.w, jnp.int32(0), case.moment).compile()
      compiling = time.perf_counter() - started
      for bits in BITS:
        results.append({"codec": name, "bits": bits, "compile_seconds": compiling,
                        **_compare(case, codec, encode, bits, repeats)})
        advance(f"{name} at {bits} bits")
  result = {"benchmark": "quantize", "rows": rows, "columns": columns, "group": group, "repeats": repeats,
            "numpy_repeats": 1, "machine": _machine(), "results": results}
  _show(result)
  return result


def _case(rows: int, columns: int) -> _Case:
  """Gaussian weights, and 2 K tokens of inputs that share K / 16 common factors."""
  random = np.random.default_rng(0)
  factors = random.standard_normal((2 * rows, max(rows // 16, 1)), np.float32)
  inputs = factors @ random.standard_normal((factors.shape[1], rows), np.float32) / np.float32(factors.shape[1] ** 0.5)
  inputs += 0.5 * random.standard_normal(inputs.shape, np.float32)
  return _Case(0.02 * random.standard_normal((rows, columns), np.float32), inputs.T @ inputs)


def _compare(case: _Case, codec: codecs.Codec, encode: Callable[..., codecs.Encoded], bits: int,
             repeats: int) -> dict[str, float]:
  """Times and errors of one codec at one width, in JAX and in numpy."""
  w, moment, width = jnp.asarray(case.w), jnp.asarray(case.moment), jnp.int32(bits)
  seconds = []
  for _ in range(repeats):
    started = time.perf_counter()
    encoded = jax.block_until_ready(encode(w, width, moment))
    seconds.append(time.perf_counter() - started)
  plain = getattr(_numpy_codecs, codec.name)
  started = time.perf_counter()
  oracle = plain(case.w, bits, *((case.moment,) if codec.name == "gptq" else ()), group=codec.group)
  numpy_seconds = time.perf_counter() - started
  oracle = codecs.Encoded(oracle[0], oracle[1].astype(jnp.bfloat16), oracle[2].astype(jnp.bfloat16))
  error, numpy_error = (float(codecs.errors(w, jax.tree.map(jnp.asarray, e), moment)[codec.name == "gptq"])
                        for e in (encoded, oracle))
  median = statistics.median(seconds)
  return {"seconds": median, "weights_per_second": w.size / median, "numpy_seconds": numpy_seconds,
          "numpy_weights_per_second": w.size / numpy_seconds, "ratio_to_numpy": numpy_seconds / median,
          "squared_error": error, "numpy_squared_error": numpy_error}


def _machine() -> dict[str, Any]:
  """What the times depend on: cores, device, numpy's BLAS and the variables that steer its kernels and threads."""
  blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
  steering = {name: value for name, value in sorted(os.environ.items())
              if name.startswith(("OPENBLAS_", "OMP_NUM", "MKL_NUM"))}
  return {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
          "numpy": np.__version__, "blas": f"{blas['name']} {blas['version']}", "environment": steering}


def _show(result: dict[str, Any]) -> None:
  machine = result["machine"]
  table = rich_table.Table(
      title=f"encode {result['rows']} x {result['columns']}, group {result['group']}: million weights per second",
      caption=f"{machine['cores']} cores, {machine['device']}; numpy {machine['numpy']} on {machine['blas']} "
              f"{machine['environment'] or ''}")
  for heading in ("codec", "bits", "seconds", "jax", "numpy", "ratio", "error", "numpy's error"):
    table.add_column(heading, justify="left" if heading == "codec" else "right")
  for row in result["results"]:
    table.add_row(row["codec"], str(row["bits"]), f"{row['seconds']:.2f}", f"{row['weights_per_second'] / 1e6:.1f}",
                  f"{row['numpy_weights_per_second'] / 1e6:.2f}", f"{row['ratio_to_numpy']:.1f}x",
                  f"{row['squared_error']:.5g}", f"{row['numpy_squared_error']:.5g}")
  rich_console.Console().print(table)
