"""Our side of the checks: `python ours.py FOLDER` does the jobs in FOLDER/jobs.json, in the project's environment.

A job is `{"do": name, ...}`; arrays come from FOLDER/given.npz and go to FOLDER/left.npz under the job's `as`; what
JSON holds goes to FOLDER/answers.json, one answer a job.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moeq_jax import codecs, data, language_model, qtensor, upcycling
from moeq_jax.evaluate import questions, tasks, text
from moeq_jax.export import compressed_tensors, huggingface, native
from moeq_jax.models import convert, names

Arrays = dict[str, np.ndarray]
_opened: dict[tuple[str, str], language_model.LanguageModel] = {}


def model(job: dict[str, Any]) -> language_model.LanguageModel:
  """The model of a job; the last one stays open for the next job."""
  key = job["checkpoint"], job.get("capacity", "sequence")
  if key not in _opened:
    _opened.clear()
    _opened[key] = language_model.load(job["checkpoint"], capacity=key[1])
  return _opened[key]


def logits(job: dict[str, Any], given: Arrays, left: Arrays) -> None:
  """`tokens` `[B, S]`, or `inputs` and `targets` -> logits."""
  batch = given[job["tokens"]] if "tokens" in job else {name: given[job[name]] for name in ("inputs", "targets")}
  left[job["as"]] = model(job).logits(batch)


def generate(job: dict[str, Any], given: Arrays, left: Arrays) -> list[list[int]]:
  """`prompts` -> `new` greedy tokens of each, whatever would end them."""
  opened = dataclasses.replace(model(job), ends=())
  return opened.generate(job["prompts"], job["new"])


def save(job: dict[str, Any], given: Arrays, left: Arrays) -> None:
  """Writes the checkpoint again, float32, to the directory `to`."""
  convert.save(Path(job["to"]), *convert.load(Path(job["checkpoint"])), dtype=np.float32)


def encode(job: dict[str, Any], given: Arrays, left: Arrays) -> list[list[int]]:
  """The tokens of `texts`."""
  return [model(job).encode(string) for string in job["texts"]]


def rows(job: dict[str, Any], given: Arrays, left: Arrays) -> list[dict[str, Any]]:
  """The first `limit` questions of `task`."""
  return [vars(question) for question in questions.read(job["task"], job["limit"])]


def articles(job: dict[str, Any], given: Arrays, left: Arrays) -> list[str]:
  """`count` held-out articles of encyclopedia."""
  found = [d.text for d in data.articles() if d.domain == "wiki" and data.is_held_out(d.name)]
  return found[: job["count"]]


def answers(job: dict[str, Any], given: Arrays, left: Arrays) -> list[dict[str, Any]]:
  """The answers to the first `limit` questions of `task`."""
  return [a.row() for a in tasks.score(questions.read(job["task"], job["limit"]), model(job).scorer())]


def score(job: dict[str, Any], given: Arrays, left: Arrays) -> list[tuple[float, bool]]:
  """The log-likelihoods of `pairs` of tokens."""
  return model(job).loglikelihoods(job["pairs"])


def rolling(job: dict[str, Any], given: Arrays, left: Arrays) -> list[float]:
  """The log-likelihoods of whole `texts`."""
  return text.rolling(model(job).scorer(), job["texts"])


def continuations(job: dict[str, Any], given: Arrays, left: Arrays) -> list[str]:
  """What follows the `texts` in `new` greedy tokens, up to a string of `until`."""
  found = model(job).generate(job["texts"], job["new"], until=job["until"])
  return [text.until(continuation, job["until"]) for continuation in found]


def upcycle(job: dict[str, Any], given: Arrays, left: Arrays) -> None:
  """Runs the command with `arguments`."""
  upcycling.command(job["arguments"])


@functools.cache
def encoder(spec: str) -> tuple[codecs.Codec, Callable[..., Any]]:
  """A codec, and its `encode` compiled, once for all jobs."""
  codec = codecs.get(spec)
  return codec, jax.jit(codec.encode)


def export(job: dict[str, Any], given: Arrays, left: Arrays) -> None:
  """Quantizes to the `bits` of every MoE layer, expert and projection, by `codec`; writes to directory `to`: native,
  hf, and ct in each of `widths` (null: as planned). Leaves the experts' weights as the model runs with them."""
  source, (codec, encode), to = convert.open_checkpoint(job["checkpoint"]), encoder(job["codec"]), Path(job["to"])
  packed = [{} for _ in range(source.layers)]
  called = lambda l, e, projection: names.expert_names(source.config, l, e)[projection]
  for layer, bits in zip(source.sparse_layers, np.array(job["bits"], np.int32), strict=True):
    experts = [source.expert(layer, e) for e in range(source.experts)]
    for projection, widths in zip(source.projections, bits.T, strict=True):
      encoded = [encode(np.float32(w[projection]), b) for w, b in zip(experts, widths, strict=True)]
      codes, scale, zero = (np.stack(field) for field in zip(*encoded, strict=True))
      packed[layer][projection] = qtensor.pack(codes, widths, scale, zero, group=codec.group)
      for e, weight in enumerate(np.asarray(qtensor.dequantize(packed[layer][projection]))):
        left[f"{job['as']}/{called(layer, e, projection)}"] = weight.T
  native.save(to / "native", packed, [source.others(l) for l in range(source.layers)], source.others(None),
              {"config.json": (source.directory / "config.json").read_bytes()}, {"codec": str(codec)})
  model = native.open(to / "native")
  huggingface.save(model, to / "hf", called, shard_bytes=job["shard_bytes"])
  for width in job["widths"]:
    compressed_tensors.save(model, to / f"ct-{width}", called, width=width, shard_bytes=job["shard_bytes"])


JOBS: dict[str, Callable[[dict[str, Any], Arrays, Arrays], Any]] = {
    f.__name__: f for f in (logits, generate, save, encode, rows, articles, answers, score, rolling, continuations,
                            upcycle, export)}


def main(folder: Path) -> None:
  """Does the jobs."""
  with np.load(folder / "given.npz") as file:
    given = dict(file)
  left: Arrays = {}
  found = [JOBS[job["do"]](job, given, left) for job in json.loads((folder / "jobs.json").read_text())]
  np.savez(folder / "left.npz", **left)
  (folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
