"""The report of a run: `write(workdir)` makes page, markdown and figures, `terminal(rows, console)` prints a table.

What is read from the workdir is described in `page.py` (a comparison) and `quantized.py` (one quantized model).
"""

from pathlib import Path

from moeq_jax.report import page, quantized
from moeq_jax.report.tables import terminal

__all__ = ["terminal", "write"]


def write(workdir: Path) -> Path:
  """Writes the page of a run into its `workdir`, and returns its path; errors as in `page.write`."""
  workdir = Path(workdir)
  data = page.load(workdir / "report.json")
  return quantized.write(workdir, data) if data.get("page") == "quantized" else page.write(workdir)
