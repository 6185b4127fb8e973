"""Checkpoints that are not whole, hold too much or belong to another config: errors name file, tensor and remedy."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax.models import convert
from tests.golden import checkpoints

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"
ROTATION = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
  root = tmp_path_factory.mktemp("checkpoints")
  for name in ("mixtral_window", "mixtral_tied", "switch_roomy"):
    checkpoints.write(name, root / name)
  checkpoints.save(Path(shutil.copytree(root / "mixtral_window", root / "fused")),
                   checkpoints.fused(checkpoints.tensors(root / "mixtral_window")))
  return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Callable[[str], Path]:
  return lambda name: Path(shutil.copytree(pristine / name, tmp_path / name))


@pytest.fixture
def directory(copy: Callable[[str], Path]) -> Path:
  return copy("mixtral_window")


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
  tensors = checkpoints.tensors(directory)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
  values = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(values | changes))


def fails(directory: Path, *said: str) -> None:
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load(directory)
  for part in said:
    assert part in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_directory_config_or_weights_file(directory: Path):
  fails(directory / "nowhere", str(directory / "nowhere" / "config.json"), "not found", "Hugging Face")
  (directory / "model.safetensors").unlink()
  fails(directory, str(directory), "no model*.safetensors", "Hugging Face")
  (directory / "config.json").unlink()
  fails(directory, str(directory / "config.json"), "not found")


def test_pickle_is_never_opened(directory: Path, tmp_path: Path):
  class Bomb:
    def __reduce__(self):
      return (Path.touch, (tmp_path / "opened",))

  (directory / "model.safetensors").unlink()
  (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
  fails(directory, "pytorch_model.bin is pickle", "safetensors only")
  (directory / "pytorch_model.bin").rename(directory / "model.safetensors")
  fails(directory, "model.safetensors: cannot be read", "copy it again")
  assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("length", [0, 5, 100, 20_000, -1])
def test_a_truncated_weights_file(directory: Path, length: int):
  file = directory / "model.safetensors"
  file.write_bytes(file.read_bytes()[:length])
  fails(directory, str(file), "truncated or damaged", "copy it again")


@pytest.mark.parametrize("text", ['{"model_type": "mixtral",', "", "[1]", b"\xff\xfe{}", '{"hidden_size": NaN}',
                                  '{"hidden_size": 3, "hidden_size": 4}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_broken_config(directory: Path, text: str | bytes):
  (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
  fails(directory, str(directory / "config.json"), "JSON", "copy it again")


def test_a_config_of_absurd_length(directory: Path):
  (directory / "config.json").write_text('{"a": "' + "x" * convert._MOST_CONFIG + '"}')
  fails(directory, "longer than 10000000 bytes")


def test_a_quantized_model_is_no_checkpoint(directory: Path):
  (directory / "moeq.json").write_text("{}")
  fails(directory, "holds a quantized model (moeq.json)", "take the original one")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_tensor(directory: Path):
  edit(directory, lambda tensors: tensors.pop(EXPERT))
  fails(directory, str(directory), f"tensor {EXPERT} is missing", "copy all files")


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "surprise", EXPERT.replace("2.w1", "4.w1"),
                                   "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.experts.0.w9.weight",
                                   "model.layers.0.self_attn.rotary_emb.inv_freq.x"])
def test_an_unexpected_tensor(directory: Path, extra: str):
  edit(directory, lambda tensors: tensors.update({extra: np.zeros(3, np.float32)}))
  fails(directory, str(directory / "model.safetensors"), f"tensor {extra} has no place", "another checkpoint")


@pytest.mark.parametrize(("name", "extra"), [
    ("mixtral_window", EXPERT.replace("block_sparse_moe", "mlp")),
    ("mixtral_window", "model.layers.1.mlp.gate.weight"),
    ("mixtral_window", FUSED),
    ("mixtral_window", "model.layers.1.mlp.experts.down_proj"),
    ("fused", "model.layers.1.mlp.experts.3.w3.weight"),
    ("fused", "model.layers.1.block_sparse_moe.experts.gate_up_proj"),
])
def test_a_parameter_that_is_there_twice(copy: Callable[[str], Path], name: str, extra: str):
  directory = copy(name)
  edit(directory, lambda tensors: tensors.update({extra: np.zeros(3, np.float32)}))
  fails(directory, "is the same parameter as tensor", "remove one of the two")


def test_a_tensor_of_wrong_shape(copy: Callable[[str], Path], directory: Path):
  edit(directory, lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)}))
  fails(directory, str(directory / "model.safetensors"), EXPERT, "[32, 24]", "[24, 32]", "another checkpoint")
  fused = copy("fused")
  edit(fused, lambda tensors: tensors.update({FUSED: np.ascontiguousarray(tensors[FUSED].transpose(0, 2, 1))}))
  fails(fused, FUSED, "[4, 32, 48]", "[4, 48, 32]")


def test_a_config_of_another_size(directory: Path):
  edit_config(directory, vocab_size=65)
  fails(directory, "model.embed_tokens.weight", "[64, 32]", "[65, 32]")
  edit_config(directory, vocab_size=64, num_hidden_layers=3)
  fails(directory, "tensor model.layers.2.", "is missing")
  edit_config(directory, num_hidden_layers=10_000, num_local_experts=100_000)
  fails(directory, "gate.weight has shape [4, 32], config.json implies [100000, 32]")
  edit_config(directory, num_hidden_layers=1, num_local_experts=4)
  fails(directory, "tensor model.layers.1.", "has no place")
  edit_config(directory, num_hidden_layers=2, num_local_experts=3)
  for router in ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"):
    edit(directory, lambda tensors, router=router: tensors.update({router: tensors[router][:3]}))
  fails(directory, "experts.3.", "has no place", "6 such tensors")
  edit_config(directory, num_experts_per_tok=4)
  fails(directory, str(directory), "config.json: num_experts_per_tok is 4; it is more than num_local_experts 3")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_that_are_not_finite(directory: Path, value: float, dtype: type):
  def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors.update({name: array.astype(dtype) for name, array in tensors.items()})
    tensors[EXPERT][3, 4] = value

  edit(directory, spoil)
  fails(directory, str(directory / "model.safetensors"), EXPERT, "NaN or infinite", "damaged")
  checkpoint = convert.open_checkpoint(directory)
  checkpoint.expert(1, 1)
  with pytest.raises(convert.CheckpointError, match="NaN or infinite"):
    checkpoint.expert(1, 2)


def test_the_largest_finite_values_are_fine(directory: Path):
  edit(directory, lambda tensors: tensors[EXPERT].fill(np.finfo(np.float32).max))
  convert.load(directory)
  edit(directory, lambda tensors: tensors.update({n: a.astype(np.float64) * 1.01 for n, a in tensors.items()}))
  fails(directory, EXPERT, "NaN or infinite")


def test_integers_are_not_taken_for_weights(directory: Path):
  edit(directory, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.int8)}))
  fails(directory, str(directory / "model.safetensors"), EXPERT, "int8", "quantized", "original")


def test_eight_bit_floats_are_refused_by_name(directory: Path):
  """Only in headers: numpy's side of the library cannot write them."""
  file = directory / "model.safetensors"
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  header[EXPERT] |= {"dtype": "F8_E4M3", "shape": [96, 32]}
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  fails(directory, str(file), EXPERT, "float8_e4m3", "quantized", "original")


