"""The table of names: what transformers saves for each family, both ways, and nothing else."""

import dataclasses
import functools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from moeq_jax.models import convert, families, hf_config, names
from moeq_jax.models.decoder import DecoderConfig
from moeq_jax.models.switch import SwitchConfig
from tests.golden import checkpoints

SWITCH = SwitchConfig(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=3, num_decoder_layers=2, num_heads=2,
                      num_experts=4, expert_capacity=8, encoder_sparse=(1,), decoder_sparse=(0, 1))
MIXTRAL = DecoderConfig(vocab_size=20, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=4, num_local_experts=12, num_experts_per_tok=2)
EXPERT = "model.layers.1.block_sparse_moe.experts.10.w2.weight"


@functools.cache
def golden(name: str) -> tuple[hf_config.Config, dict[str, tuple[int, ...]]]:
  """The config and the shapes of the tensors that transformers saved."""
  with tempfile.TemporaryDirectory() as folder:
    directory = checkpoints.write(name, Path(folder))
    made, values = checkpoints.tensors(directory), json.loads((directory / "config.json").read_text())
  return names.fitted(hf_config.read(values), made), {tensor: array.shape for tensor, array in made.items()}


def shapes(config: hf_config.Config) -> names.Shapes:
  blocks = [names.block_shapes(config, l) for l in range(names.block_count(config))]
  return functools.reduce(lambda a, b: a | b, blocks, names.top_shapes(config))


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_every_tensor_that_transformers_saves_has_its_place(name: str):
  config, tensors = golden(name)
  parameters, filled = shapes(config), set()
  for tensor, shape in tensors.items():
    place = names.place(config, tensor)
    assert place is not None, tensor
    ours = parameters[place.parameter]
    ours = ours[1:] if place.expert is not None else ours
    assert shape == (ours[::-1] if names.turned(place.parameter) else ours), tensor
    assert place not in filled
    filled.add(place)
  assert {place.parameter for place in filled} == set(parameters)


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_the_names_that_we_write_are_those_of_transformers(name: str):
  config, tensors = golden(name)
  assert sorted(n for parameter in shapes(config) for n in names.tensor_names(config, parameter)) == sorted(tensors)
  for l in filter(config.sparse, range(names.block_count(config))):
    for projection, tensor in names.expert_names(config, l, 2).items():
      assert names.place(config, tensor) == names.Place(f"blocks/{l}/moe/{projection}", 2)


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_parameters_and_shapes_are_those_of_the_model(name: str):
  config, _ = golden(name)
  model = convert.named_leaves(families.abstract(config))
  assert shapes(config) == {parameter: leaf.shape for parameter, leaf in model.items()}


def test_switch_blocks_are_counted_over_both_stacks():
  expected = {
      "encoder.block.2.layer.0.SelfAttention.q.weight": ("blocks/2/attention/q", None),
      "encoder.final_layer_norm.weight": ("blocks/2/final_norm", None),
      "decoder.block.0.layer.1.EncDecAttention.o.weight": ("blocks/3/cross/o", None),
      "decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight": ("blocks/4/moe/down", 3),
      "decoder.final_layer_norm.weight": ("top/norm", None),
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("top/encoder_bias", None),
  }
  assert {name: names.place(SWITCH, name) for name in expected} == expected


def test_both_layouts_and_both_prefixes_of_mixtral():
  for prefix in ("block_sparse_moe", "mlp"):
    inside = f"model.layers.1.{prefix}"
    assert names.place(MIXTRAL, f"{inside}.experts.10.w2.weight") == ("blocks/1/moe/down", 10)
    assert names.place(MIXTRAL, f"{inside}.experts.gate_up_proj") == ("blocks/1/moe/gate+up", None)
    assert names.place(MIXTRAL, f"{inside}.experts.down_proj") == ("blocks/1/moe/down", None)
    assert names.place(MIXTRAL, f"{inside}.gate.weight") == ("blocks/1/moe/router", None)


