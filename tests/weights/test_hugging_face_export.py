"""Directories written for Hugging Face, as transformers reads them: logits, config, tokenizer,
special tokens, card.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import tensors_of, values_of
from hub import TEMPLATE
from support import TINY, VARIANTS, float64_logits, random_parameters, random_tokens

from llama_jax.config import RopeScaling
from llama_jax.weights.hf_config import config_from_hugging_face
from llama_jax.weights.hf_write import export_hugging_face, save_hugging_face
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model

# --- what transformers makes of it ---

MODELS = {
    "llama-1": dataclasses.replace(TINY, kv_heads=6, head_dim=8, norm_eps=1e-6),
    "llama-2-70b": dataclasses.replace(TINY, kv_heads=2, head_dim=8),
    "llama-3": dataclasses.replace(TINY, rope_theta=5e5),
    "llama-3.1": VARIANTS["llama3-factor8"],
    "llama-3.2": VARIANTS["llama3-factor32-tied"],
    "linear": VARIANTS["linear"],
}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MODELS),
        ("llama-3", {"max_shard_size": "30KB"}),
        ("llama-3.2", {"dtype": "bfloat16"}),
    ],
)
def test_logits_and_config_in_transformers(name, options, tmp_path):
    torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
    import transformers

    config, params = MODELS[name], jax.device_get(random_parameters(MODELS[name]))
    if options.get("dtype"):  # so that nothing is left to round
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.dtype(options["dtype"])).astype(np.float32), params
        )
    params = jax.tree.map(jnp.asarray, params)
    save_hugging_face(params, config, tmp_path / "out", stop_ids=(3, 5), **options)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = random_tokens(config, (2, 60))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(float64_logits(params, tokens, config), expected, atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == [3, 5]
    loaded = load(tmp_path / "out")
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.params["embedding"], params["embedding"])


@pytest.mark.parametrize("name", MODELS)
def test_config_as_transformers_reads_it(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = MODELS[name]
    save_hugging_face(
        random_parameters(config), config, tmp_path / "out", stop_ids=(4,), dtype="float16"
    )
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(read).__name__ == "LlamaConfig"
    scaling = config.rope_scaling
    rope = {
        "rope_theta": config.rope_theta,
        "rope_type": scaling.rope_type if scaling else "default",
    }
    rope |= {"factor": scaling.factor} if scaling else {}
    if scaling and scaling.rope_type == "llama3":
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    assert read.rope_parameters == rope
    assert (read.head_dim, read.num_key_value_heads, read.tie_word_embeddings) == (
        config.head_dim,
        config.kv_heads,
        config.tied_head,
    )
    assert (read.rms_norm_eps, read.max_position_embeddings, read.eos_token_id) == (
        config.norm_eps,
        128,
        4,
    )
    assert str(read.dtype) == "torch.float16" or read.dtype == "float16"


@pytest.mark.parametrize("name", MODELS)
def test_config_in_the_spelling_of_transformers_4(name, tmp_path):
    """Version 4 reads these keys alone, and rejects a `rope_scaling` with other keys than its
    own.
    """
    config = MODELS[name]
    save_hugging_face(random_parameters(config), config, tmp_path / "out")
    values = values_of(tmp_path / "out" / "config.json")
    assert values["torch_dtype"] == "float32"
    own = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    assert config_from_hugging_face(own) == config
    keys = {
        "linear": {"rope_type", "factor"},
        "llama-3.1": {
            "rope_type",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
    }
    if name in keys:
        assert set(values["rope_scaling"]) == keys[name]


# --- special tokens, tokenizer, template, card ---


def test_generation_config_lists_every_stop(tiny_directory, tmp_path):
    export_hugging_face(open_model(tiny_directory), tmp_path / "out")
    assert values_of(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [0, 2]}
    assert values_of(tmp_path / "out" / "config.json")["eos_token_id"] == [0, 2]
    assert load(tmp_path / "out").stop_ids == (0, 2)


def test_declared_values_are_kept(tiny_directory, tmp_path):
    source = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "source"))
    declared = {
        "temperature": 0.6,
        "do_sample": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    (source / "generation_config.json").write_text(json.dumps(declared))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    export_hugging_face(open_model(source), tmp_path / "out")
    assert values_of(tmp_path / "out" / "generation_config.json") == declared
    config = values_of(tmp_path / "out" / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 0, 2)


@pytest.mark.parametrize("pad", [-1, 280, "0", True])
def test_a_padding_token_without_a_row_is_left_out(pad, tiny_directory, tmp_path):
    """transformers would not load the model: it asks the embedding table for that row."""
    source = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "source"))
    (source / "config.json").write_text(
        json.dumps(values_of(source / "config.json") | {"pad_token_id": pad})
    )
    export_hugging_face(open_model(source), tmp_path / "out")
    assert values_of(tmp_path / "out" / "config.json")["pad_token_id"] is None


def test_tokenizer_of_transformers_gives_equal_ids(tiny_directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    opened = open_model(tiny_directory)
    params = random_parameters(opened.source.config)
    copied = export_hugging_face(opened, tmp_path / "copied").directory
    written = save_hugging_face(
        params,
        opened.source.config,
        tmp_path / "written",
        opened.tokenizer,
        opened.template,
        opened.stop_ids,
    ).directory
    text = "The cat sat on the mat, 你好 <no> 12345."
    message = [{"role": "user", "content": "Hello"}]
    for directory in (copied, written):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert theirs(text, add_special_tokens=False)["input_ids"] == opened.tokenizer.encode(text)
        rendered = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert rendered == opened.template.render(message, add_generation_prompt=True)
        assert load(directory).tokenizer.encode(text) == opened.tokenizer.encode(text)
        assert load(directory).template.source == TEMPLATE


def test_model_card(tiny_directory, tmp_path):
    import yaml

    export_hugging_face(open_model(tiny_directory), tmp_path / "My Model", "bfloat16")
    _, front, text = (tmp_path / "My Model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama"],
    }
    count = sum(tensor.size for tensor in tensors_of(tiny_directory).values())
    for fact in (
        "# My Model\n",
        f"| parameters | {count:,} |",
        "| dtype | bfloat16 |",
        "65,536 tokens",
        "Hugging Face tiny",
    ):
        assert fact in text


def test_card_of_a_scaled_rope(tmp_path):
    config = dataclasses.replace(
        TINY, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    )
    save_hugging_face(random_parameters(config), config, tmp_path / "out")
    assert (
        "base 500000, llama3 scaling by 32 from 8,192 tokens"
        in (tmp_path / "out" / "README.md").read_text()
    )