# ---------------------------------------------------------------------------------------------------------------------
# What is passed over
# ---------------------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_embedding_is_passed_over_if_it_is_one(copy: Callable[[str], Path]):
  for name, embedding, copies in (("mixtral_tied", "model.embed_tokens.weight", ["lm_head.weight"]),
                                  ("switch_roomy", "shared.weight", ["lm_head.weight", "encoder.embed_tokens.weight",
                                                                     "decoder.embed_tokens.weight"])):
    directory = copy(name)
    expected = convert.open_checkpoint(directory).others(None).keys()
    edit(directory, lambda tensors: tensors.update({c: tensors[embedding] for c in copies}))
    assert convert.open_checkpoint(directory).others(None).keys() == expected
    convert.load(directory)
    edit(directory, lambda tensors: tensors[copies[-1]].__setitem__((63, 31), 7))
    fails(directory, f"tensor {copies[-1]} differs from {embedding}", "tie_word_embeddings")
    checkpoint = convert.open_checkpoint(directory)
    for read in (checkpoint.top, lambda: checkpoint.others(None)):
      with pytest.raises(convert.CheckpointError, match="differs"):
        read()
    tensors = checkpoints.tensors(directory)
    with pytest.raises(convert.CheckpointError, match="differs"):
      convert.build_top(checkpoint.config, {n: tensors[n] for n in (*expected, copies[-1])})
    edit(directory, lambda tensors: tensors.update({copies[-1]: np.zeros((64, 31), np.float32)}))
    fails(directory, f"tensor {copies[-1]} has shape [64, 31]")


def test_a_matrix_that_the_config_unties_is_needed(directory: Path):
  edit(directory, lambda tensors: tensors.pop("lm_head.weight"))
  fails(directory, "tensor lm_head.weight is missing")


def test_buffers_of_old_versions_are_passed_over(directory: Path, copy: Callable[[str], Path]):
  edit(directory, lambda tensors: tensors.update({ROTATION: np.zeros(4, np.float32)}))
  assert ROTATION not in convert.open_checkpoint(directory).others(0)
  convert.load(directory)
  edit(directory, lambda tensors: tensors.update({ROTATION: np.zeros(5, np.float32)}))
  fails(directory, f"tensor {ROTATION} has shape [5]")
  switch, bias = copy("switch_roomy"), "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  edit(switch, lambda tensors: tensors.update({bias: np.zeros((32, 4), np.float32)}))
  convert.load(switch)
