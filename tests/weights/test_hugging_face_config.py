"""config.json of transformers 4 and 5: the same architecture from both, and nothing unknown taken
for harmless.
"""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import PRESETS
from llama_jax.weights.hf_config import config_from_hugging_face, unknown_keys

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def scaling_values(scaling: RopeScaling | None) -> dict:
    values = (
        {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
        if scaling
        else {}
    )
    if "original_context" in values:
        values["original_max_position_embeddings"] = values.pop("original_context")
    return values


def version4(config: LlamaConfig) -> dict:
    """What transformers 4 writes for an architecture."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": scaling_values(config.rope_scaling) or None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def version5(config: LlamaConfig, directory) -> dict:
    """What the installed transformers writes for an architecture."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling_values(
        config.rope_scaling
    )
    transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tied_head,
        dtype="bfloat16",
    ).save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def refusal(**changes) -> str:
    with pytest.raises(InputError) as refused:
        config_from_hugging_face(SMOLLM2 | changes)
    assert "\n" not in str(refused.value)
    return str(refused.value)


reals = st.floats(1.0, 64.0, allow_nan=False)
scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just("linear"), reals),
    st.builds(
        RopeScaling,
        st.just("llama3"),
        reals,
        st.floats(0.5, 1.5),
        st.floats(2.0, 8.0),
        st.integers(16, 8192),
    ),
)
configs = st.builds(
    lambda kv_heads, group, half, **rest: LlamaConfig(
        kv_heads=kv_heads,
        heads=kv_heads * group,
        head_dim=2 * half,
        dim=24 * kv_heads * group,
        **rest,
    ),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    half=st.integers(1, 16),
    vocab_size=st.integers(2, 99),
    layers=st.integers(1, 4),
    ffn_dim=st.integers(1, 99),
    norm_eps=st.sampled_from([1e-5, 1e-6, 3e-6]),
    rope_theta=st.sampled_from([1e4, 1e5, 5e5]),
    rope_scaling=scalings,
    context_length=st.integers(8193, 1 << 17),
    tied_head=st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(config=configs)
def test_version_4_reads_back(config):
    assert config_from_hugging_face(version4(config)) == config


@pytest.mark.parity
@settings(deadline=None, max_examples=50)
@given(config=configs)
def test_version_5_reads_back(config, tmp_path_factory):
    assert config_from_hugging_face(version5(config, tmp_path_factory.mktemp("config"))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_back_from_both_versions(name, tmp_path):
    assert config_from_hugging_face(version4(PRESETS[name])) == PRESETS[name]
    assert config_from_hugging_face(version5(PRESETS[name], tmp_path)) == PRESETS[name]


@pytest.mark.parity
def test_everything_that_transformers_can_write_is_known(tmp_path):
    """Also the keys that it writes only when asked for all of them."""
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig().to_json_file(tmp_path / "config.json", use_diff=False)
    assert config_from_hugging_face(json.loads((tmp_path / "config.json").read_text())).dim == 4096


def test_published_config_of_smollm2():
    assert config_from_hugging_face(SMOLLM2) == PRESETS["smollm2-135m"]


@pytest.mark.parity
def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig()
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    ours = config_from_hugging_face(
        {"model_type": "llama"} | {key: getattr(theirs, key) for key in required}
    )
    assert (ours.norm_eps, ours.rope_theta) == (
        theirs.rms_norm_eps,
        theirs.rope_parameters["rope_theta"],
    )
    assert (ours.tied_head, ours.context_length) == (
        theirs.tie_word_embeddings,
        theirs.max_position_embeddings,
    )
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    for key in required:
        values = {"model_type": "llama"} | {other: 8 for other in required if other != key}
        with pytest.raises(InputError, match=f"{key} is missing"):
            config_from_hugging_face(values)


def test_old_and_new_spelling_of_the_rope_type():
    llama3 = scaling_values(PRESETS["llama3.1-8b"].rope_scaling)
    for scaling in (
        {"type": "linear", "factor": 2},
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
    ):
        assert config_from_hugging_face(
            SMOLLM2 | {"rope_scaling": scaling}
        ).rope_scaling == RopeScaling("linear", 2.0)
    both = SMOLLM2 | {"rope_scaling": llama3, "rope_parameters": llama3 | {"rope_theta": 100000.0}}
    assert config_from_hugging_face(both).rope_scaling == PRESETS["llama3.1-8b"].rope_scaling
    assert "rope_theta" in refusal(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_multiplier": 0.1}, "attention_multiplier"),
        ({"original_max_position_embeddings": 8192}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "'factor'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}},
            "attention_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"hidden_size": "576"}, "hidden_size is '576'"),
        ({"hidden_size": 577}, "hidden_size 577 is not a multiple of num_attention_heads 9"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_hidden_layers": 1 << 40}, "layers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 2}, "kv_heads"),
        ({"bad\nkey" * 1000: 1}, "unknown"),
    ],
)
def test_what_would_change_the_logits_is_refused_by_name(changes, named):
    message = refusal(**changes)
    assert named in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "values",
    [
        {
            "sliding_window": None,
            "quantization_config": None,
            "use_sliding_window": False,
            "auto_map": {},
            "new_thing": "",
        },
        {"layer_types": ["full_attention"] * 30},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"logit_scale": 1.0, "residual_multiplier": 1, "num_experts": 0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": False}},
    ],
)
def test_unknown_keys_that_switch_nothing_on_are_named_and_ignored(values):
    plain = (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} if "rope_scaling" in values else {}
    )
    assert config_from_hugging_face(SMOLLM2 | values) == config_from_hugging_face(SMOLLM2 | plain)
    unknown = values.keys() - {"quantization_config", "rope_scaling"}
    assert unknown_keys(SMOLLM2 | values) == sorted(unknown)


@pytest.mark.parametrize(
    "values",
    [
        {"sliding_window": 4096},
        {"logit_scale": 0.5},
        {"num_experts": 8},
        {"layer_types": ["sliding_attention"] * 30},
        {"use_qk_norm": True},
        {"new_thing": 0},
    ],
)
def test_unknown_keys_that_might_change_the_model_are_refused(values):
    assert next(iter(values)) in refusal(**values)
