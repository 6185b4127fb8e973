"""A progress bar on a terminal, an occasional line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich import console as rich_console
from rich import progress as rich_progress

EVERY_SECONDS = 15.0
Advance = Callable[..., None]


@contextlib.contextmanager
def bar(title: str, total: int, start: int = 0) -> Iterator[Advance]:
  """Shows the progress of `total` steps, of which `start` are done.

  Yields:
    `advance(note="", steps=1)`: call it after each step; `note` is shown beside the bar (loss, tokens/s).
  """
  console = rich_console.Console(stderr=True)
  shown = _terminal(title, total, start, console) if console.is_terminal else _lines(title, total, start)
  with shown as advance:
    yield advance


@contextlib.contextmanager
def _terminal(title: str, total: int, start: int, console: rich_console.Console) -> Iterator[Advance]:
  columns = (
      rich_progress.TextColumn("{task.description}"),
      rich_progress.BarColumn(bar_width=30),
      rich_progress.MofNCompleteColumn(),
      rich_progress.TimeElapsedColumn(),
      rich_progress.TextColumn("left"),
      rich_progress.TimeRemainingColumn(),
      rich_progress.TextColumn("{task.fields[note]}"),
  )
  with rich_progress.Progress(*columns, console=console) as shown:
    task = shown.add_task(title, total=total, completed=start, note="")
    yield lambda note="", steps=1: shown.update(task, advance=steps, note=note)


@contextlib.contextmanager
def _lines(title: str, total: int, start: int) -> Iterator[Advance]:
  began = last = time.monotonic()
  done = start

  def advance(note: str = "", steps: int = 1) -> None:
    nonlocal last, done
    done += steps
    now = time.monotonic()
    if now - last >= EVERY_SECONDS or (done == total and now - began >= 2):
      last = now
      left = (now - began) / max(done - start, 1) * (total - done)
      print(f"{title}: {done}/{total}, {now - began:.0f} s, {left:.0f} s left {note}", file=sys.stderr, flush=True)

  yield advance
