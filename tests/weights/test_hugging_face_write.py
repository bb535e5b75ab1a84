"""Weights written for Hugging Face: values, dtypes, shards and their index, read back by the
safetensors library.
"""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exported import expected_tensors, require_equal, tensors_of, values_of
from safetensors.numpy import load_file
from support import TINY, VARIANTS, random_parameters

from llama_jax.errors import InputError
from llama_jax.weights.assemble import unstack
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hf_write import export_hugging_face, main_dtype, save_hugging_face
from llama_jax.weights.meta import MetaSource
from llama_jax.weights.open import Opened, open_model
from llama_jax.weights.safetensors import parse_size


@pytest.mark.parametrize("form", [lambda params: params, unstack], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("variant", ["gqa-untied", "mqa-tied"])
def test_parameters_in_memory(variant, form, tmp_path):
    config = VARIANTS[variant]
    params = random_parameters(config)
    exported = save_hugging_face(form(params), config, tmp_path / "out")
    require_equal(tensors_of(exported.directory), expected_tensors(params))
    assert exported.dtype == "float32"
    assert exported.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert set(exported.files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrower_weights_are_rounded_to_nearest(dtype, tmp_path):
    params = random_parameters(TINY)
    save_hugging_face(params, TINY, tmp_path / "out", dtype=np.dtype(dtype).name)
    require_equal(
        tensors_of(tmp_path / "out"),
        {name: x.astype(dtype) for name, x in expected_tensors(params).items()},
    )
    assert values_of(tmp_path / "out" / "config.json")["dtype"] == np.dtype(dtype).name


def test_kept_dtypes_may_differ_from_tensor_to_tensor(tmp_path):
    """As in files whose norms alone are float32; odd sizes would misalign what follows them."""
    config = dataclasses.replace(TINY, vocab_size=97, dim=33)
    narrow = {"layers/attention/wq", "embedding"}

    def cast(path, leaf):
        return leaf.astype(jnp.bfloat16) if "/".join(part.key for part in path) in narrow else leaf

    params = jax.tree_util.tree_map_with_path(cast, random_parameters(config))
    save_hugging_face(params, config, tmp_path / "out")
    require_equal(tensors_of(tmp_path / "out"), expected_tensors(params))
    assert values_of(tmp_path / "out" / "config.json")["torch_dtype"] == "float32"
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert [
        at["data_offsets"][0] % {"F32": 4, "BF16": 2}[at["dtype"]] for at in header.values()
    ] == [0] * len(header)
    assert len({at["dtype"] for at in header.values()}) == 2


def test_shards_and_index(tmp_path):
    params = random_parameters(TINY)
    save_hugging_face(params, TINY, tmp_path / "out", max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 3
    index = values_of(tmp_path / "out" / "model.safetensors.index.json")
    sizes = {
        path.name: sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards
    }
    assert max(sizes.values()) <= 40_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    require_equal(tensors_of(tmp_path / "out"), expected_tensors(params))


def test_a_tensor_above_the_shard_size_has_a_file_of_its_own(tmp_path):
    params = random_parameters(TINY)
    save_hugging_face(params, TINY, tmp_path / "out", max_shard_size=1)
    assert all(len(load_file(path)) == 1 for path in (tmp_path / "out").glob("*.safetensors"))
    require_equal(tensors_of(tmp_path / "out"), expected_tensors(params))


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_a_directory_of_hugging_face_goes_round(dtype, tiny_directory, tmp_path):
    """Bit for bit, weights and tokenizer files alike, by way of a narrower copy as well."""
    export_hugging_face(open_model(tiny_directory), tmp_path / "first", dtype)
    export_hugging_face(open_model(tmp_path / "first"), tmp_path / "second", max_shard_size="50KB")
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    require_equal(second, first)
    if dtype == "keep":
        require_equal(first, tensors_of(tiny_directory))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tiny_directory / name).read_bytes()


def test_quantised_weights_become_float32(write_gguf, tensors, tmp_path):
    gguf = pytest.importorskip("gguf")
    types = {
        "blk.0.ffn_gate.weight": "Q8_0",
        "blk.1.ffn_up.weight": "F16",
        "token_embd.weight": "BF16",
    }
    path = write_gguf(types=types)
    source = GgufSource.open(path)
    assert main_dtype(source) == "float32"
    export_hugging_face(
        Opened(source, None, None, (7,), "gguf", path, "GGUF tiny"), tmp_path / "out"
    )
    given = tensors_of(tmp_path / "out")
    kind = gguf.GGMLQuantizationType.Q8_0
    gate = gguf.quants.dequantize(
        gguf.quants.quantize(tensors["blk.0.ffn_gate.weight"], kind), kind
    )
    np.testing.assert_array_equal(given["model.layers.0.mlp.gate_proj.weight"], gate)
    np.testing.assert_array_equal(
        given["model.layers.1.mlp.up_proj.weight"],
        tensors["blk.1.ffn_up.weight"].astype(np.float16),
    )
    assert given["model.layers.1.mlp.up_proj.weight"].dtype == np.float16
    assert given["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    # llama.cpp keeps the two of a rotated pair side by side, Hugging Face half a head apart.
    q = tensors["blk.0.attn_q.weight"].reshape(4, 16, 2, 64)
    np.testing.assert_array_equal(
        given["model.layers.0.self_attn.q_proj.weight"],
        np.concatenate([q[:, :, 0], q[:, :, 1]], axis=1).reshape(128, 64),
    )


@pytest.mark.parity
def test_shards_of_meta_keep_their_dtype(tmp_path):
    pytest.importorskip("torch", reason="Meta's files are written by PyTorch, on Python 3.11")
    from meta_files import FAMILIES, write_meta

    config = FAMILIES["llama3.1"]
    params = random_parameters(config)
    directory = write_meta(tmp_path / "meta", config, params, count=2, dtype="bfloat16")
    opened = Opened(MetaSource.open(directory), None, None, (), "meta", directory, "Meta tiny")
    assert export_hugging_face(opened, tmp_path / "out").dtype == "bfloat16"
    expected = {
        name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in expected_tensors(params).items()
    }
    require_equal(tensors_of(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5kb", 1500),
        ("7", 7),
        (8, 8),
        ("1TB", 10**12),
    ],
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size", ["", "GB", "-5GB", "5 apples", "0", "0.0001KB", "1e9", "9" * 50, "५GB "]
)
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match=r"^size .* given"):
        parse_size(size)


def test_memory_is_that_of_a_tensor(tmp_path):
    """Files are mapped, and what is cast is cast in strips: less than the largest tensor is ever
    held.
    """
    config = dataclasses.replace(TINY, vocab_size=4000, dim=256, ffn_dim=2048)
    params = random_parameters(config)
    save_hugging_face(params, config, tmp_path / "source")
    opened = open_model(tmp_path / "source")
    tracemalloc.start()
    export_hugging_face(opened, tmp_path / "out", "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    written = {name: tensor.nbytes for name, tensor in tensors_of(tmp_path / "out").items()}
    assert (
        peak
        < max(written.values())
        == written["model.embed_tokens.weight"]
        < sum(written.values()) / 5
    )
