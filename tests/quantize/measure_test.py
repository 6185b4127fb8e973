"""Streaming measures what calibration and encoding in memory measure."""

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest

from moeq_jax import artifacts, codecs, user_text, workspace
from moeq_jax.calibrate import layerwise
from moeq_jax.models import convert
from moeq_jax.quantize import measure, planning, subject
from tests import tiny

CODEC = "rtn(group=32)"
ENCODING = measure.Encoding(codecs.get(CODEC), tiny.WIDTHS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> subject.Subject:
  root = tmp_path_factory.mktemp("measure")
  tiny.checkpoint(root / "checkpoint")
  return subject.open_source(workspace.Workdir(root / "run"), str(root / "checkpoint"), "float32")


@pytest.fixture(scope="module")
def text() -> user_text.Text:
  """The batches of `tiny.stats`."""
  return user_text.Text(tiny.tokens(3), "random tokens", user_text.digest(tiny.tokens(3)))


@pytest.fixture(scope="module")
def measured(opened: subject.Subject, text: user_text.Text) -> tuple[artifacts.Stats, artifacts.ErrorTable]:
  """By all sweeps, errors last."""
  states = measure.text_states(opened, text, "calibration", keep=True)
  seen = measure.forward(opened, text, states, None)
  gradients = measure.backward(opened, text, states)
  errors = measure.errors(opened, text, states, gradients, ENCODING)
  stats = measure.stats(opened, text, seen, gradients, planning.routers(opened))
  return stats, measure.error_table(opened, errors, ENCODING)


def test_statistics_are_those_of_a_pass_in_memory(measured: tuple[artifacts.Stats, artifacts.ErrorTable]):
  stats, expected = measured[0], tiny.stats()
  assert np.array_equal(stats.tokens, expected.tokens) and stats.unrouted() == [tiny.UNROUTED]
  assert (stats.total_tokens, stats.batches) == (expected.total_tokens, expected.batches)
  assert stats.moment_in is None and stats.moment_mid is None
  for name in ("gate_weight", "router_norm", "router_grad", "grad_sq_gate", "grad_sq_up", "grad_sq_down"):
    np.testing.assert_allclose(getattr(stats, name), getattr(expected, name), rtol=2e-3, atol=1e-7, err_msg=name)


def test_errors_are_those_of_encoding_in_memory(measured: tuple[artifacts.Stats, artifacts.ErrorTable]):
  table, expected = measured[1], tiny.encoded(CODEC)[1]
  routed = tiny.stats().tokens > 0  # in memory an expert without tokens borrows its layer's moments
  for name in ("weight", "norm"):
    np.testing.assert_allclose(getattr(table, name), getattr(expected, name), rtol=1e-4, err_msg=name)
  for name in ("output", "fisher"):
    ours, theirs = getattr(table, name), getattr(expected, name)
    np.testing.assert_allclose(ours[routed], theirs[routed], rtol=5e-3, err_msg=name)
    assert not ours[~routed].any()
  assert (table.widths, table.codec, table.group) == (expected.widths, expected.codec, expected.group)
  assert (table.projections, table.sizes) == (expected.projections, expected.sizes)


def test_errors_on_the_way_and_without_text_are_the_same(opened: subject.Subject, text: user_text.Text, tmp_path: Path,
                                                         measured: tuple[artifacts.Stats, artifacts.ErrorTable]):
  states = measure.text_states(opened, text, "fused", keep=False)
  fused = measure.error_table(opened, measure.forward(opened, text, states, ENCODING), ENCODING)
  assert sorted(path.name for path in states.folder.iterdir()) == [f"state-{tiny.CONFIG.num_hidden_layers:05d}.npz"]
  alone = measure.error_table(opened, measure.errors(opened, None, None, None, ENCODING), ENCODING)
  for name in ("weight", "norm"):
    assert np.array_equal(getattr(fused, name), getattr(measured[1], name))
    assert np.array_equal(getattr(alone, name), getattr(measured[1], name))
  assert np.array_equal(fused.output, measured[1].output)
  assert fused.fisher is alone.fisher is alone.output is None


def test_the_forward_sweep_lets_go_of_the_states_that_it_wrote(opened: subject.Subject, text: user_text.Text,
                                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  forward_layer, alive, given = measure.forward_layer, [], []

  def watched(*args):
    alive.append(sum(array() is not None for array in given))
    after, seen = forward_layer(*args)
    given.extend(map(weakref.ref, after))
    return after, seen

  monkeypatch.setattr(measure, "forward_layer", watched)
  elsewhere = dataclasses.replace(opened, run=workspace.Workdir(tmp_path))
  measure.forward(elsewhere, text, measure.text_states(elsewhere, text, "states", keep=False), None)
  assert alive == [0, 0]


@pytest.mark.parametrize(("sweep", "block"), [("forward", 0), ("backward", 1)])
def test_what_is_not_finite_is_named_with_its_block(opened: subject.Subject, text: user_text.Text, tmp_path: Path,
                                                    sweep: str, block: int):
  elsewhere = dataclasses.replace(opened, run=workspace.Workdir(tmp_path))
  states = measure.text_states(elsewhere, text, "states", keep=True)
  states.at(2)
  states.put(block, [np.full_like(state, np.inf) for state in states.at(block)])
  with pytest.raises(ValueError, match=f"block {block}: a routing weight is not finite"):
    getattr(measure, sweep)(elsewhere, text, states, *[None] * (sweep == "forward"))


@pytest.mark.parametrize("value", [3e19, 1.5e19])
def test_sums_of_squares_that_overflow_name_the_expert(value: float):
  """Both values are finite; the first's square is not, of the second the sum with another, or the sketch."""
  weights = {name: np.asarray(w[3]) for name, w in tiny.functions().experts(tiny.model().blocks[0]).items()}
  rows, mids = np.ones((9, weights["gate"].shape[0]), np.float32), np.ones((9, weights["down"].shape[0]), np.float32)
  mids[:2, 5] = value
  encoding = measure.Encoding(codecs.get("rtn(group=32)"), (2, 3), neurons=True)
  with pytest.raises(layerwise.NotFiniteError, match="of expert 3 is not finite; the model overflows"):
    encoding.expert(3, weights, rows, mids)


def test_experts_are_read_from_disk_a_projection_at_a_time(opened: subject.Subject):
  experts = measure.Experts(opened)
  assert len(experts) == len(opened.sparse)
  for layer, block in zip(experts, tiny.model().blocks, strict=True):
    own = tiny.functions().experts(block)
    assert set(layer) == set(own) and "bias" not in layer
    for name, weights in own.items():
      assert np.array_equal(np.asarray(layer[name], np.float32), np.asarray(weights)), name
      assert np.array_equal(np.stack([w.astype(np.float32) for w in layer[name]]), np.asarray(weights)), name
  assert np.array_equal(planning.routers(opened), np.stack([b.moe.router[...] for b in tiny.model().blocks]))


def test_files_are_hashed_again_only_when_one_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  directory, hashed = tiny.checkpoint(tmp_path / "checkpoint"), []
  digest = convert.Checkpoint.digest
  monkeypatch.setattr(convert.Checkpoint, "digest", lambda self, advance: hashed.append(1) or digest(self, advance))
  read = lambda: subject.open_source(workspace.Workdir(tmp_path / "run"), str(directory), "float32").digest
  first, second = read(), read()
  assert first == second and len(hashed) == 1
  config = directory / "config.json"
  config.write_text(config.read_text() + "\n")
  assert read() != first and len(hashed) == 2
