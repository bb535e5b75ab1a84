"""Weights from GGUF in the canonical orientation and rotary layout."""

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.weights.gguf import GgufSource, half_layout
from llama_jax.weights.source import Source


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        GgufSource.open(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def rotated_pairs(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Channels 2i and 2i + 1 of a head turned by the i-th angle."""
    complexes = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * angles)
    return np.stack([complexes.real, complexes.imag], 1).reshape(-1)


def rotated_halves(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Channels i and i + H / 2 of a head turned by the i-th angle."""
    low, high = np.split(vector, 2)
    complexes = (low + 1j * high) * np.exp(1j * angles)
    return np.concatenate([complexes.real, complexes.imag])


def test_half_layout_keeps_every_attention_score():
    """In float64: pairs rotated in the file's layout and halves rotated in ours give the same q ·
    k.
    """
    random = np.random.default_rng(5)
    heads, head_dim, dim = 3, 16, 24
    wq, wk = random.standard_normal((2, heads * head_dim, dim))
    x, y = random.standard_normal((2, dim))
    angles = random.standard_normal((2, head_dim // 2))
    pairs = [
        rotated_pairs((wq @ x).reshape(heads, -1)[h], angles[0])
        @ rotated_pairs((wk @ y).reshape(heads, -1)[h], angles[1])
        for h in range(heads)
    ]
    q, k = (half_layout(w, head_dim) @ v for w, v in ((wq, x), (wk, y)))
    halves = [
        rotated_halves(q.reshape(heads, -1)[h], angles[0])
        @ rotated_halves(k.reshape(heads, -1)[h], angles[1])
        for h in range(heads)
    ]
    np.testing.assert_allclose(halves, pairs, rtol=1e-12)


def test_tensors_are_turned_and_only_queries_and_keys_reordered(write_gguf, tensors):
    source = GgufSource.open(write_gguf())
    np.testing.assert_array_equal(source.read("embedding", None), tensors["token_embd.weight"])
    np.testing.assert_array_equal(source.read("head", None), tensors["output.weight"].T)
    np.testing.assert_array_equal(
        source.read("final_norm/scale", None), tensors["output_norm.weight"]
    )
    for path, name in {
        "attention/wv": "attn_v",
        "attention/wo": "attn_output",
        "feed_forward/gate": "ffn_gate",
        "feed_forward/up": "ffn_up",
        "feed_forward/down": "ffn_down",
        "attention_norm/scale": "attn_norm",
        "feed_forward_norm/scale": "ffn_norm",
    }.items():
        np.testing.assert_array_equal(
            source.read(f"layers/{path}", 1), tensors[f"blk.1.{name}.weight"].T
        )


@pytest.mark.parity
def test_tensors_equal_those_that_transformers_reads(write_gguf):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    types = {
        "blk.0.attn_q.weight": "Q8_0",
        "blk.1.attn_k.weight": "Q4_0",
        "blk.1.ffn_down.weight": "Q4_1",
    }
    path = write_gguf(types=types)
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    loaded = load_gguf_checkpoint(
        path, return_tensors=True, model_to_load=transformers.LlamaForCausalLM(config)
    )
    state = {name: tensor.numpy() for name, tensor in loaded["tensors"].items()}
    source = GgufSource.open(path)
    for ours, theirs in {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}.items():
        for layer in range(2):
            expected = state[f"model.layers.{layer}.self_attn.{theirs}.weight"].T
            np.testing.assert_array_equal(source.read(f"layers/attention/{ours}", layer), expected)
    np.testing.assert_array_equal(
        source.read("layers/feed_forward/down", 1), state["model.layers.1.mlp.down_proj.weight"].T
    )


def test_source_fulfils_the_protocol(write_gguf):
    assert isinstance(GgufSource.open(write_gguf()), Source)


def test_float_types_stay_as_they_are_and_blocks_become_float32(write_gguf):
    types = {"output.weight": "F16", "token_embd.weight": "BF16", "blk.0.attn_v.weight": "Q8_0"}
    source = GgufSource.open(write_gguf(types=types))
    names = [
        source.read(*at).dtype.name
        for at in (("head", None), ("embedding", None), ("layers/attention/wv", 0))
    ]
    assert names == ["float16", "bfloat16", "float32"]


def test_tensors_that_do_not_fit_are_refused_by_name(write_gguf):
    extra = np.zeros((32,), np.float32)
    assert "1 unexpected: 'blk.0.attn_q.bias'" in refusal(
        write_gguf((), {"blk.0.attn_q.bias": extra})
    )
    assert "1 missing: 'blk.1.ffn_up.weight'" in refusal(
        write_gguf((), {"blk.1.ffn_up.weight": None})
    )
    wrong = refusal(write_gguf((), {"blk.0.attn_k.weight": np.zeros((32, 64), np.float32)}))
    assert "1 misshapen: 'blk.0.attn_k.weight (32, 64) where (64, 64) is expected'" in wrong
    assert "20 missing" not in refusal(write_gguf({"llama.block_count": 1}))
    assert "9 missing" in refusal(write_gguf({"llama.block_count": 3}))
    assert "and 5 more" in refusal(write_gguf({"llama.block_count": 3}))


def test_unsupported_element_types_are_refused_by_name(write_gguf):
    message = refusal(write_gguf(types={"output.weight": "MXFP4", "blk.0.ffn_up.weight": "MXFP4"}))
    assert "MXFP4 ('blk.0.ffn_up.weight')" in message
    assert "take a file of, or requantize this one to, one of F32, F16, Q4_0" in message
