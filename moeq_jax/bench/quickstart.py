"""`bench quickstart`: time and memory of the whole comparison, in a process of its own with nothing compiled before."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

LIMIT_SECONDS, LIMIT_GIB = 300.0, 3.0


def run(config: str = "configs/quickstart.py") -> dict[str, Any]:
  """Runs a comparison once, in an empty work directory and without a compilation cache.

  Args:
    config: the config file, with its argument.

  Returns:
    Wall seconds, peak resident memory in GiB, plans evaluated, and seconds of each stage; with the limits that the
    quickstart is built for (2 cores).

  Raises:
    RuntimeError: the comparison failed; what it printed stands above.
  """
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", "moeq_jax.main", "quickstart", f"--config={config}", f"--workdir={workdir}"]
    began = time.monotonic()
    status = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    seconds = time.monotonic() - began
    if status:
      raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    lines = (Path(workdir) / "timings.jsonl").read_text().splitlines()
    plans = len((Path(workdir) / "rows.jsonl").read_text().splitlines()) - 1
  stages = {row["stage"]: row["seconds"] for row in map(json.loads, lines)}
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  table = rich_table.Table("stage", "seconds", title=f"{plans} plans, {seconds:.0f} s, {peak:.2f} GiB")
  for stage, value in stages.items():
    table.add_row(stage, f"{value:.1f}")
  rich_console.Console().print(table)
  return {"seconds": seconds, "peak_gib": peak, "plans": plans, "stages": stages, "cores": os.cpu_count(),
          "limit_seconds": LIMIT_SECONDS, "limit_gib": LIMIT_GIB}
