"""The architecture in GGUF metadata: what a plain LLaMA declares, and what is refused by name."""

import dataclasses

import numpy as np
import pytest

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import preset
from llama_jax.weights.gguf import GgufFile, config_from_gguf

PLAIN = LlamaConfig(
    vocab_size=96,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn_dim=160,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    context_length=128,
    tied_head=False,
)


def config_of(path):
    return config_from_gguf(GgufFile.open(path))


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        config_of(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def llama31_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """The divisors as a converter computes them, one frequency after the other, by Meta's three
    cases.
    """
    divisors = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (channel / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.smollm2
def test_real_file_is_the_published_architecture(smollm2_gguf):
    assert config_of(smollm2_gguf) == preset("smollm2-135m")


def test_plain_metadata(write_gguf):
    assert config_of(write_gguf()) == PLAIN


def test_optional_keys_have_their_defaults(write_gguf):
    absent = ("head_count_kv", "key_length", "value_length")
    keys = {f"llama.attention.{key}": None for key in absent} | {
        "llama.rope.freq_base": None,
        "llama.vocab_size": None,
        "llama.rope.dimension_count": None,
    }
    config = config_of(write_gguf(keys, {"output.weight": None}))
    assert config == dataclasses.replace(PLAIN, kv_heads=4, head_dim=16, tied_head=True)


def test_float32_numbers_become_their_shortest_decimal(write_gguf):
    config = config_of(
        write_gguf(
            {"llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 500000.0}
        )
    )
    assert (config.norm_eps, config.rope_theta) == (1e-6, 500000.0)


def test_scaling_by_metadata(write_gguf):
    factor = {"llama.rope.scaling.factor": 4.0}
    linear = RopeScaling("linear", 4.0)
    assert (
        config_of(write_gguf({"llama.rope.scaling.type": "linear", **factor})).rope_scaling
        == linear
    )
    assert config_of(write_gguf(factor)).rope_scaling == linear
    assert config_of(write_gguf({"llama.rope.scaling.type": "none", **factor})).rope_scaling is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_by_divisors(write_gguf, factor):
    theta = {"llama.rope.freq_base": 500000.0}
    config = config_of(
        write_gguf(theta, {"rope_freqs.weight": llama31_divisors(32, 500000.0, factor)})
    )
    assert (
        config.rope_scaling == preset("llama3.2-1b" if factor == 32 else "llama3.1-8b").rope_scaling
    )


def test_other_divisors_are_refused(write_gguf):
    right = llama31_divisors(32, 10000.0, 8.0)
    for wrong in (
        right * 1.01,
        right[:-1],
        np.zeros(16, np.float32),
        np.full(16, np.nan, np.float32),
        right[:, None],
    ):
        assert "rope_freqs.weight is not the scaling" in refusal(
            write_gguf((), {"rope_freqs.weight": wrong})
        )
    both = write_gguf(
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_freqs.weight": right},
    )
    assert "rope_freqs.weight is not the scaling" in refusal(both)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 8),
        ("llama.expert_used_count", 2),
        ("llama.attention.sliding_window", 4096),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.causal", False),
        ("llama.rope.scaling.attn_factor", 0.5),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 16),
        ("llama.attention.value_length", 64),
        ("llama.some_new_thing", 1),
        ("llama.tensor_data_layout", "other"),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.block_count", "2"),
        ("llama.block_count", None),
        ("llama.context_length", None),
        ("llama.embedding_length", None),
        ("llama.feed_forward_length", None),
        ("llama.attention.head_count", None),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.attention.layer_norm_rms_epsilon", "small"),
    ],
)
def test_other_mathematics_and_missing_keys_are_refused_by_name(write_gguf, key, value):
    assert key in refusal(write_gguf({key: value}))


def test_a_scaling_type_is_named(write_gguf):
    assert "'yarn'" in refusal(write_gguf({"llama.rope.scaling.type": "yarn"}))


def test_heads_must_share_the_width(write_gguf):
    message = refusal(
        write_gguf({"llama.attention.key_length": None, "llama.attention.head_count": 5})
    )
    assert "llama.embedding_length 64 is not a multiple of llama.attention.head_count 5" in message


def test_neutral_keys_are_accepted(write_gguf):
    neutral = {
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    assert config_of(write_gguf(neutral)) == PLAIN


def test_other_architectures_are_refused_by_name(write_gguf):
    assert "'qwen2'" in refusal(write_gguf(architecture="qwen2"))
