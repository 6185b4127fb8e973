"""Other grouped matmuls on a Hopper GPU, each optional: what is not installed or fails is named, with the reason.

Those of torch and Humming run in a process of their own, which shares nothing with jax but the problem. Humming
compiles for every shape and width when it is first called, which takes most of the timeout.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax

from moeq_jax.kernels import ragged

CALLS = 8  # calls per timed batch


def jax_peers(skipped: dict[str, str]) -> dict[str, Callable[..., jax.Array]]:
  """bfloat16 grouped matmuls that take `(x, w, group_sizes)`; reasons go into `skipped`."""
  peers = {"lax.ragged_dot": jax.lax.ragged_dot, "row tiles (XLA)": functools.partial(ragged.matmul, tile=64)}
  try:
    mosaic = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    peers["ragged_dot_mgpu"] = lambda x, w, sizes: mosaic.ragged_dot(
      x, w, group_sizes=sizes, block_m=64, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4)
  except ImportError as error:
    skipped["ragged_dot_mgpu"] = str(error)
  try:
    tokamax = importlib.import_module("tokamax")
    peers["tokamax.ragged_dot"] = lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes)
  except ImportError as error:
    skipped["tokamax.ragged_dot"] = str(error)
  return peers


def other_peers(
  shape: tuple[int, int, int], sizes: Sequence[int], mixes: dict[str, list[int]], repeats: int,
  skipped: dict[str, str], timeout: float = 300,
) -> list[tuple[str, str, float]]:
  """Humming at every mix of widths and torch's bfloat16 grouped matmul: `(peer, mix, seconds)`.

  Args:
    shape: `(E, K, N)`.
    sizes: rows of each expert.
    mixes: widths of all experts by name. Humming has one width per launch, so that a mix is a launch per width.
    repeats: timed batches; their median counts.
    skipped: gets the reason of every peer that did not run.
    timeout: seconds for each peer.
  """
  found, problem = [], {"shape": list(shape), "sizes": [int(n) for n in sizes], "mixes": mixes,
                        "repeats": repeats, "calls": CALLS}
  for peer, code in (("humming", _HUMMING), ("torch._grouped_mm", _TORCH)):
    try:
      command = [sys.executable, "-c", _COMMON + code, json.dumps(problem)]
      child = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                             env={**os.environ, "PYTHONPATH": ""})
    except subprocess.TimeoutExpired:
      skipped[peer] = f"took more than {timeout:g} s"
      continue
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    found += [(peer, line["mix"], line["seconds"]) for line in lines if "seconds" in line]
    reasons = [f"{line['mix']}: {line['error']}" for line in lines if "error" in line]
    if child.returncode:
      reasons += (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1:]
    if reasons:
      skipped[peer] = "; ".join(reasons)[:400]
  return found


_COMMON = """
import json, statistics, sys, torch
problem = json.loads(sys.argv[1])
(E, K, N), sizes, calls = problem["shape"], problem["sizes"], problem["calls"]
normal = lambda *size: torch.randn(*size, dtype=torch.bfloat16, device="cuda")

def seconds(call):
  for index in range(calls):  # compiles and warms up
    call(index)
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    for index in range(calls):
      call(index)
  times, edge = [], lambda: torch.cuda.Event(enable_timing=True)
  filled = torch.zeros(240 << 20, dtype=torch.uint8, device="cuda")
  for _ in range(problem["repeats"]):
    start, stop = edge(), edge()
    filled += 1  # overwrites the L2 cache
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(stop) / 1e3 / calls)
  return statistics.median(times)

def report(mix, make):
  try:
    print(json.dumps({"mix": mix, "seconds": seconds(make())}), flush=True)
  except Exception as error:
    print(json.dumps({"mix": mix, "error": f"{type(error).__name__}: {str(error)[:200]}"}), flush=True)
"""

_TORCH = """
def make():
  offsets = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
  x, w = normal(sum(sizes), K), [normal(E, K, N) for _ in range(calls)]
  return lambda index: torch._grouped_mm(x, w[index], offs=offsets)

report("16", make)
"""

_HUMMING = """
from humming.layer import HummingLayer

def layer(bits, experts):
  made = HummingLayer(shape_n=N, shape_k=K, num_experts=experts, torch_dtype=torch.bfloat16,
                      weight_config={"dtype": f"uint{bits}", "group_size": 128}).cuda()
  for name, value in made.state_dict().items():
    if name.startswith("weight"):
      value.random_(-2**31, 2**31 - 1) if value.dtype == torch.int32 else value.normal_(std=0.01)
  made.transform()
  return made

def make_mix(widths):
  parts = []
  for bits in sorted(set(widths)):
    rows = [n for n, b in zip(sizes, widths) if b == bits]
    layout = torch.tensor([0, *rows], device="cuda").cumsum(0).to(torch.int64)
    if sum(rows):
      parts.append(([layer(bits, len(rows)) for _ in range(calls)], normal(sum(rows), K), layout))
  return lambda index: [made[index](x, expert_layout=layout, compute_config={"gemm_type": "grouped_contiguous"})
                        for made, x, layout in parts]

for name, widths in problem["mixes"].items():
  report(name, lambda: make_mix(widths))
"""
