"""The model `moeq` of lm-evaluation-harness 0.4.13: any of its tasks, on any model that this project opens.

The harness and this project need not share an environment. What answers is one of two:

- a process of the project's own Python, which is sent requests and sends answers as JSON lines (`Process`);
- a function in the same process, where both are installed (`moeq_jax.evaluation.harness`).

This file imports nothing but the standard library and the harness, and can be run in the harness' environment, with the
harness' own command line behind it:

  python -m moeq_jax.evaluate.lm_eval run --model moeq --model_args checkpoint=DIR,python=PYTHON --tasks piqa

A request is `{"id": n, "method": name, "requests": [...]}`, its answer `{"id": n, "result": [...]}` or
`{"id": n, "error": message}`; before the first request the process sends `{"ready": {...}}` or an error.

| method | a request | its answer |
|---|---|---|
| `loglikelihood` | `[context, continuation]` | `[nats, greedy]` |
| `rolling` | `text` | `nats` |
| `generate` | `[context, {"until": [...], "max_new_tokens": n, "temperature": t}]` | `text` |
"""

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
  from lm_eval.api import model as harness
  from lm_eval.api import registry
except ModuleNotFoundError:  # the other side of the line
  harness = registry = None

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10  # seconds that a process has to end by itself
NEW_TOKENS = 256  # where a task does not say; the harness' own
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing, in order of precedence
REMEDY = "give python=PATH, the Python of an environment with this project's packages"
Answer = Callable[[str, list[Any]], list[Any]]


class ServerError(RuntimeError):
  """The process that answers could not begin, refused a request, or ended."""


class Process:
  """A process that answers requests; it ends with this object, or with the program.

  Args:
    command: of the process.

  Attributes:
    about: what it says of its model: `length`, `joint`, `tokens`.
    close: called without arguments, ends it.

  Raises:
    ServerError: it cannot be started, or cannot open its model.
  """

  def __init__(self, command: Sequence[str]):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
      self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       encoding="utf-8", env=environment)
    except OSError as error:
      raise ServerError(f"{command[0]}: cannot be started ({error}); {REMEDY}") from None
    self.close = weakref.finalize(self, _end, self._process)
    self._sent = 0
    try:
      self.about: dict[str, Any] = self._receive("ready")
    except ServerError:
      self.close()
      raise

  def __call__(self, method: str, requests: list[Any]) -> list[Any]:
    """The answers to requests of one method, in their order.

    Raises:
      ServerError: the requests are refused, or the process has ended.
    """
    self._sent += 1
    try:
      self._process.stdin.write(json.dumps({"id": self._sent, "method": method, "requests": requests}) + "\n")
      self._process.stdin.flush()
    except (OSError, ValueError):  # a broken pipe, or one that was closed
      raise self._ended() from None
    return self._receive("result")

  def _receive(self, name: str) -> Any:
    line = self._process.stdout.readline()
    if not line.endswith("\n"):
      raise self._ended()
    try:
      message = dict(json.loads(line))
    except (ValueError, TypeError):
      raise ServerError(f"the process that answers said {line[:80]!r}; {REMEDY}") from None
    if "error" in message:
      raise ServerError(message["error"])
    if message.get("id", 0) != self._sent:
      raise ServerError(f"answer {message.get('id')} came to request {self._sent}")
    return message[name]

  def _ended(self) -> ServerError:
    self.close()
    return ServerError(f"the process that answers has ended with status {self._process.returncode}; what it said stands"
                       f" above{'' if self._sent else '; ' + REMEDY}")


def _end(process: subprocess.Popen) -> None:
  """Lets a process end, and waits for it."""
  with contextlib.suppress(OSError):
    process.stdin.close()
  process.stdout.close()
  try:
    process.wait(PATIENCE)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of the harness for one text, as a request of `generate` has them.

  Raises:
    ValueError: a way of sampling that is not supported, named.
  """
  known = {"until", "temperature", "do_sample", *LIMITS}
  neutral = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}
  for name, value in settings.items():
    if name not in known and neutral.get(name) != value and value is not None:
      raise ValueError(f"generation_kwargs: {name}={value!r} is not supported; known are {', '.join(sorted(known))}")
  until, sampled = settings.get("until") or [], settings.get("do_sample")
  temperature = float(settings.get("temperature") or 0.0)
  limits = [settings[name] for name in LIMITS if settings.get(name) is not None]
  return {"until": [until] if isinstance(until, str) else list(until),
          "max_new_tokens": int(limits[0] if limits else NEW_TOKENS),
          "temperature": 0.0 if sampled is False else temperature or float(bool(sampled))}


class Moeq(harness.LM if harness else object):
  """A model of this project, as the harness asks it.

  Args:
    checkpoint: the directory of the model.
    python: of an environment with this project's packages; by default the one that runs this.
    dtype: that the model computes in.
    capacity: of a Switch Transformer: sequence, call or off.
    answer: what answers, in place of a process.
    batch_size, max_batch_size, device: given by the harness to every model; not used.

  Raises:
    ValueError: no checkpoint.
    ServerError: see `Process`.
  """

  def __init__(self, checkpoint: str = "", python: str = sys.executable, dtype: str = "float32",
               capacity: str = "sequence", answer: Answer | None = None, batch_size: Any = None,
               max_batch_size: Any = None, device: Any = None):
    super().__init__()
    del batch_size, max_batch_size, device
    if not checkpoint and not answer:
      raise ValueError("model_args: which model? give checkpoint=DIR")
    command = [python, "-P", "-m", "moeq_jax.main", "serve", f"--checkpoint={checkpoint}", f"--dtype={dtype}",
               f"--capacity={capacity}"]
    self._answer = answer or Process(command)

  def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """`(nats, greedy)` of each `(context, continuation)`."""
    del disable_tqdm
    found = self._answer("loglikelihood", [list(request.args) for request in requests])
    return [(nats, greedy) for nats, greedy in found]

  def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of each text in nats."""
    del disable_tqdm
    return self._answer("rolling", [request.args[0] for request in requests])

  def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
    """What each context is continued with, up to a stop string."""
    del disable_tqdm
    return self._answer("generate", [[request.args[0], generation(request.args[1])] for request in requests])


if registry:
  registry.register_model("moeq")(Moeq)

if __name__ == "__main__":
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()
