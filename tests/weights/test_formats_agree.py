"""The same weights as Meta's shards, as Hugging Face and as GGUF: one tree, bit for bit, and the
logits of the originals.
"""

import json

import gguf
import jax
import numpy as np
import pytest
from meta_files import FAMILIES, meta_tensors, metas_logits, metas_own, pairs, save, write_meta
from safetensors.numpy import save_file
from support import random_parameters, random_tokens, transformers_model

from llama_jax.model.llama import logits
from llama_jax.weights.assemble import assemble
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hf_read import HuggingFaceSource
from llama_jax.weights.meta import MetaSource

torch = pytest.importorskip("torch", reason="Meta's files are written by PyTorch, on Python 3.11")
pytestmark = pytest.mark.parity

_BLOCKS = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_LAYERS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    """(config, stacked parameters) of one family."""
    config = FAMILIES[request.param]
    return config, random_parameters(config, seed=11)


def require_same(source, config, params) -> None:
    """The config, and every parameter bit for bit."""
    assert source.config == config
    got = assemble(source, "stacked", np.float32)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)


def renamed(tensors, layers: dict, prefix: str, others: dict) -> dict[str, np.ndarray]:
    """Meta's tensors under the names of another format."""
    names = {}
    for name in tensors:
        _, layer, *inner = (
            name.removesuffix(".weight").split(".")
            if name.startswith("layers.")
            else ("", "", name)
        )
        names[name] = (
            f"{prefix}.{layer}.{layers['.'.join(inner)]}.weight" if layer else others[name]
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def halves(tensors, config) -> dict[str, np.ndarray]:
    """Meta's tensors with q and k as Hugging Face has them, in halves; the formula of transformers'
    conversion.
    """
    heads = {"wq": config.heads, "wk": config.kv_heads}

    def turned(name: str, rows: np.ndarray) -> np.ndarray:
        kind = name.split(".")[-2]
        if kind not in heads:
            return rows
        return np.ascontiguousarray(
            rows.reshape(heads[kind], -1, 2, rows.shape[-1])
            .transpose(0, 2, 1, 3)
            .reshape(rows.shape)
        )

    return {name: turned(name, tensor) for name, tensor in tensors.items()}


def write_hugging_face(directory, config, params, count: int):
    directory.mkdir()
    others = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    tensors = renamed(halves(meta_tensors(config, params), config), _LAYERS, "model.layers", others)
    rope, scaling = {"rope_theta": config.rope_theta, "rope_type": "default"}, config.rope_scaling
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    values = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_head,
    }
    (directory / "config.json").write_text(json.dumps(values))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
    if count == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, directory / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, inside in files.items() for name in inside},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def rope_divisors(config) -> np.ndarray:
    """What llama.cpp's conversion writes as `rope_freqs.weight`: by its loop over frequencies."""
    factor, low, high = config.rope_scaling.factor, 8192 / 1.0, 8192 / 4.0
    divisors = []
    for frequency in config.rope_theta ** -(np.arange(0, 8, 2) / 8):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        divisors.append(
            1
            if wavelength < high
            else factor
            if wavelength > low
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(divisors, np.float32)


def write_gguf(path, config, params):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(176)
    writer.add_head_count(8)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(96)
    others = {
        "tok_embeddings.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "output.weight": "output.weight",
    }
    heads = {"wq": config.heads, "wk": config.kv_heads}
    tensors = meta_tensors(config, params)
    for name, rows in halves(
        tensors, config
    ).items():  # llama.cpp starts from Hugging Face's layout, and turns it back
        kind = name.split(".")[-2]
        tensors[name] = np.ascontiguousarray(pairs(rows, heads[kind])) if kind in heads else rows
    if config.rope_scaling:
        writer.add_tensor("rope_freqs.weight", rope_divisors(config))
    for name, tensor in renamed(tensors, _BLOCKS, "blk", others).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_metas_shards_are_the_model(tmp_path, model, count):
    require_same(MetaSource.open(write_meta(tmp_path / "meta", *model, count)), *model)


@pytest.mark.parametrize("count", [1, 3])
def test_hugging_face_files_are_the_model(tmp_path, model, count):
    require_same(
        HuggingFaceSource.open(write_hugging_face(tmp_path / "hub", *model, count)), *model
    )


def test_gguf_is_the_model(tmp_path, model):
    require_same(GgufSource.open(write_gguf(tmp_path / "tiny.gguf", *model)), *model)


@pytest.mark.parametrize(
    "model",
    [
        "llama",
        "llama3.1",
        "llama3.2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama2", "llama3")),
    ],
    indirect=True,
)
def test_logits_equal_transformers_and_metas_own_model(tmp_path, model, monkeypatch):
    """Meta's model runs on Meta's tensors, transformers' on Hugging Face's, ours on what is read
    from Meta's shards.
    """
    config, params = model
    tokens = random_tokens(config, (2, 60))
    source = MetaSource.open(write_meta(tmp_path / "meta", *model, 2))
    got = np.asarray(logits(assemble(source, "stacked", np.float32), tokens, config))
    with torch.no_grad():
        expected = transformers_model(config, params)(
            torch.from_numpy(np.array(tokens, np.int64))
        ).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    pytest.importorskip("llama_models")
    if config.rope_scaling is None or config.rope_scaling.factor == 8:
        theirs = metas_logits(config, meta_tensors(config, params), np.asarray(tokens), monkeypatch)
        np.testing.assert_allclose(got, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_cut_by_metas_own_code_are_the_model(tmp_path, monkeypatch, count):
    """Llama 3 with as many key/value heads as query heads, so that no shard holds copies."""
    import dataclasses

    pytest.importorskip("llama_models")
    config = dataclasses.replace(FAMILIES["llama3"], kv_heads=8)
    params = random_parameters(config, seed=12)
    whole = {name: torch.tensor(tensor) for name, tensor in meta_tensors(config, params).items()}
    write_meta(tmp_path / "meta", config, params)
    reshard = metas_own("checkpoint", monkeypatch).reshard_mp
    for number in range(count):
        save(
            tmp_path / "meta" / f"consolidated.{number:02}.pth",
            {k: v.numpy() for k, v in reshard([whole], count, number).items()},
        )
    require_same(MetaSource.open(tmp_path / "meta"), config, params)
