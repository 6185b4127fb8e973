"""lm-evaluation-harness 0.4.13, unpatched, on tasks over local files: the shipped model through our adapter.

The same rows are answered three times: by our model in the harness' own command line, by our own evaluation without the
harness, and by the harness' own model `hf`, torch on the same checkpoint.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import pytest
import torch
import transformers
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager

from moeq_jax.evaluate import lm_eval as adapter

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "experiments" / "models" / "moeq-small"
ROWS, ARTICLES, NEW = 60, 8, 16
UNTIL = ["\n", ". "]
SECONDS = 3600  # that the harness with our model may take at most, on a busy machine too
TOLERANCE = 1e-3  # nats, of a choice; of a text, per window
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                        for name in ("acc", "acc_norm", "acc_bytes")]},
    "local_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "local_generate": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": UNTIL, "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
}


class Found(NamedTuple):
  """What one way of evaluating found.

  Attributes:
    nats: of the choices of each question.
    rolling: log-likelihood of each text.
    generated: what each prompt is continued with.
    results: of the harness, `{task: {metric: value}}`.
  """

  nats: list[list[float]]
  rolling: list[float]
  generated: list[str]
  results: dict[str, dict[str, float]]


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
  """A jsonl file and a task over it, for each of `TASKS`; JSON is YAML."""
  for name, task in TASKS.items():
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
              "test_split": "test", "metadata": {"version": 1}}
    (folder / f"{name}.yaml").write_text(json.dumps(common | task))


def read(samples: dict[str, list[dict[str, Any]]], results: dict[str, dict[str, float]]) -> Found:
  """What the harness logged, in the order of the rows."""
  logged = {name: [row["filtered_resps"] for row in sorted(samples[name], key=lambda row: row["doc_id"])]
            for name in TASKS}
  return Found([[float(nats) for nats, _ in row] for row in logged["local_choice"]],
               [float(row[0]) for row in logged["local_rolling"]], [row[0] for row in logged["local_generate"]],
               results)


def through_the_command(folder: Path, python: str, checkpoint: Path = CHECKPOINT) -> subprocess.CompletedProcess:
  """The command of `moeq_jax/evaluate/lm_eval.py`, in this environment."""
  command = [sys.executable, "-P", "-m", "moeq_jax.evaluate.lm_eval", "run", "--model", "moeq", "--model_args",
             f"checkpoint={checkpoint},python={python}", "--tasks", ",".join(TASKS), "--include_path", str(folder),
             "--output_path", str(folder / "out"), "--log_samples"]
  return subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
                        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=SECONDS)


def harness(folder: Path, python: str) -> Found:
  done = through_the_command(folder, python)
  assert done.returncode == 0, done.stdout[-5000:]
  [place] = (folder / "out").iterdir()
  samples = {name: [json.loads(line) for line in next(place.glob(f"samples_{name}_*")).read_text().splitlines()]
             for name in TASKS}
  return read(samples, json.loads(next(place.glob("results_*")).read_text())["results"])


def harness_with_torch(folder: Path) -> Found:
  """The harness' model `hf` on the same checkpoint."""
  model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"),
                                                   bos_token="<|endoftext|>", eos_token="<|endoftext|>")
  found = lm_eval.simple_evaluate(
      huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=list(TASKS), bootstrap_iters=0,
      task_manager=TaskManager(include_path=str(folder)))
  return read(found["samples"], found["results"])


class All(NamedTuple):
  """All three, our answers, and how many windows each text makes; `ours` has no results of the harness."""

  adapted: Found
  ours: Found
  answers: list[dict[str, Any]]
  torch: Found
  windows: list[int]


@pytest.fixture(scope="module")
def found(ours: Any, project_python: str, tmp_path_factory: pytest.TempPathFactory) -> All:
  torch.set_num_threads(2)
  folder, common = tmp_path_factory.mktemp("lm_eval"), {"checkpoint": CHECKPOINT}
  (questions, articles), _ = ours([{"do": "rows", "task": "piqa", "limit": ROWS},
                                   {"do": "articles", "count": ARTICLES}])
  texts = [*articles[:-1], " ".join(articles)[:3000]]  # the last one is longer than the model's context
  prompts = [article[: 40 + 13 * i] for i, article in enumerate(articles)] + [texts[-1]]
  write(folder, {"local_choice": questions, "local_rolling": [{"text": text} for text in texts],
                 "local_generate": [{"prompt": prompt, "target": "none"} for prompt in prompts]})
  (answers, rolled, tokens, continued), _ = ours([
      common | {"do": "answers", "task": "piqa", "limit": ROWS}, common | {"do": "rolling", "texts": texts},
      common | {"do": "encode", "texts": texts},
      common | {"do": "continuations", "texts": prompts[:-1], "new": NEW, "until": UNTIL}])
  alone = Found([row["loglikelihoods"] for row in answers], rolled, continued, {})
  return All(harness(folder, project_python), alone, answers, harness_with_torch(folder),
             [math.ceil(len(row) / 256) for row in tokens])