@pytest.mark.parametrize(("config", "name"), [
    (MIXTRAL, EXPERT.replace("layers.1", "layers.2")), (MIXTRAL, EXPERT.replace("10", "12")),
    (MIXTRAL, EXPERT.replace("10", "010")), (MIXTRAL, EXPERT.replace("layers.1", "layers.01")),
    (MIXTRAL, EXPERT.replace("10", "-1")), (MIXTRAL, EXPERT.replace("10", "1" * 5000)), (MIXTRAL, EXPERT + ".bias"),
    (MIXTRAL, "x" + EXPERT), (MIXTRAL, EXPERT + "\n"), (MIXTRAL, EXPERT.replace(".w2", "_w2")),
    (MIXTRAL, EXPERT.replace("10", "\u0661")), (MIXTRAL, "model.layers.0.mlp.shared_expert.up_proj.weight"),
    (MIXTRAL, "lm_head.weight"), (MIXTRAL, ""), (MIXTRAL, EXPERT.replace("w2", "down_proj")),
    (SWITCH, "encoder.block.3.layer.0.layer_norm.weight"), (SWITCH, "decoder.block.2.layer.0.layer_norm.weight"),
    (SWITCH, "encoder.block.0.layer.1.EncDecAttention.o.weight"), (SWITCH, "encoder.embed_tokens.weight"),
    (SWITCH, "decoder.block.0.layer.2.mlp.experts.expert_4.wo.weight"),
])
def test_what_has_no_place(config: hf_config.Config, name: str):
  assert names.place(config, name) is None


def test_what_is_passed_over_and_what_it_must_be():
  untied = dataclasses.replace(MIXTRAL, tie_word_embeddings=False)
  assert names.ignored(MIXTRAL, "lm_head.weight") == "copy" and names.ignored(untied, "lm_head.weight") is None
  assert names.ignored(MIXTRAL, "model.layers.1.self_attn.rotary_emb.inv_freq") == "rotation"
  assert names.ignored(MIXTRAL, "model.layers.1.self_attn.rotary_emb.inv_freq.x") is None
  assert names.ignored(SWITCH, "encoder.embed_tokens.weight") == "copy"
  assert names.ignored(MIXTRAL, "encoder.embed_tokens.weight") is None


def test_an_untied_switch_may_have_an_embedding_for_each_stack():
  untied, own = dataclasses.replace(SWITCH, tie_word_embeddings=False), ["encoder.embed_tokens.weight"]
  assert not names.fitted(untied, []).separate_embeddings and names.fitted(untied, own).separate_embeddings
  assert names.fitted(SWITCH, own) is SWITCH and names.fitted(MIXTRAL, own) is MIXTRAL
  assert names.place(names.fitted(untied, own), own[0]) == ("top/encoder_embedding", None)


def test_a_name_belongs_to_one_parameter_alone():
  """No name matches the templates of two parameters: the order of the rules does not matter."""
  for family, table in names.TABLE.items():
    written = [(parameter, t.format(l=1, e=2)) for parameter, templates in table.items() for t in templates]
    assert len({name for _, name in written}) == len(written), family
    for parameter, name in written:
      matching = {p for p, templates in table.items() for t in templates if re.fullmatch(names._pattern(t), name)}
      assert matching == {parameter}, (family, name)


def test_orientation_is_that_of_the_files(tmp_path: Path):
  """A product with a weight as it is in the file, `x @ w.T`, is one with ours."""
  directory = checkpoints.write("qwen2_moe", tmp_path)
  tensors, (model, config) = checkpoints.tensors(directory), convert.load(directory)
  x, block = np.ones((3, 32), np.float32) * np.arange(32), model.blocks[1]
  for name, weight in (("mlp.experts.3.up_proj", block.moe.up[...][3]), ("self_attn.k_proj", block.attention.k[...]),
                       ("mlp.shared_expert.gate_proj", block.moe.shared.gate[...])):
    np.testing.assert_allclose(x @ tensors[f"model.layers.1.{name}.weight"].T, x @ np.asarray(weight), rtol=1e-5)
