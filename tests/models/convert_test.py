"""Checkpoints in and out: exact round trips, parts that cost their own bytes, errors that name what is wrong."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import qtensor, tensor_files
from moeq_jax.models import convert, families, names
from moeq_jax.models.decoder import DecoderConfig
from tests.golden import checkpoints

CONFIG = DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, num_local_experts=3, num_experts_per_tok=2, rope_theta=3e4, rms_norm_eps=1e-4)
NAME = "mixtral_window"  # untied
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


@functools.cache
def pristine(name: str, root: Path) -> Path:
  return checkpoints.write(name, root / name)


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
  """Makes a copy of a golden checkpoint."""
  return lambda name: Path(shutil.copytree(pristine(name, tmp_path_factory.getbasetemp()), tmp_path / name))


@pytest.fixture
def directory(copy: Callable[[str], Path]) -> Path:
  return copy(NAME)


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
  tensors = checkpoints.tensors(directory)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes) -> None:
  values = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(values | changes))


def fails(directory: Path, *said: str) -> None:
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load(directory)
  for part in said:
    assert part in str(caught.value), str(caught.value)


def leaves(model) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in convert.named_leaves(model).items()}


def same(a, b) -> None:
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def bfloat16_model(config=CONFIG):
  """A model whose float32 parameters are bfloat16 values."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(ml_dtypes.bfloat16), jnp.float32)
  return jax.tree.map(draw, families.abstract(config))


# ---------------------------------------------------------------------------------------------------------------------
# What goes in comes out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_a_model_of_every_family_comes_back_exactly(copy: Callable[[str], Path], tmp_path: Path, name: str):
  directory = copy(name)
  model, config = convert.load(directory)
  convert.save(tmp_path / "again", model, config, np.float32)
  theirs, ours = checkpoints.tensors(directory), checkpoints.tensors(tmp_path / "again")
  assert ours.keys() == theirs.keys()
  for tensor in theirs:
    np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
  again, config_again = convert.load(tmp_path / "again")
  assert config_again == config and jax.tree.structure(again) == jax.tree.structure(model)


def test_what_is_saved_in_bfloat16_is_rounded_and_equal_models_give_equal_bytes(tmp_path: Path):
  for name in "ab":
    convert.save(tmp_path / name, bfloat16_model(), CONFIG)
  for file in ("config.json", "model.safetensors"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
  same(convert.load(tmp_path / "a")[0], bfloat16_model())
  loaded, _ = convert.load(tmp_path / "a", jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
  assert {t.dtype.name for t in convert.tensors(loaded, CONFIG).values()} == {"bfloat16"}


def test_an_untied_switch_with_one_embedding_is_saved_for_transformers_5(tmp_path: Path, copy: Callable[[str], Path]):
  directory = copy("switch_untied")
  edit(directory, lambda tensors: [tensors.pop(f"{stack}.embed_tokens.weight") for stack in ("encoder", "decoder")])
  model, config = convert.load(directory)
  assert not config.separate_embeddings
  convert.save(tmp_path / "saved", model, config, np.float32)
  saved = checkpoints.tensors(tmp_path / "saved")
  for stack in ("encoder", "decoder"):
    np.testing.assert_array_equal(saved[f"{stack}.embed_tokens.weight"], saved["shared.weight"])


@pytest.mark.parametrize(("name", "prefix"), [("mixtral_window", "mlp"), ("mixtral_tied", "block_sparse_moe"),
                                              ("qwen2_moe", "mlp"), ("qwen3_moe", "mlp"), ("olmoe", "mlp")])
def test_fused_experts_are_the_same_model(copy: Callable[[str], Path], name: str, prefix: str):
  directory = copy(name)
  whole, _ = convert.load(directory)
  checkpoints.save(directory, checkpoints.fused(checkpoints.tensors(directory), prefix))
  checkpoint = convert.open_checkpoint(directory)
  same(whole, convert.load(directory)[0])
  l = checkpoint.sparse_layers[-1]
  assert [n.rsplit(".", 1)[1] for n in checkpoint.expert_names(l)] == ["down_proj", "gate_up_proj"]
  for projection, weight in checkpoint.expert(l, 2).items():
    np.testing.assert_array_equal(weight, getattr(whole.blocks[l].moe, projection)[...][2])


def test_shards_with_and_without_their_index(directory: Path):
  whole, _ = convert.load(directory)
  checkpoints.save(directory, checkpoints.tensors(directory), shards=3)
  same(whole, convert.load(directory)[0])
  (directory / checkpoints.INDEX).unlink()
  same(whole, convert.load(directory)[0])
  (directory / "model-00002-of-00003.safetensors").unlink()
  fails(directory, "model-00002-of-00003.safetensors: this shard of 3 is missing", "copy it again")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_are_read(directory: Path, dtype: type):
  expected = {name: leaf.astype(dtype).astype(np.float32) for name, leaf in leaves(convert.load(directory)[0]).items()}
  edit(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
  for name, leaf in leaves(convert.load(directory)[0]).items():
    np.testing.assert_array_equal(leaf, expected[name])
  stored = convert.open_checkpoint(directory).block(0)
  kept = np.float32 if dtype == np.float64 else dtype
  assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {np.dtype(kept)}


def test_other_tensors_may_be_of_another_type_than_experts(directory: Path):
  whole, _ = convert.load(directory)
  edit(directory, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].astype(np.float64)}))
  same(whole, convert.load(directory)[0])
  edit(directory, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.float64)}))
  fails(directory, EXPERT, "is float64", "w1.weight is float32", "of one type")