def test_the_log_likelihoods_of_choices(found: All):
  for name, other in (("ours alone", found.ours), ("torch", found.torch)):
    furthest = max(abs(a - b) for row, theirs in zip(found.adapted.nats, other.nats, strict=True)
                   for a, b in zip(row, theirs, strict=True))
    print(f"{ROWS} questions against {name}: furthest {furthest:.1e} nats")
    assert furthest <= TOLERANCE
  assert len(found.adapted.nats) == ROWS


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes"])
def test_accuracies(found: All, metric: str):
  ours = sum(row["chosen"][metric] == row["gold"] for row in found.answers) / ROWS
  theirs = [results["local_choice"][f"{metric},none"] for results in (found.adapted.results, found.torch.results)]
  print(f"{metric}: {ours}")
  assert theirs == pytest.approx([ours, ours], abs=1e-9)
  assert 0.3 < ours < 0.8


def test_the_log_likelihoods_of_texts(found: All):
  assert max(found.windows) >= 3
  for name, other in (("ours alone", found.ours), ("torch", found.torch)):
    apart = [abs(a - b) / n for a, b, n in zip(found.adapted.rolling, other.rolling, found.windows, strict=True)]
    print(f"{len(apart)} texts of up to {max(found.windows)} windows against {name}: furthest {max(apart):.1e} nats")
    assert max(apart) <= TOLERANCE
  for metric in ("word_perplexity,none", "bits_per_byte,none"):
    a, b = (results["local_rolling"][metric] for results in (found.adapted.results, found.torch.results))
    assert a == pytest.approx(b, rel=1e-4)


def test_generated_texts(found: All):
  assert found.adapted.generated[:-1] == found.ours.generated
  assert found.adapted.generated == found.torch.generated  # the last prompt is cut on the left
  assert len(set(found.adapted.generated)) > ARTICLES // 2
  assert not any(stop in text for text in found.adapted.generated for stop in UNTIL)


def test_in_one_process_it_takes_any_function(tmp_path: Path):
  """As `moeq_jax.evaluation.harness` gives it, where both are installed: here a function stands for the model."""
  write(tmp_path, {"local_choice": [{"context": "a", "choices": ["b", "cc"], "gold": 1}],
                   "local_rolling": [{"text": "one two"}], "local_generate": [{"prompt": "p", "target": "answer"}]})
  asked = []

  def answer(method: str, requests: list[Any]) -> list[Any]:
    asked.append((method, requests))
    return {"loglikelihood": [[-2.0, False], [-1.0, True]], "rolling": [-8.0], "generate": ["answer"]}[method]

  results = lm_eval.simple_evaluate(adapter.Moeq(answer=answer), tasks=list(TASKS), bootstrap_iters=0,
                                    task_manager=TaskManager(include_path=str(tmp_path)))["results"]
  assert sorted(asked) == [
      ("generate", [["p", {"until": UNTIL, "max_new_tokens": NEW, "temperature": 0.0}]]),
      ("loglikelihood", [["a", " b"], ["a", " cc"]]), ("rolling", ["one two"])]
  assert results["local_choice"]["acc,none"] == results["local_generate"]["exact_match,none"] == 1
  assert results["local_rolling"]["word_perplexity,none"] == pytest.approx(math.exp(4))


def test_errors_say_what_to_do(tmp_path: Path, project_python: str):
  with pytest.raises(adapter.ServerError, match=r"nowhere.*not found"):
    adapter.Moeq(checkpoint=str(tmp_path / "nowhere"), python=project_python)
  with pytest.raises(adapter.ServerError, match="give python=PATH"):  # this environment has no jax
    adapter.Moeq(checkpoint=str(CHECKPOINT))
