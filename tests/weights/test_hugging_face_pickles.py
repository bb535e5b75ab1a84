"""Weights that `torch.save` wrote, in a directory of Hugging Face's: the values of the safetensors
beside which they lay.
"""

import collections
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_jax.errors import InputError
from llama_jax.weights.hf_read import NAMES as FILE_NAMES
from llama_jax.weights.hf_read import HuggingFaceSource, config_from_hugging_face
from llama_jax.weights.source import file_shapes, flat_shapes

VALUES = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def tensors(tmp_path, torch):
    """A directory without weights is written; the weights of the model, bfloat16, are returned."""
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    shapes = file_shapes(config_from_hugging_face(VALUES), FILE_NAMES)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }


def require_equal(source, tensors) -> None:
    for path in flat_shapes(source.config):
        layer = 1 if path.startswith("layers/") else None
        stored = tensors[FILE_NAMES[path].format(layer)].float().numpy()
        read = source.read(path, layer)
        assert read.dtype.name == source.dtype(path, layer).name == "bfloat16"
        np.testing.assert_array_equal(
            read.astype(np.float32), stored if path == "embedding" else stored.T
        )


def read_all(directory) -> None:
    source = HuggingFaceSource.open(directory)
    for path in flat_shapes(source.config):
        source.read(path, 0 if path.startswith("layers/") else None)


def refusal(directory) -> str:
    with pytest.raises(InputError) as refused:
        read_all(directory)
    assert str(refused.value).startswith(str(directory))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_one_file(tmp_path, torch, tensors):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    torch.save(collections.OrderedDict(tensors | buffers), tmp_path / WHOLE)
    require_equal(HuggingFaceSource.open(tmp_path), tensors)


def test_shards_by_their_index(tmp_path, torch, tensors):
    names = sorted(tensors)
    parts = {
        "pytorch_model-00001-of-00002.bin": names[:8],
        "pytorch_model-00002-of-00002.bin": names[8:],
    }
    for part, inside in parts.items():
        torch.save({name: tensors[name] for name in inside}, tmp_path / part)
    index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    require_equal(HuggingFaceSource.open(tmp_path), tensors)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../a.bin"}}))
    assert "a plain name ending in .bin expected" in refusal(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.bin"}}))
    assert "gone.bin: cannot be read" in refusal(tmp_path)


def test_safetensors_come_first(tmp_path, torch, tensors):
    torch.save({"something": torch.zeros(3)}, tmp_path / WHOLE)
    save_file(
        {name: tensor.float().numpy() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    expected = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(
        HuggingFaceSource.open(tmp_path).read("final_norm/scale", None), expected
    )


def test_a_flipped_bit_and_a_program_are_refused(tmp_path, torch, tensors):
    path = tmp_path / WHOLE
    torch.save(tensors, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "checksum" in refusal(tmp_path)
    torch.save(tensors | {"lm_head.weight": collections.Counter}, path)
    assert "nothing is executed" in refusal(tmp_path)
    torch.save(tensors | {"lm_head.weight": torch.zeros(48, 24, dtype=torch.int32)}, path)
    assert "'lm_head.weight' has type int32" in refusal(tmp_path)


def test_a_tied_head_that_shares_its_storage(tmp_path, torch, tensors):
    """As PyTorch saves it: one storage under two names."""
    (tmp_path / "config.json").write_text(json.dumps(VALUES | {"tie_word_embeddings": True}))
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / WHOLE)
    assert HuggingFaceSource.open(tmp_path).config.tied_head
