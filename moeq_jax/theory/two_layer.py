"""The two-layer Mixture of Experts with expert-choice routing that the theory of arXiv 2604.06515 speaks of.

Only fragments of its section 4 could be confirmed (binary labels, one task-relevant token per input, expert choice, a
fixed output layer, routers that are aligned before training); the rest is inferred (docs/theory.md tells them apart):

  x = (x_1 .. x_S), orthonormal tokens, one of them relevant
  J_s = the `kept` tokens with the largest <w_s, x_j>, G_j = softmax of these scores over J_s
  h_s(x_j) = 1/F sum_r relu(<W_sr, x_j>)           f(x) = sum_s a_s sum_{j in J_s} G_j h_s(x_j),  a_s in {+1, -1}
  loss = max(0, 1 - y f(x)); plain SGD on W (with the factor 1/F taken into its rate) and on w

Training runs in token coordinates: token t is the t-th unit vector, so <W_sr, x_j> is the entry `W[s, t_j, r]`. Dense
weights are a rotation of these (`quantization.py`). Letters beside the project's: B inputs, S tokens of an input, D
dimension = number of tokens there are, E experts, F neurons of an expert, J kept tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import registry

# What the relevant tokens 0, 1, .. stand for: (label, whether it is the rare one). Reading A of the paper's alpha is
# the share of the rarer class, reading B that of a rarer token inside each class, which keeps the classes balanced.
FEATURES = {"A": ((1, False), (-1, True)), "B": ((1, False), (1, True), (-1, False), (-1, True))}
# The relevant token to which experts 0, 1, .. are aligned before training; the experts after them are irrelevant.
ALIGNED = {"A": (0, 0, 1, 1), "B": (0, 1, 2, 3)}
# The fields of a setting that shape a compiled program, and those that do not.
_SHAPES = ["design", "dim", "tokens", "kept", "experts", "neurons", "batch"]
_NUMBERS = ["alpha", "init", "router_init", "alignment", "expert_rate", "router_rate", "margin"]


@functools.partial(jax.tree_util.register_dataclass, meta_fields=_SHAPES, data_fields=_NUMBERS)
@dataclasses.dataclass(frozen=True)
class Setting:
  """One experiment; `A(alpha=0.1, dim=1024)` in a config. What is no shape is traced: one program serves all alphas.

  Attributes:
    design: which reading of alpha, a key of `FEATURES`.
    alpha: share of the rare feature.
    dim: D.
    init: standard deviation of the expert weights before training (s_e).
    tokens, kept, experts, neurons: S, J, E, F.
    router_init: standard deviation of the router weights before training.
    alignment: what is added to a router's weight on its own token before training (beta).
    batch: inputs of a step.
    expert_rate: of W, with the factor 1/F in it; router_rate: of w.
    margin: training ends when y f > margin for every test input: 0 is the first 100% test accuracy, before the hinge
      saturates; 0.5 is long after it.
  """

  design: str
  alpha: float = 0.1
  dim: int = 1024
  init: float = 0.03
  tokens: int = 10
  kept: int = 2
  experts: int = 8
  neurons: int = 16
  router_init: float = 0.01
  alignment: float = 0.15
  batch: int = 256
  expert_rate: float = 0.05
  router_rate: float = 0.05
  margin: float = 0.0

  @classmethod
  def parse(cls, spec: str) -> "Setting":
    """From a spec string.

    Raises:
      registry.SpecError: an unknown design or option.
      ValueError: a value outside its range.
    """
    entries = {name: functools.partial(cls, design=name) for name in FEATURES}
    setting = registry.Registry("design", entries).get(spec)()
    if not 0 < setting.alpha < 0.5:
      raise ValueError(f"{spec}: alpha={setting.alpha}, the share of the rare feature, lies between 0 and 0.5")
    if not 1 <= setting.kept <= setting.tokens:
      raise ValueError(f"{spec}: kept={setting.kept}; an expert keeps between 1 and tokens={setting.tokens} tokens")
    if setting.experts < len(ALIGNED[setting.design]) or setting.dim <= len(FEATURES[setting.design]) + setting.experts:
      raise ValueError(f"{spec}: experts={setting.experts}, dim={setting.dim}; at least {len(ALIGNED[setting.design])} "
                       "experts, and more dimensions than experts and relevant tokens together")
    return setting

  def features(self) -> tuple[np.ndarray, np.ndarray]:
    """Labels `[R]` float32 (+1, -1) and rareness `[R]` bool of the relevant tokens 0 .. R-1."""
    labels, rare = zip(*FEATURES[self.design], strict=True)
    return np.array(labels, np.float32), np.array(rare)

  def own_feature(self) -> np.ndarray:
    """`[E]`: the relevant token to which each expert is aligned, -1 for irrelevant experts."""
    aligned = ALIGNED[self.design]
    return np.array([*aligned, *[-1] * (self.experts - len(aligned))])

  def signs(self) -> np.ndarray:
    """a_s, `[E]` float32: the label of the own token; alternating for irrelevant experts."""
    labels, own = self.features()[0], self.own_feature()
    return np.where(own >= 0, labels[own], np.where(np.arange(self.experts) % 2, -1, 1)).astype(np.float32)


class Params(NamedTuple):
  """W, `experts` `[E, D, F]`, and w, `router` `[E, D]`; float32, token coordinates."""

  experts: jax.Array
  router: jax.Array


class Batch(NamedTuple):
  """Inputs: `tokens` `[B, S]` int32, `labels` `[B]` float32 (+1, -1), `feature` `[B]` int32, their relevant token."""

  tokens: jax.Array
  labels: jax.Array
  feature: jax.Array


# ---------------------------------------------------------------------------------------------------------------------
# Data and start
# ---------------------------------------------------------------------------------------------------------------------


def sample(key: jax.Array, setting: Setting, size: int) -> Batch:
  """`size` inputs: one relevant token at a random place, the others drawn with equal chances from the D - R irrelevant.

  Design B: both labels equally likely, the rare token with probability alpha inside each. Design A: the label -1, which
  has one token only, with probability alpha. (Inferred: no source seen says which of the two alpha means.)
  """
  keys = jax.random.split(key, 4)
  labels, _ = setting.features()
  rare = jax.random.bernoulli(keys[0], setting.alpha, (size,)).astype(jnp.int32)
  negative = jax.random.bernoulli(keys[1], 0.5, (size,)).astype(jnp.int32)
  feature = rare if setting.design == "A" else 2 * negative + rare
  tokens = jax.random.randint(keys[2], (size, setting.tokens), len(labels), setting.dim)
  place = jax.random.randint(keys[3], (size,), 0, setting.tokens)
  return Batch(tokens.at[jnp.arange(size), place].set(feature), jnp.asarray(labels)[feature], feature)


def start(key: jax.Array, setting: Setting) -> Params:
  """Gaussian weights, and each router aligned to its own token; that of an irrelevant expert to an irrelevant one."""
  keys = jax.random.split(key, 3)
  experts = setting.init * jax.random.normal(keys[0], (setting.experts, setting.dim, setting.neurons))
  router = setting.router_init * jax.random.normal(keys[1], (setting.experts, setting.dim))
  relevant = len(setting.features()[0])
  others = relevant + jax.random.permutation(keys[2], setting.dim - relevant)[: setting.experts]
  own = jnp.where(setting.own_feature() >= 0, setting.own_feature(), others)
  return Params(experts, router.at[jnp.arange(setting.experts), own].add(setting.alignment))


# ---------------------------------------------------------------------------------------------------------------------
# The network and its gradients
# ---------------------------------------------------------------------------------------------------------------------


def route(router: jax.Array, tokens: jax.Array, kept: int) -> tuple[jax.Array, jax.Array]:
  """Expert choice: J_s and G_j.

  Args:
    router: `[E, D]`.
    tokens: `[B, S]`.
    kept: J.

  Returns:
    The kept tokens `[E, B, J]` int32, highest score first (the first place of equal ones), and their gates `[E, B, J]`,
    softmax over the kept scores.
  """
  scores, places = jax.lax.top_k(router[:, tokens], kept)
  chosen = jnp.take_along_axis(jnp.broadcast_to(tokens, (len(router), *tokens.shape)), places, axis=2)
  return chosen, jax.nn.softmax(scores, axis=-1)


def preactivations(experts: jax.Array, chosen: jax.Array) -> jax.Array:
  """<W_sr, x_j> `[E, B, J, F]` of `experts` `[E, D, F]` on their tokens `chosen` `[E, B, J]`."""
  return jax.vmap(lambda weights, tokens: weights[tokens])(experts, chosen)


def weigh(experts: jax.Array, setting: Setting, chosen: jax.Array, gates: jax.Array) -> jax.Array:
  """The summands of f, a_s G_j h_s(x_j) `[E, B, J]`, for tokens and gates from `route`."""
  return setting.signs()[:, None, None] * gates * jax.nn.relu(preactivations(experts, chosen)).mean(-1)


def outputs(params: Params, setting: Setting, tokens: jax.Array) -> jax.Array:
  """f `[B]` for `tokens` `[B, S]`."""
  return weigh(params.experts, setting, *route(params.router, tokens, setting.kept)).sum((0, 2))


def loss(params: Params, setting: Setting, batch: Batch) -> jax.Array:
  """Mean hinge loss."""
  return jnp.maximum(0, 1 - batch.labels * outputs(params, setting, batch.tokens)).mean()


def gradients(params: Params, setting: Setting, batch: Batch) -> Params:
  """The gradients of `loss`, written out as the theory has them; that of W without its factor 1/F.

    dW_sr = -1/B sum_b [y f < 1] y a_s sum_j G_j 1[<W_sr, x_j> > 0] x_j
    dw_s  = -1/B sum_b [y f < 1] y a_s sum_j G_j (h_s(x_j) - sum_i G_i h_s(x_i)) x_j
  """
  chosen, gates = route(params.router, batch.tokens, setting.kept)
  active = preactivations(params.experts, chosen)
  hidden, signs = jax.nn.relu(active).mean(-1), setting.signs()[:, None, None]
  margins = batch.labels * (signs * gates * hidden).sum((0, 2))
  weight = jnp.where(margins < 1, -batch.labels, 0) / len(batch.labels)
  pull = signs * weight[None, :, None] * gates
  at = jnp.arange(setting.experts)[:, None, None], chosen
  drift = pull * (hidden - (gates * hidden).sum(-1, keepdims=True))
  return Params(jnp.zeros_like(params.experts).at[at].add(pull[..., None] * (active > 0)),
                jnp.zeros_like(params.router).at[at].add(drift))


def step(params: Params, setting: Setting, batch: Batch) -> Params:
  """One step of SGD."""
  slope = gradients(params, setting, batch)
  return Params(params.experts - setting.expert_rate * slope.experts,
                params.router - setting.router_rate * slope.router)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
  """What training leaves, for N seeds.

  Attributes:
    before, after: parameters; arrays with a leading N.
    steps: `[N]` int32, steps taken.
    reached: `[N]` bool, whether the margin was reached within `most` steps.
  """

  before: Params
  after: Params
  steps: np.ndarray
  reached: np.ndarray


class _State(NamedTuple):
  """Of one seed: parameters, steps taken, and whether it is done."""

  params: Params
  steps: jax.Array
  done: jax.Array


def keys_of(seed: int | jax.Array) -> jax.Array:
  """Independent keys of a seed: start, training inputs, test inputs, rotations."""
  return jax.random.split(jax.random.key(seed), 4)


def test_batch(seed: int | jax.Array, setting: Setting, size: int) -> Batch:
  """The test inputs of a seed."""
  return sample(keys_of(seed)[2], setting, size)


def train(setting: Setting, seeds: Sequence[int], test_size: int = 2048, every: int = 5, most: int = 20_000,
          advance: Callable[[str], None] = lambda note: None) -> Trained:
  """SGD until y f exceeds `setting.margin` for every test input for the first time.

  Args:
    setting: of all seeds.
    seeds: `[N]`; one model each.
    test_size: inputs of the test.
    every: steps between two tests.
    most: steps after which training ends in any case.
    advance: called now and then with a note on how many seeds are done.
  """
  seeds = jnp.asarray(seeds)
  before, tests = _begin(seeds, setting, test_size)
  state = _State(before, jnp.zeros(len(seeds), jnp.int32), jnp.zeros(len(seeds), bool))
  for _ in range(0, most, _BLOCKS * every):
    state = _blocks(state, seeds, tests, setting, every)
    advance(f"step {int(state.steps.max())}, {int(state.done.sum())} of {len(seeds)} seeds done")
    if state.done.all():
      break
  return Trained(before, state.params, np.asarray(state.steps), np.asarray(state.done))


@functools.partial(jax.jit, static_argnames="test_size")
def _begin(seeds: jax.Array, setting: Setting, test_size: int) -> tuple[Params, Batch]:
  """The parameters before training and the test inputs of all seeds."""
  return jax.vmap(lambda seed: (start(keys_of(seed)[0], setting), test_batch(seed, setting, test_size)))(seeds)


_BLOCKS = 10  # of `every` steps between two looks whether all seeds are done


@functools.partial(jax.jit, static_argnames="every")
def _blocks(states: _State, seeds: jax.Array, tests: Batch, setting: Setting, every: int) -> _State:
  """`_BLOCKS` times a test and `every` steps; seeds that are done stay as they are."""

  def one(state: _State, seed: jax.Array, test: Batch) -> _State:
    key = keys_of(seed)[1]

    def inner(params: Params, number: jax.Array) -> tuple[Params, None]:
      return step(params, setting, sample(jax.random.fold_in(key, number), setting, setting.batch)), None

    def block(state: _State, _) -> tuple[_State, None]:
      done = state.done | (test.labels * outputs(state.params, setting, test.tokens) > setting.margin).all()
      moved, _ = jax.lax.scan(inner, state.params, state.steps + jnp.arange(every))
      params = jax.tree.map(lambda new, old: jnp.where(done, old, new), moved, state.params)
      return _State(params, state.steps + every * ~done, done), None

    return jax.lax.scan(block, state, None, length=_BLOCKS)[0]

  return jax.vmap(one)(states, seeds, tests)
