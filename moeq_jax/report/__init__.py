"""The report of a run: `write(workdir)` makes page, markdown and figures, `terminal(rows, console)` prints a table.

What is read from the workdir is described in `page.py`.
"""

from moeq_jax.report.page import write
from moeq_jax.report.tables import terminal

__all__ = ["terminal", "write"]