# ---------------------------------------------------------------------------------------------------------------------
# In parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "switch_crowded"])
def test_parts_are_those_of_the_whole(copy: Callable[[str], Path], name: str):
  directory = copy(name)
  (model, config), checkpoint = convert.load(directory), convert.open_checkpoint(directory)
  assert checkpoint.layers == len(model.blocks) and checkpoint.config == config and checkpoint.directory == directory
  assert checkpoint.values == json.loads((directory / "config.json").read_text())
  assert checkpoint.sparse_layers == tuple(l for l in range(checkpoint.layers) if config.sparse(l))
  same(checkpoint.top(), model.top)
  for l, block in enumerate(model.blocks):
    same(checkpoint.block(l), block)
    assert jax.tree.structure(checkpoint.block(l)) == jax.tree.structure(block)
  experts = families.functions(config, "float32").experts
  for l in checkpoint.sparse_layers:
    np.testing.assert_array_equal(checkpoint.router(l), model.blocks[l].moe.router[...])
    assert list(experts(model.blocks[l])) == list(checkpoint.projections)
    for e in range(checkpoint.experts):
      for projection, weight in checkpoint.expert(l, e).items():
        np.testing.assert_array_equal(weight, experts(model.blocks[l])[projection][e])


@pytest.mark.parametrize("name", ["qwen2_moe", "switch_roomy", "switch_untied"])
def test_names_of_parts_make_up_the_files(copy: Callable[[str], Path], name: str):
  directory = copy(name)
  checkpoint, tensors, seen = convert.open_checkpoint(directory), checkpoints.tensors(directory), []
  for l in (None, *range(checkpoint.layers)):
    others = checkpoint.others(l)
    for tensor, array in others.items():
      np.testing.assert_array_equal(array, tensors[tensor])
    own = checkpoint.expert_names(l) if l is not None else []
    assert bool(own) == (l in checkpoint.sparse_layers)
    seen += [*others, *own]
    assert checkpoint.nbytes(l, experts=False) == sum(array.nbytes for array in others.values())
  assert sorted(seen) == sorted(tensors)


def test_a_block_without_its_experts(directory: Path):
  checkpoint = convert.open_checkpoint(directory)
  found = convert.named_leaves(checkpoint.block(1, jnp.bfloat16, experts=False))
  for name, leaf in convert.named_leaves(checkpoint.block(1, jnp.bfloat16)).items():
    assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype)
    assert isinstance(found[name], jax.ShapeDtypeStruct) == (name in names.EXPERTS)


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_costs_its_own_bytes(directory: Path, monkeypatch: pytest.MonkeyPatch, fused: bool):
  if fused:
    checkpoints.save(directory, checkpoints.fused(checkpoints.tensors(directory)))
  checkpoint, read, taken = convert.open_checkpoint(directory), tensor_files.TensorFiles.read, []

  def counting(files, name, index=None):
    array = read(files, name, index)
    taken.append(array.nbytes)
    return array

  monkeypatch.setattr(tensor_files.TensorFiles, "read", counting)
  checkpoint.expert(1, 3)
  assert taken == [4 * 32 * 24] * 3
  taken.clear()
  checkpoint.block(1, experts=False)
  assert sum(taken) == checkpoint.nbytes(1, experts=False)


