"""Quantized routers and sequential calibration: what they change, and that without their fields nothing changes."""

import dataclasses

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import quickstart
from moeq_jax import codecs, conditions, steps
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.models import decoder
from tests import tiny

CODEC = codecs.get("gptq(group=32)")


@dataclasses.dataclass(frozen=True)
class Subject:
  """As much of a subject as the conditions read."""

  functions: decoder.Functions
  top: object
  blocks: list


@pytest.fixture(scope="module")
def subject() -> Subject:
  model = tiny.model()
  return Subject(decoder.functions("float32"), model.top, list(model.blocks))


@pytest.fixture(scope="module")
def plain(subject: Subject) -> list:
  """Codes from full-precision statistics."""
  stats = statistics.collect(subject.functions, subject.top, subject.blocks, tiny.tokens(2))
  ready = candidates.shrink_unrouted(stats)
  return [candidates.encode_layer(subject.functions.experts(block), ready, l, codec=CODEC, widths=(2, 3))
          for l, block in enumerate(subject.blocks)]


def config(**fields) -> ml_collections.ConfigDict:
  made = quickstart.get_config("smoke")
  return ml_collections.ConfigDict(made.to_dict() | fields)


def bits() -> np.ndarray:
  """A plan of 2 and 3 bits in turn."""
  return np.resize([2, 3], (len(tiny.model().blocks), tiny.CONFIG.num_local_experts))


def test_without_their_fields_nothing_changes(subject: Subject, plain: list):
  assert conditions.served(subject, config()) is subject
  assert conditions.served(subject, config(router_bits=16)) is subject
  assert conditions.codes(subject, [], CODEC, bits(), plain, config(sequential=False)) == (plain, (1, 2, 3, 4))


def test_the_first_layer_has_nothing_before_it_and_the_second_sees_quantized_inputs(subject: Subject, plain: list):
  own, widths = conditions.codes(subject, tiny.tokens(2), CODEC, bits(), plain, config(sequential=True))
  assert widths == (2, 3) and len(own) == len(plain)
  same = lambda l: [np.array_equal(own[l].codes[n].codes, plain[l].codes[n].codes) for n in plain[l].codes]
  assert all(same(0)) and not any(same(1))


def test_sequential_codes_fit_the_inputs_that_they_get(subject: Subject, plain: list):
  """The second layer's output error, on the inputs that the quantized first layer gives, is smaller than that of codes
  made for full-precision inputs."""
  plan, batches = bits(), tiny.tokens(2)
  own, widths = conditions.codes(subject, batches, CODEC, plan, plain, config(sequential=True))
  pack = lambda codes, l: apply.pack_layer(codes[l], plan[l], widths=widths, group=CODEC.group)
  place = lambda codes, l: apply.quantized_blocks(subject.functions, [subject.blocks[l]], [pack(codes, l)])[0]
  first, error = place(plain, 0), {}
  for name, codes in (("own", own), ("plain", plain)):
    second, total = place(codes, 1), 0.0
    for tokens in batches:
      state = steps.embed(subject.functions, subject.top, jnp.asarray(tokens))
      state = steps.block(subject.functions, first, state)[0]
      wanted, got = (steps.block(subject.functions, block, state)[0] for block in (subject.blocks[1], second))
      total += float(jnp.sum(jnp.square(wanted - got)))
    error[name] = total
  assert error["own"] < error["plain"]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_quantized_routers_are_the_codecs_rounding_and_more_bits_are_nearer(subject: Subject, width: int):
  served = conditions.served(subject, config(router_bits=width, codec="gptq(group=32)"))
  for old, new in zip(subject.blocks, served.blocks, strict=True):
    before, after = (np.asarray(subject.functions.router(block)) for block in (old, new))
    groups = before.reshape(len(before), -1, 32)
    step = (groups.max(-1) - groups.min(-1)).max() / (2**width - 1)
    assert 0 < np.abs(after - before).max() < step  # at most half a step, and the range is searched
    assert all(len(np.unique(row)) <= 2**width for row in after.reshape(-1, 32))
    for name, weight in subject.functions.experts(old).items():
      np.testing.assert_array_equal(weight, subject.functions.experts(new)[name])


@pytest.mark.parametrize(("fields", "said"), [
    ({"router_bits": 5}, "router_bits=5"), ({"sequential": True, "codec": "rtn(group=64)"}, "does not look at inputs")])
def test_mistakes_are_named(fields: dict, said: str):
  with pytest.raises(ValueError, match=said):
    conditions.check(config(**fields))
  conditions.check(config(router_bits=4, sequential=True))


def test_observed_sums_are_those_of_the_backward_pass(subject: Subject):
  tokens = jnp.asarray(tiny.tokens(1)[0])
  state, block = steps.embed(subject.functions, subject.top, tokens), subject.blocks[0]
  forward = statistics.observe(subject.functions, block, statistics.init(subject.functions, block), state)
  both, _ = statistics.update(subject.functions, block, statistics.init(subject.functions, block), state,
                              jnp.ones_like(state), jnp.float32(1))
  for name, value in forward.items():
    if name in ("tokens", "gate_weight", "moment_in", "moment_mid"):
      np.testing.assert_allclose(value, both[name], rtol=1e-5, atol=1e-5, err_msg=name)
    else:
      assert not np.asarray(value).any(), name
