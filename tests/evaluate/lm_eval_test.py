"""The harness' model without the harness: settings of generation; a process that answers, ends, or talks nonsense."""

import gc
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from moeq_jax.evaluate import lm_eval

READY = 'print(json.dumps({"ready": {"length": 7}}), flush=True)'
ECHO = """
for line in sys.stdin:
  request = json.loads(line)
  answer = {"error": "refused"} if request["method"] == "refuse" else {"result": request["requests"]}
  print(json.dumps({"id": request["id"]} | answer), flush=True)
"""


def process(*lines: str) -> lm_eval.Process:
  return lm_eval.Process([sys.executable, "-c", "\n".join(["import json, sys, time", *lines])])


def request(*arguments: Any) -> types.SimpleNamespace:
  """What the harness hands over, as far as it is read."""
  return types.SimpleNamespace(args=arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


def test_requests_are_answered_in_turn():
  answering = process(READY, ECHO)
  assert answering.about == {"length": 7}
  for requests in ([["ä\n\"", "\u2028"]], [], ["x" * 200_000]):
    assert answering("any", requests) == requests
  with pytest.raises(lm_eval.ServerError, match="refused"):
    answering("refuse", [])
  assert answering("any", [1]) == [1]
  answering.close()
  with pytest.raises(lm_eval.ServerError, match="ended with status 0"):
    answering("any", [])


def test_it_ends_with_its_object():
  answering = process(READY, ECHO)
  child = answering._process
  del answering
  gc.collect()
  assert child.poll() == 0


def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(lm_eval, "PATIENCE", 0.1)
  answering = process(READY, "time.sleep(60)")
  child = answering._process
  answering.close()
  assert child.poll() == -9


@pytest.mark.parametrize(("lines", "said"), [
    (['print(json.dumps({"error": "DIR: not found"}))'], "DIR: not found"),
    (["sys.exit(3)"], "status 3.*give python=PATH"),
    (['print("usage: tool")'], "said 'usage: tool.*give python=PATH"), (["print(1)"], "said '1.*give python=PATH")])
def test_what_does_not_begin_says_why(lines: list[str], said: str):
  with pytest.raises(lm_eval.ServerError, match=said):
    process(*lines)


def test_what_ends_in_between_says_so():
  answering = process(READY, "sys.stdin.readline()", "sys.exit(4)")
  with pytest.raises(lm_eval.ServerError, match="status 4; what it said stands above$"):
    answering("any", [])
  with pytest.raises(lm_eval.ServerError, match="status 4"):
    answering("any", [])


def test_an_answer_to_another_request_is_refused():
  answering = process(READY, 'print(json.dumps({"id": 9, "result": []}), flush=True)', "sys.stdin.read()")
  with pytest.raises(lm_eval.ServerError, match="answer 9 came to request 1"):
    answering("any", [])
  answering.close()


def test_a_python_that_is_not_there_is_named():
  with pytest.raises(lm_eval.ServerError, match="nowhere.*cannot be started.*give python=PATH"):
    lm_eval.Moeq(checkpoint="DIR", python="nowhere")
  with pytest.raises(ValueError, match="give checkpoint=DIR"):
    lm_eval.Moeq()


def test_the_process_is_told_how_to_open_the_model(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(lm_eval, "Process", lambda command: command)
  command = lm_eval.Moeq(checkpoint="DIR", python="py", dtype="bfloat16", capacity="off")._answer
  assert command[0] == "py" and command[-4:] == ["serve", "--checkpoint=DIR", "--dtype=bfloat16", "--capacity=off"]


def test_the_file_needs_nothing_but_the_standard_library():
  done = subprocess.run([sys.executable, "-S", "-P", "-c", "import moeq_jax.evaluate.lm_eval"], check=False,
                        env=os.environ | {"PYTHONPATH": str(lm_eval.ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def test_requests_and_answers_of_the_harness():
  found = {"loglikelihood": [[-1.5, True]], "rolling": [-9.0], "generate": ["text"]}
  asked = []
  model = lm_eval.Moeq(answer=lambda method, requests: asked.append((method, requests)) or found[method], batch_size=1)
  assert model.loglikelihood([request("a", " b")]) == [(-1.5, True)]
  assert model.loglikelihood_rolling([request("whole")], disable_tqdm=True) == [-9.0]
  assert model.generate_until([request("p", {"until": "\n", "max_gen_toks": 4})]) == ["text"]
  assert asked == [("loglikelihood", [["a", " b"]]), ("rolling", ["whole"]),
                   ("generate", [["p", {"until": ["\n"], "max_new_tokens": 4, "temperature": 0.0}]])]


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, ([], 256, 0.0)),
    ({"until": ["a", "b"], "max_tokens": 3, "max_new_tokens": 5}, (["a", "b"], 5, 0.0)),
    ({"until": None, "max_gen_toks": 7, "max_new_tokens": 5, "temperature": None}, ([], 7, 0.0)),
    ({"temperature": 0.7}, ([], 256, 0.7)), ({"temperature": 0.7, "do_sample": False}, ([], 256, 0.0)),
    ({"do_sample": True}, ([], 256, 1.0)), ({"do_sample": True, "temperature": 0.5}, ([], 256, 0.5)),
    ({"top_p": 1.0, "num_beams": 1, "top_k": None}, ([], 256, 0.0))])
def test_settings_of_generation(settings: dict[str, Any], expected: tuple):
  assert tuple(lm_eval.generation(settings).values()) == expected


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"num_beams": 4}, {"max_length": 30}])
def test_what_is_not_supported_is_named(settings: dict[str, Any]):
  name, value = next(iter(settings.items()))
  with pytest.raises(ValueError, match=f"{name}={value} is not supported; known are"):
    lm_eval.generation(settings)