def test_the_digest_sees_every_byte_and_no_directory(directory: Path, tmp_path: Path):
  moved, read = Path(shutil.copytree(directory, tmp_path / "moved")), []
  found = convert.open_checkpoint(directory).digest(read.append)
  assert found == convert.open_checkpoint(moved).digest()
  assert sum(read) == sum((directory / name).stat().st_size for name in ("config.json", "model.safetensors"))
  data = bytearray((moved / "model.safetensors").read_bytes())
  data[-1] ^= 1
  (moved / "model.safetensors").write_bytes(data)
  assert found != convert.open_checkpoint(moved).digest()


def test_a_model_is_built_from_tensors_in_memory(copy: Callable[[str], Path]):
  for name in ("qwen2_moe_window", "switch_untied"):
    checkpoint = convert.open_checkpoint(copy(name))
    tensors = checkpoints.tensors(checkpoint.directory)
    same(convert.build_top(checkpoint.config, checkpoint.others(None)), checkpoint.top())
    for l in range(checkpoint.layers):
      own = checkpoint.others(l) | {n: tensors[n] for n in checkpoint.expert_names(l)}
      same(convert.build_block(checkpoint.config, l, own, jnp.bfloat16), checkpoint.block(l, jnp.bfloat16))


def test_quantized_experts_take_their_places(directory: Path):
  checkpoint = convert.open_checkpoint(directory)
  shapes = {name: shape for name, shape in names.block_shapes(checkpoint.config, 1).items() if names.is_expert(name)}
  packed = {}
  for name, (e, k, n) in shapes.items():
    ones = np.ones((e, 1, n), ml_dtypes.bfloat16)
    packed[name.rsplit("/", 1)[1]] = qtensor.pack(np.ones((e, k, n), np.uint8), 2, ones, ones, group=0)
  block = convert.build_block(checkpoint.config, 1, checkpoint.others(1), jnp.float32, packed)
  found = families.functions(checkpoint.config, "float32").experts(block)
  assert {name: q.shape for name, q in found.items()} == {name: q.shape for name, q in packed.items()}
  np.testing.assert_array_equal(block.moe.router[...], checkpoint.router(1))
  with pytest.raises(convert.CheckpointError, match="belong to another model"):
    convert.build_block(checkpoint.config, 1, checkpoint.others(1), jnp.float32, {"gate": packed["gate"]})
  with pytest.raises(convert.CheckpointError, match=f"tensor {ROUTER} is missing"):
    rest = {name: array for name, array in checkpoint.others(1).items() if name != ROUTER}
    convert.build_block(checkpoint.config, 1, rest, jnp.float32, packed)


# ---------------------------------------------------------------------------------------------------------------------
# The routers from before training
# ---------------------------------------------------------------------------------------------------------------------


def test_initial_routers_come_back_exactly(tmp_path: Path):
  routers = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  convert.save_routers(tmp_path / "router_init.safetensors", routers)
  loaded = convert.load_routers(tmp_path / "router_init.safetensors", (2, 3, 8))
  assert loaded.dtype == np.float32
  np.testing.assert_array_equal(loaded, routers)


def test_the_routers_of_a_model():
  changes = dict(family="qwen3_moe", num_hidden_layers=3, dense_layers=(1,), dense_size=4)
  model = bfloat16_model(dataclasses.replace(CONFIG, **changes))
  routers = convert.routers(model)
  assert routers.shape == (2, 3, 8) and routers.dtype == np.float32
  for place, layer in enumerate((0, 2)):
    np.testing.assert_array_equal(routers[place], model.blocks[layer].moe.router[...])


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda file: file.unlink(), ["not found", "router_norm_change"]),
    (lambda file: file.write_bytes(file.read_bytes()[:-4]), ["truncated or damaged", "copy it again"]),
    (lambda file: convert.save_routers(file, np.zeros((3, 3, 8))), [GATE.format(2), "has no place", "another model"]),
    (lambda file: convert.save_routers(file, np.zeros((1, 3, 8))), [GATE.format(1), "is missing", "another model"]),
    (lambda file: convert.save_routers(file, np.zeros((2, 4, 8))), [GATE.format(0), "[4, 8]", "[3, 8]"]),
    (lambda file: convert.save_routers(file, np.full((2, 3, 8), np.nan)), [GATE.format(0), "NaN"]),
    (lambda file: safetensors.numpy.save_file({"x": np.zeros(3)}, file), ["is missing", "another model"]),
])
def test_initial_routers_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Path], None], said: list[str]):
  file = tmp_path / "router_init.safetensors"
  convert.save_routers(file, np.zeros((2, 3, 8)))
  spoil(file)
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load_routers(file, (2, 3, 8))
  for part in [str(file), *said]:
    assert part in str(caught.value), str(caught.value)
