"""The grouped matmul of plain arrays and its gradients, against float64 numpy, whatever the sizes of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.kernels import ragged

ROWS, EXPERTS, K, N, TILE = 21, 5, 6, 7, 4
CORNERS = [
    [0, 0, ROWS, 0, 0],  # all to one
    [ROWS, 0, 0, 0, 0],
    [0, 0, 0, 0, ROWS],
    [1, 1, 1, 1, ROWS - 4],  # one row each
    [5, 5, 5, 5, 1],  # every group one row over a tile: the most tiles there can be
    [4, 8, 0, 8, 1],  # whole tiles
]


@st.composite
def group_sizes(draw: st.DrawFn) -> list[int]:
  cuts = sorted(draw(st.lists(st.integers(0, ROWS), min_size=EXPERTS - 1, max_size=EXPERTS - 1)))
  return np.diff([0, *cuts, ROWS]).tolist()


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def owners(sizes: list[int]) -> np.ndarray:
  return np.repeat(np.arange(len(sizes)), sizes)


@functools.partial(jax.jit, static_argnums=3)
def matmul_and_gradients(x, w, sizes, tile, dy):
  y, pull = jax.vjp(lambda x, w: ragged.matmul(x, w, sizes, tile), x, w)
  return y, *pull(dy)


def check_matmul(sizes: list[int]) -> None:
  x, w, dy = arrays((ROWS, K), (EXPERTS, K, N), (ROWS, N))
  y, dx, dw = matmul_and_gradients(x, w, jnp.asarray(sizes), TILE, dy)
  mine = w.astype(np.float64)[owners(sizes)]
  np.testing.assert_allclose(y, np.einsum("tk,tkn->tn", x, mine), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, np.einsum("tn,tkn->tk", dy, mine), rtol=1e-5, atol=1e-5)
  belongs = np.eye(EXPERTS)[owners(sizes)]
  np.testing.assert_allclose(dw, np.einsum("te,tk,tn->ekn", belongs, x, dy), rtol=1e-5, atol=1e-5)
  assert not np.asarray(dw)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("sizes", CORNERS)
def test_the_corners_of_routing(sizes: list[int]):
  check_matmul(sizes)


@given(group_sizes())
def test_any_group_sizes(sizes: list[int]):
  check_matmul(sizes)


@given(group_sizes())
def test_tiles_hold_every_row_once_in_its_own_expert(sizes: list[int]):
  cut = jax.jit(ragged.tiles, static_argnums=(1, 2))(jnp.asarray(sizes), ROWS, TILE)
  rows, valid = np.asarray(cut.rows), np.asarray(cut.valid)
  assert rows.shape == valid.shape == (ROWS // TILE + EXPERTS, TILE)
  np.testing.assert_array_equal(np.sort(rows[valid]), np.arange(ROWS))
  owner = np.broadcast_to(np.asarray(cut.expert)[:, None], rows.shape)
  np.testing.assert_array_equal(owner[valid], owners(sizes)[rows[valid]])
  np.testing.assert_array_equal(rows.ravel()[cut.position], np.arange(ROWS))
  assert valid.ravel()[cut.position].all()
  assert (np.diff(cut.expert) >= 0).all()  # `outer` promises sorted segments


@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.integers(1, 16))
def test_the_bound_on_tiles_holds_for_any_routing(sizes: list[int], tile: int):
  assert sum(-(-size // tile) for size in sizes) <= sum(sizes) // tile + len(sizes)


def test_padding_is_not_read_even_if_it_is_not_finite():
  """The rows of a neighbour that stand where a tile is padded must not reach the result, as nan * 0 would."""
  x, w = arrays((ROWS, K), (EXPERTS, K, N))
  sizes = jnp.asarray([3, 5, 6, 7, 0])
  x[3:8] = np.nan  # the rows of expert 1
  y, dx, dw = matmul_and_gradients(x, w, sizes, TILE, np.ones((ROWS, N), np.float32))
  mine = owners([3, 5, 6, 7, 0]) == 1
  assert np.isnan(y[mine]).all()
  assert np.isfinite(y[~mine]).all()
  assert np.isfinite(dw[0]).all() and np.isfinite(dw[2:]).all()
  assert np.isfinite(dx).all()


def test_outer_sums_tiles_in_float32():
  """4096 products of one in bfloat16 would stop at 256."""
  ones = jnp.ones((4096, 2), jnp.bfloat16)
  total = ragged.outer(ones, ones, jnp.asarray([4096, 0]), 128)
  assert total.dtype == jnp.float32
  np.testing.assert_array_equal(total, np.stack([np.full((2, 2), 4096.0), np.zeros((2, 2))]))


def test_bfloat16_stays_bfloat16():
  x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays((ROWS, K), (EXPERTS, K, N), (ROWS, N)))
  sizes = CORNERS[4]
  y, dx, dw = matmul_and_gradients(x, w, jnp.asarray(sizes), TILE, dy)
  assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
  exact = np.einsum("tk,tkn->tn", np.float64(x), np.float64(w)[owners(sizes)])
  np.testing.assert_allclose(np.float64(y), exact, rtol=2e-2, atol=2e-2)
