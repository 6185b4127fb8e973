"""The byte layout, against its definition written out bit by bit."""

import numpy as np
import pytest

from moeq_jax import planar


def by_definition(codes: np.ndarray, bits: int, k_tile: int) -> np.ndarray:
  """Bytes of a `[k_block, n]` block, one weight at a time."""
  parts = [(codes & 3, 2), (codes >> 2, 1)] if bits == 3 else [(codes, bits)]
  tiles = []
  for tile in range(len(codes) // k_tile):
    for values, width in parts:
      height = k_tile * width // 8
      raw = np.zeros((height, codes.shape[1]), np.uint8)
      for row in range(k_tile):
        raw[row % height] |= values[tile * k_tile + row] << (row // height * width)
      tiles.append(raw)
  return np.concatenate(tiles)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("k_tile", "tiles"), [(16, 2), (32, 1), (64, 1), (64, 3), (256, 2)])
def test_bytes_are_where_the_definition_says(bits: int, k_tile: int, tiles: int):
  codes = np.random.default_rng(0).integers(0, 2**bits, (k_tile * tiles, 5)).astype(np.uint8)
  raw = planar.encode(codes, bits, k_tile)
  assert raw.shape == (len(codes) * bits // 8, 5)
  np.testing.assert_array_equal(raw, by_definition(codes, bits, k_tile))
  np.testing.assert_array_equal(planar.decode(raw, bits, k_tile), codes)


@pytest.mark.parametrize(("K", "group", "k_tile", "k_block"), [
  (256, 32, 256, 256), (256, 64, 256, 256), (256, 128, 256, 256), (576, 64, 64, 576), (576, 128, 128, 640),
  (768, 32, 768, 768), (768, 128, 256, 768), (768, 0, 768, 768), (1024, 128, 512, 1024), (1408, 128, 128, 1408),
  (1536, 0, 768, 1536), (1536, 64, 512, 1536), (3072, 128, 512, 3072), (14336, 128, 512, 14336),
  (100, 32, 128, 128), (100, 0, 128, 128), (96, 32, 128, 128), (1, 0, 64, 64), (37, 128, 64, 64)])
def test_tiles_of_known_sizes(K: int, group: int, k_tile: int, k_block: int):
  size = planar.layout(K, 10, group)
  assert (size.k_tile, size.k_block, size.stripe) == (k_tile, k_block, 10)
  assert size.group == (group if 0 < group < K else K)


@pytest.mark.parametrize("K", [768, 1000, 4096, 5001])
@pytest.mark.parametrize("group", [0, *planar.GROUPS])
@pytest.mark.parametrize("k_blocks", [1, 2, 3])
def test_blocks_hold_whole_tiles_and_groups(K: int, group: int, k_blocks: int):
  size = planar.layout(K, 7, group, k_blocks)
  assert size.k_block % size.k_tile == 0
  assert k_blocks * size.k_block >= K > (k_blocks - 1) * size.k_block
  if size.group < K:
    assert size.k_block % group == 0
    assert all(k % group == 0 or group % k == 0 for k in [size.k_tile * bits // 8 for bits in (1, 2, 4)] if k < group)


@pytest.mark.parametrize(("K", "group", "k_blocks", "k_tile", "k_block"), [
  (256, 32, 8, 32, 32), (256, 0, 16, 16, 16), (1536, 32, 48, 32, 32), (256, 64, 4, 64, 64), (256, 128, 2, 128, 128),
  (96, 64, 3, 64, 64)])
def test_small_blocks_have_small_tiles(K: int, group: int, k_blocks: int, k_tile: int, k_block: int):
  if k_block * (k_blocks - 1) >= K:
    with pytest.raises(ValueError, match="one is empty"):
      planar.layout(K, 10, group, k_blocks)
  else:
    size = planar.layout(K, 10, group, k_blocks)
    assert (size.k_tile, size.k_block) == (k_tile, k_block)


@pytest.mark.parametrize(("arguments", "said"), [
  ((256, 10, 48), "group 48: choose one of"), ((256, 10, -1), "group -1"), ((17, 10, 0, 3), "one is empty"),
  ((64, 4, 0, 1, 3), "one is empty")])
def test_impossible_layouts_are_named(arguments: tuple[int, ...], said: str):
  with pytest.raises(ValueError, match=said):
    planar.layout(*arguments)
