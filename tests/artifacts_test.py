"""Files that are whole or absent, digests that see every difference, and products that are never taken for others."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import artifacts

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class Stop(Exception):
  pass


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, old: bytes | None):
  path = tmp_path / "file"
  if old is not None:
    path.write_bytes(old)
  with pytest.raises(Stop), artifacts.atomic_path(path) as temporary:
    temporary.write_bytes(b"half of the n")
    raise Stop
  assert [p.name for p in tmp_path.iterdir()] == (["file"] if old else [])
  assert old is None or path.read_bytes() == old


def test_the_file_appears_whole_with_its_folder_when_the_block_ends(tmp_path: Path):
  path = tmp_path / "new" / "folder" / "file"
  with artifacts.atomic_path(path) as temporary:
    temporary.write_bytes(b"new")
    assert not path.exists() and temporary.parent == path.parent
  assert path.read_bytes() == b"new"
  assert list(path.parent.iterdir()) == [path]
  assert path.stat().st_mode & 0o777 == 0o644


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path):
  path = tmp_path / "file"
  path.write_bytes(b"old content")
  with path.open("rb") as reader:
    artifacts.write_bytes(path, b"new")
    assert reader.read() == b"old content" and path.read_bytes() == b"new"


def test_a_process_killed_inside_a_write_leaves_the_old_file(tmp_path: Path):
  path = tmp_path / "file"
  artifacts.write_bytes(path, b"old")
  code = ("import os, signal, sys\nfrom moeq_jax import artifacts\n"
          "with artifacts.atomic_path(sys.argv[1]) as temporary:\n"
          "  temporary.write_bytes(b'half of the n')\n  os.kill(os.getpid(), signal.SIGKILL)\n")
  done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
  assert done.returncode == -9
  assert path.read_bytes() == b"old"


def test_json_is_the_same_for_equal_values_and_refuses_nan(tmp_path: Path):
  path = tmp_path / "a.json"
  artifacts.write_json(path, {"b": [1, 2.5], "a": None})
  first = path.read_bytes()
  artifacts.write_json(path, {"a": None, "b": (1, 2.5)})
  assert path.read_bytes() == first and json.loads(first) == {"a": None, "b": [1, 2.5]}
  for bad in (float("nan"), float("inf")):
    with pytest.raises(ValueError, match="a.json.*finite"):
      artifacts.write_json(path, {"loss": bad})
    with pytest.raises(ValueError, match="JSON compliant"):
      artifacts.digest({"loss": bad})
  assert path.read_bytes() == first


ARRAYS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1, 2], np.int64), "empty": np.zeros((0, 3))}
SAVE = '''
import sys
import numpy as np
from moeq_jax import artifacts
arrays = {"empty": np.zeros((0, 3)), "a": np.array([1, 2], np.int64), "x": np.arange(6, dtype=np.float32).reshape(2, 3)}
artifacts.save_arrays(sys.argv[1], arrays, {"b": [1], "a": None})
'''


def test_equal_arrays_give_equal_bytes_here_and_in_another_process(tmp_path: Path):
  for name, order in (("one", list(ARRAYS)), ("two", sorted(ARRAYS))):
    artifacts.save_arrays(tmp_path / name, {k: ARRAYS[k] for k in order}, {"a": None, "b": [1]})
  subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "three")], check=True, cwd=ROOT)
  assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1
  arrays, meta = artifacts.load_arrays(tmp_path / "three")
  assert meta == {"a": None, "b": [1]} and list(arrays) == sorted(ARRAYS)
  for name, value in ARRAYS.items():
    assert arrays[name].dtype == value.dtype
    np.testing.assert_array_equal(arrays[name], value)


def test_a_changed_byte_is_noticed(tmp_path: Path):
  artifacts.save_arrays(tmp_path / "a", {"x": np.zeros(1000)}, {})
  content = bytearray((tmp_path / "a").read_bytes())
  content[4000] ^= 1
  (tmp_path / "a").write_bytes(content)
  with pytest.raises(Exception, match="CRC"):
    artifacts.load_arrays(tmp_path / "a")


@pytest.mark.parametrize("array", [np.zeros(2, ml_dtypes.bfloat16), np.array([None])])
def test_arrays_that_would_come_back_as_others_are_refused(tmp_path: Path, array: np.ndarray):
  with pytest.raises(TypeError, match=f"array x is {array.dtype}"):
    artifacts.save_arrays(tmp_path / "a", {"x": array}, {})
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Digests and keys
# ---------------------------------------------------------------------------------------------------------------------


def test_a_digest_sees_type_shape_and_value(tmp_path: Path):
  (tmp_path / "f").write_bytes(b"ab")
  (tmp_path / "g").write_bytes(b"ac")
  base = np.arange(4, dtype=np.int32)
  different = [
      base, base.astype(np.int64), base.astype(np.uint32), base.reshape(2, 2), base.reshape(4, 1), base[::-1],
      np.array([0, 1, 2, 4], np.int32), np.float32(3), np.array([3], np.float32), np.zeros(0, np.int32), b"ab", "ab",
      tmp_path / "g", {"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], None, 1, 1.5]
  digests = [artifacts.digest(value) for value in different]
  assert len(set(digests)) == len(digests)
  assert all(len(d) == 64 for d in digests)


def test_a_digest_sees_nothing_else(tmp_path: Path):
  (tmp_path / "f").write_bytes(b"ab")
  base = np.arange(6).reshape(2, 3)
  assert artifacts.digest(np.asfortranarray(base)) == artifacts.digest(base)
  assert artifacts.digest(np.arange(12).reshape(2, 6)[:, :3]) == artifacts.digest(np.array([[0, 1, 2], [6, 7, 8]]))
  assert artifacts.digest(jnp.ones(3)) == artifacts.digest(np.ones(3, np.float32))
  assert artifacts.digest({"a": 1, "b": 2}) == artifacts.digest({"b": 2, "a": 1})
  assert artifacts.digest(tmp_path / "f") == artifacts.digest(b"ab")


def test_a_key_sees_stage_version_spec_and_inputs():
  base = ("stats", 1, {"a": 1}, {"model": "x"})
  changed = [("codes", *base[1:]), (base[0], 2, *base[2:]), (*base[:2], {"a": 2}, base[3]), (*base[:3], {"model": "y"})]
  assert len({artifacts.key(*values) for values in (base, *changed)}) == 5
  assert artifacts.key(*base) == artifacts.key(*base)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

TABLE = artifacts.CostTable(cost=np.array([[[[1.5, 0.25]]]]), widths=(2, 4), score="frequency", units="nats",
                            projections=("up",), sizes=(12,))
PLAN = artifacts.Plan(bits=np.array([[1, 2]]), method="uniform", budget=1.5)
STATS = artifacts.Stats(
    tokens=np.array([[3, 0]]), gate_weight=np.ones((1, 2)), router_norm=np.ones((1, 2)), router_grad=np.ones((1, 2)),
    moment_in=None, moment_mid=np.ones((1, 2, 1, 1), np.float32), grad_sq_gate=None, grad_sq_up=None, grad_sq_down=None,
    total_tokens=3, batches=1)


@pytest.mark.parametrize("value", [
    TABLE, PLAN, dataclasses.replace(PLAN, predicted=0.5, lower_bound=0.25, constraint="per_layer"), STATS])
def test_a_value_comes_back_as_it_was(tmp_path: Path, value: artifacts.Saved):
  value.save(tmp_path / "value", "key")
  for expected in ("key", None):
    back = type(value).load(tmp_path / "value", expected)
    for field in dataclasses.fields(value):
      was, now = getattr(value, field.name), getattr(back, field.name)
      assert type(now) is type(was)
      np.testing.assert_array_equal(now, was)
  assert artifacts.digest_of(back) == artifacts.digest_of(value)


def test_a_product_of_another_key_or_type_is_stale(tmp_path: Path):
  TABLE.save(tmp_path / "table", "key")
  with pytest.raises(artifacts.StaleProductError, match="other inputs"):
    artifacts.CostTable.load(tmp_path / "table", "another")
  with pytest.raises(artifacts.StaleProductError, match="holds CostTable, not Plan"):
    artifacts.Plan.load(tmp_path / "table", "key")
  layer_codes().save(tmp_path / "codes", "key")
  with pytest.raises(artifacts.StaleProductError, match="not Plan"):
    artifacts.Plan.load(tmp_path / "codes", "key")
  with pytest.raises(artifacts.StaleProductError, match="other inputs"):
    artifacts.LayerCodes.load(tmp_path / "codes", "another")


def test_the_digest_of_a_value_sees_every_field():
  changes = ({}, {"method": "random"}, {"budget": 2.0}, {"bits": np.array([[1, 3]])}, {"predicted": 0.0})
  assert len({artifacts.digest_of(dataclasses.replace(PLAN, **change)) for change in changes}) == len(changes)


def layer_codes(names: tuple[str, ...] = artifacts.PROJECTIONS) -> artifacts.LayerCodes:
  rng = np.random.default_rng(0)
  shape = {"gate": (8, 4), "up": (8, 4), "down": (4, 8)}
  projection = lambda k, n: artifacts.Codes(
      rng.integers(0, 4, (2, 3, k, n)).astype(np.uint8), rng.normal(size=(2, 3, 1, n)).astype(ml_dtypes.bfloat16),
      rng.normal(size=(2, 3, 1, n)).astype(ml_dtypes.bfloat16))
  errors = {"weight": rng.random((3, 3, 2)), "norm": rng.random((3, 3))}
  return artifacts.LayerCodes({name: projection(*kn) for name, kn in shape.items() if name in names}, errors)


@pytest.mark.parametrize("names", [("gate", "up", "down"), ("up", "down")])
def test_codes_come_back_with_their_types_and_equal_bytes(tmp_path: Path, names: tuple[str, ...]):
  codes = layer_codes(names)
  codes.save(tmp_path / "one", "key")
  back = artifacts.LayerCodes.load(tmp_path / "one", "key")
  assert tuple(back.codes) == names
  for name in names:
    for was, now in zip(codes.codes[name], back.codes[name], strict=True):
      assert now.dtype == was.dtype
      np.testing.assert_array_equal(now, was)
  assert back.codes["up"].scale.dtype == ml_dtypes.bfloat16
  assert {k: v.tolist() for k, v in back.errors.items()} == {k: v.tolist() for k, v in codes.errors.items()}
  back.save(tmp_path / "two", "key")
  assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_bits_of_every_projection():
  assert PLAN.by_projection(2).tolist() == [[[1, 1], [2, 2]]]
  finer = dataclasses.replace(PLAN, bits=np.array([[[1, 2], [3, 4]]]))
  np.testing.assert_array_equal(finer.by_projection(2), finer.bits)
  with pytest.raises(ValueError, match="plan uniform: has bits for 2 projections, the experts have 3"):
    finer.by_projection(3)


def test_a_plan_chooses_each_expert_at_its_width():
  bank = layer_codes().codes["up"]
  chosen = bank.choose(np.array([1, 0, 1]))
  for field, all_widths in zip(chosen, bank, strict=True):
    np.testing.assert_array_equal(field, np.stack([all_widths[1, 0], all_widths[0, 1], all_widths[1, 2]]))
