"""Pre-training and fine-tuning of a Switch Transformer on a sample of the text: what they leave behind, that padding
teaches nothing, that a new model soon reads its encoder, and that a stopped run ends with the same bytes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import switch_finetune, switch_pretrain
from moeq_jax import data, pairs, switch_training, user_text
from moeq_jax.models import convert, switch
from moeq_jax.train import loop
from tests import tiny_switch

STEPS = 4
FILES = {"config.json", "held_out.json", "model.safetensors", "router_init.safetensors", "tokenizer.json",
         "training_log.jsonl"}


def pretrain_config() -> ml_collections.ConfigDict:
  """The smoke config, smaller still."""
  made = switch_pretrain.get_config("smoke")
  made.model.update(vocab_size=320, d_model=16, d_kv=8, d_ff=16)
  made.update(batch=2, length=24, steps=STEPS, decay_steps=STEPS, repeating_steps=2, warmup=1, log_every=1,
              save_every=2, sentinels=8, held_out_sequences=2)
  return made


def finetune_config(checkpoint: Path, seed: int = 0) -> ml_collections.ConfigDict:
  """The smoke config, smaller still."""
  made = switch_finetune.get_config("smoke")
  made.update(checkpoint=str(checkpoint), seed=seed, batch=2, inputs=16, targets=8, steps=STEPS, decay_steps=STEPS,
              warmup=1, log_every=1, save_every=2, held_out_pairs=4)
  return made


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory):
  """The folder of a pre-trained model, made of one article in a hundred and of no code; a few pairs stand for all."""
  with pytest.MonkeyPatch.context() as patch:
    few = [d for i, d in enumerate(data.articles()) if i % 100 == 0 or (data.is_held_out(d.name) and i % 10 == 0)]
    patch.setattr(data, "articles", lambda: iter(few))
    patch.setattr(data, "TRAIN_PACKAGES", {})
    patch.setattr(data, "HELD_OUT_PACKAGES", {})
    made = lambda kind: [pairs.Pair(d, f"{kind}{i}", f"{kind} text {i} of {d}", f"A summary {i} of {kind}.")
                         for d in pairs.DOMAINS for i in range(6)]
    patch.setattr(pairs, "training", lambda: made("trained"))
    patch.setattr(pairs, "held_out", lambda: made("held out"))
    place = tmp_path_factory.mktemp("pretrained")
    switch_training.pretrain_run(pretrain_config(), place)
    yield place


@pytest.fixture(scope="module")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A fine-tuning run that nothing befell."""
  place = tmp_path_factory.mktemp("finetuned")
  switch_training.finetune_run(finetune_config(pretrained / "model"), place)
  return place


def test_both_leave_checkpoints_with_all_their_files(pretrained: Path, finetuned: Path):
  for place in (pretrained, finetuned):
    assert {path.name for path in (place / "model").iterdir()} == FILES
    model, sizes = convert.load(place / "model")
    assert (sizes.vocab_size, sizes.num_experts, sizes.eos_token_id) == (320, 4, 311)
    assert convert.routers(model).shape == (2, 4, 16)
  values = json.loads((finetuned / "model" / "held_out.json").read_text())
  assert set(values["held_out"]) == {"code", "wiki"} and values["pairs"] == {"code": 6, "wiki": 6}


def test_the_routers_from_before_are_kept(pretrained: Path, finetuned: Path):
  """Before pre-training they are random, before fine-tuning they are the pre-trained ones, to the bit."""
  load = lambda place: convert.load_routers(place / "model" / "router_init.safetensors", (2, 4, 16))
  last = lambda place: convert.routers(convert.load(place / "model")[0])
  np.testing.assert_array_equal(load(finetuned), last(pretrained))
  assert not np.array_equal(load(pretrained), last(pretrained)) and not np.array_equal(load(finetuned), last(finetuned))


