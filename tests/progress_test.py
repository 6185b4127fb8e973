"""Progress on a terminal and elsewhere, with a clock of the test's own."""

import io
import re

import pytest
from rich import console as rich_console

from moeq_jax import progress


class Clock:
  """A clock that moves when it is told to."""

  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  made = Clock()
  monkeypatch.setattr(progress.time, "monotonic", made)
  return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
  """What a terminal of 200 columns would show."""
  shown, kind = io.StringIO(), rich_console.Console
  monkeypatch.setattr(progress.rich_console, "Console", lambda stderr: kind(
      file=shown, stderr=stderr, force_terminal=True, width=200, color_system=None, legacy_windows=False))
  return shown


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
  out, err = capsys.readouterr()
  assert out == ""
  return err.splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Without a terminal
# ---------------------------------------------------------------------------------------------------------------------


def test_a_line_now_and_then_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]):
  with progress.bar("train", 10) as advance:
    for step in range(10):
      clock.now += 4
      advance(note=f"loss {step}")
  # 16 and 32 s are the first steps 15 s after the line before; 40 s is the end
  assert lines(capsys) == ["train: 4/10, 16 s, 24 s left loss 3", "train: 8/10, 32 s, 8 s left loss 7",
                           "train: 10/10, 40 s, 0 s left loss 9"]


def test_what_was_done_before_counts_as_done_but_not_as_fast(clock: Clock, capsys: pytest.CaptureFixture[str]):
  with progress.bar("train", 1000, start=900) as advance:
    clock.now += 20
    advance(steps=10)
  assert lines(capsys) == ["train: 910/1000, 20 s, 180 s left "]  # ten steps in 20 s, 90 to go


def test_steps_that_are_done_at_once_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]):
  with progress.bar("encode", 3) as advance:
    for _ in range(3):
      clock.now += 0.3
      advance()
  assert lines(capsys) == []


def test_nothing_to_do_and_errors_inside(clock: Clock, capsys: pytest.CaptureFixture[str]):
  with progress.bar("train", 5, start=5):
    clock.now += 60
  with pytest.raises(KeyError), progress.bar("train", 5) as advance:
    advance()
    raise KeyError
  assert lines(capsys) == []


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal
# ---------------------------------------------------------------------------------------------------------------------


def last_frame(shown: io.StringIO) -> str:
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown.getvalue())
  return [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]


def test_a_bar_with_the_note(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]):
  with progress.bar("measure damage", 8, start=2) as advance:
    advance(note="loss 3.1, 50 tokens/s")
    advance(note="loss 2.9, 60 tokens/s", steps=2)
  frame = last_frame(terminal)
  assert "measure damage" in frame
  assert re.search(r"\b5/8\b", frame)
  assert "left" in frame
  assert frame.rstrip().endswith("loss 2.9, 60 tokens/s")
  assert lines(capsys) == []


def test_the_bar_goes_away_on_an_error_and_leaves_the_cursor(terminal: io.StringIO):
  with pytest.raises(KeyError), progress.bar("train", 8) as advance:
    advance()
    raise KeyError
  assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # shown again
