"""A dense feed-forward network made into experts, by copying it (sparse upcycling) or by splitting it (MoEfication).

Copying (arXiv 2212.05055): every expert is the whole network and the router is random. The routing weights of a token
sum to one, so that the model computes what the dense one did, whatever the router says; the experts differ only once
the model has been trained further.

Splitting (arXiv 2110.01786): neurons whose gate weights point the same way are put into one expert, all of the same
size, and the router is the mean direction of each expert's gates. A token goes to the experts whose neurons it excites
most. Routing weights must be equal for the experts to add up: the router's rows are made so short (`SHORT`) that the
softmax over the chosen ones is flat to rounding, while their order stays; `down` is multiplied by the number of experts
chosen, which the weights divide by. With all experts on, the model is the dense one; with fewer it leaves out the rest
of the neurons, and a network with SiLU, which is seldom zero, then needs training to be of use.

Shapes: D hidden size, F width of the dense network, E experts.
"""

from collections.abc import Callable, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]  # {"gate": [D, F], "up": [D, F], "down": [F, D]}
Experts = dict[str, np.ndarray]  # the same with E in front

ROUTER_STD = 0.02
SHORT = 1e-6  # length of a router row; logits of normed rows then differ by about 1e-5
ROUNDS = 10  # of the clustering; it seldom changes after five


def copy(weights: Weights, experts: int, top_k: int, seed: int) -> tuple[np.ndarray, Experts]:
  """Experts that are copies of a dense network.

  Args:
    weights: of the dense network.
    experts: E.
    top_k: experts of each token; it changes nothing here.
    seed: of the router.

  Returns:
    The router `[E, D]` (normal, standard deviation 0.02), and the experts.
  """
  del top_k
  router = np.random.default_rng(seed).normal(0, ROUTER_STD, (experts, len(weights["gate"])))
  return router.astype(np.float32), {name: np.repeat(w[None], experts, axis=0) for name, w in weights.items()}


def split(weights: Weights, experts: int, top_k: int, seed: int) -> tuple[np.ndarray, Experts]:
  """Experts that are equal parts of a dense network.

  Args:
    weights: of the dense network.
    experts: E.
    top_k: experts of each token.
    seed: where the clustering begins.

  Returns:
    The router `[E, D]`, and the experts, `F / E` wide.

  Raises:
    ValueError: F is not a multiple of E.
  """
  gate = np.asarray(weights["gate"], np.float64)
  split_width(gate.shape[1], experts)
  directions = (gate / np.maximum(np.linalg.norm(gate, axis=0), 1e-30)).T
  members, centres = cluster(directions, experts, seed)
  router = SHORT * centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-30)
  parts = {name: np.moveaxis(weights[name][:, members], 1, 0) for name in ("gate", "up")}
  return router.astype(np.float32), parts | {"down": weights["down"][members] * np.float32(top_k)}


def split_width(width: int, experts: int) -> int:
  """The width of each expert that `split` makes of a network of this width.

  Raises:
    ValueError: the width is not a multiple of the experts.
  """
  if width % experts:
    raise ValueError(f"a network of width {width} cannot be split into {experts} experts of one size; take a number of"
                     " experts that divides it")
  return width // experts


def cluster(points: np.ndarray, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Balanced spherical k-means: groups of one size whose points have large inner products with their centre.

  Each round serves the pairs of point and group in the order of their inner product, as long as the group has room.

  Args:
    points: `[n, D]`, of length one; `n` a multiple of `groups`.
    groups: how many.
    seed: of the points that are the first centres.

  Returns:
    The points of each group `[groups, n / groups]`, ascending, and the centres `[groups, D]`; of the rounds the one
    with the largest sum of inner products.
  """
  centres = points[np.random.default_rng(seed).choice(len(points), groups, replace=False)]
  best, most = None, -np.inf
  for _ in range(ROUNDS):
    members = _assign(points @ centres.T)
    centres = points[members].mean(axis=1)
    total = float(np.sum(np.linalg.norm(centres, axis=1)))
    if total > most:
      best, most = (members, centres), total
  return best


def _assign(fit: np.ndarray) -> np.ndarray:
  """The points of each group `[groups, n / groups]` from `fit` `[n, groups]`: best pairs first, while there is room."""
  points, groups = fit.shape
  room, group_of = np.full(groups, points // groups), np.full(points, -1)
  for pair in np.argsort(-fit, axis=None, kind="stable"):
    point, group = divmod(int(pair), groups)
    if group_of[point] < 0 and room[group]:
      group_of[point] = group
      room[group] -= 1
  return np.stack([np.flatnonzero(group_of == group) for group in range(groups)])


METHODS: dict[str, Callable[[Weights, int, int, int], tuple[np.ndarray, Experts]]] = {"copy": copy, "split": split}