def test_the_log_holds_the_norm_of_every_router_row(finetuned: Path):
  rows = [json.loads(line) for line in (finetuned / "model" / "training_log.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  norms = np.linalg.norm(convert.routers(convert.load(finetuned / "model")[0]), axis=-1)
  np.testing.assert_allclose(rows[-1]["router_norm"], norms, atol=1e-5)
  np.testing.assert_allclose(np.sum(rows[-1]["load"], axis=1), 1.0, atol=1e-4)


def test_a_stopped_run_ends_with_the_same_bytes(pretrained: Path, finetuned: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch):
  config = finetune_config(pretrained / "model")
  real = switch_training.pair_batch

  def stop(*args, **kwargs):
    if args[2] == 4:  # the fourth step: that of the second was saved, the third is lost
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(switch_training, "pair_batch", stop)
    switch_training.finetune_run(config, tmp_path)
  assert not (tmp_path / "model" / "model.safetensors").exists()
  switch_training.finetune_run(config, tmp_path)
  for name in FILES:
    assert (tmp_path / "model" / name).read_bytes() == (finetuned / "model" / name).read_bytes(), name


def test_another_seed_sees_other_pairs():
  arrays = {"inputs": np.arange(40).reshape(20, 2), "targets": np.full((20, 2), -1), "domain": np.repeat([0, 1], 10)}
  batch = lambda seed, step, mixture=(0.5, 0.5): switch_training.pair_batch(
      arrays, dict(zip(pairs.DOMAINS, mixture, strict=True)), step, size=8, seed=seed, pad=0)
  same = lambda a, b: np.array_equal(a["inputs"], b["inputs"])
  assert same(batch(0, 1), batch(0, 1)) and not same(batch(0, 1), batch(1, 1)) and not same(batch(0, 1), batch(0, 2))
  assert np.all(batch(0, 1)["targets"] == switch.NO_TARGET)
  assert np.all(batch(0, 1, mixture=(1.0, 0.0))["inputs"] < 20)


def test_special_tokens_in_a_text_are_read_as_text(pretrained: Path):
  tokenizer = switch_training.open_tokenizer(pretrained / "tokenizer.json")
  ids = tokenizer.encode("<extra_id_0> </s> <|endoftext|>", add_special_tokens=False).ids
  assert max(ids) < tokenizer.token_to_id(switch_training.END) == 311 and min(ids) > 0
  assert [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(8)] == list(range(319, 311, -1))


def test_a_decoder_cannot_be_fine_tuned_here(tmp_path: Path):
  config = finetune_config(Path(__file__).parents[1] / "experiments" / "models" / "moeq-small")
  with pytest.raises(convert.CheckpointError, match="family mixtral; this run takes a Switch Transformer"):
    switch_training.finetune_run(config, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def batch(padding: int) -> dict[str, jax.Array]:
  """Two rows of four inputs and three targets, with `padding` more of each."""
  rng = np.random.default_rng(3)
  made = {"inputs": rng.integers(2, 40, (2, 4)), "targets": rng.integers(2, 40, (2, 3))}
  fill = {"inputs": tiny_switch.CONFIG.pad_token_id, "targets": switch.NO_TARGET}
  return {name: jnp.asarray(np.pad(rows, ((0, 0), (0, padding)), constant_values=fill[name]), jnp.int32)
          for name, rows in made.items()}


def loss(model, rows, balance=0.3, z=0.2):
  return switch.training_loss(model, rows, balance=balance, z=z, dtype=jnp.dtype("float32"))


def test_padding_changes_neither_loss_nor_gradient():
  model = tiny_switch.model()
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (bare, metrics), grads = gradient(model, batch(0))
  (padded, padded_metrics), padded_grads = gradient(model, batch(5))
  np.testing.assert_allclose(bare, padded, rtol=2e-5)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], padded_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(padded_grads), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def test_the_parts_of_the_loss_add_up_and_follow_their_formulas():
  model, rows = tiny_switch.model(), batch(0)
  total, metrics = loss(model, rows)
  np.testing.assert_allclose(total, metrics["loss"] + 0.3 * metrics["balance"] + 0.2 * metrics["z"], rtol=1e-6)
  state, balances, squares = model.top.embed(rows, jnp.float32), [], []
  for block in model.blocks:
    state, routing = block(state, "sequence")
    if routing is not None:
      logits, experts = np.asarray(routing.logits, np.float64), np.asarray(routing.experts)[:, 0]
      probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      share = np.bincount(experts, minlength=3) / len(experts)
      balances.append(3 * np.sum(share * probabilities.mean(0)))
      squares.append(np.mean(np.log(np.exp(logits).sum(-1)) ** 2))
  np.testing.assert_allclose(metrics["balance"], np.mean(balances), rtol=1e-5)
  np.testing.assert_allclose(metrics["z"], np.mean(squares), rtol=1e-5)
  own = np.asarray(switch.losses(model.top.logits(state["decoder"]), rows))
  np.testing.assert_allclose(metrics["loss"], own.mean(), rtol=1e-5)


def test_a_new_model_soon_reads_its_encoder():
  """The targets repeat a part of the input, which is random: who does not read it is at log(108) = 4.7 nats. Without
  one of the three parts of `switch.init` the loss is 2.1 (output) or 4.0 here, with all of them 0.6."""
  sizes = switch.SwitchConfig(vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
                              num_heads=4, num_experts=4, expert_capacity=64, encoder_sparse=(1,), decoder_sparse=(1,),
                              tie_word_embeddings=False)
  model, optimizer = switch.init(sizes, 0), optax.adam(3e-3)

  @jax.jit
  def step(model, state, rows):
    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model, rows, 0.01, 0.001)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(model, updates), state, metrics["loss"]

  state = optimizer.init(model)
  for number in range(100):
    text = np.random.default_rng(number).integers(2, 110, (16, 32))
    rows = user_text.corrupted(text, sizes, 127, [number], density=0.3, repetitions=1.0)
    model, state, last = step(model, state, jax.tree.map(jnp.asarray, rows))
  assert last < 1.5


def test_a_longer_decay_ends_early_at_a_higher_rate():
  short = loop.Schedule(steps=10, warmup=2, peak=1.0, end=0.1).rate()
  long = loop.Schedule(steps=10, warmup=2, peak=1.0, end=0.1, decay=20).rate()
  assert float(short(2)) == float(long(2)) == 1.0
  np.testing.assert_allclose(short(10), 0.1, rtol=1e-5)
  np.testing.assert_allclose(long(11), 0.55, rtol=1e-5)  # half way
