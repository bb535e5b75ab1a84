"""The report about a model on disk, against what its makers' libraries count and what was put wrong
on purpose.
"""

import collections
import dataclasses
import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hub import tiny_tokenizer
from meta_files import FAMILIES, write_meta
from safetensors.numpy import load_file, save_file
from support import TINY, random_parameters

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.presets import PRESETS, preset
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.inspect import Contents, report, warnings_of
from llama_jax.weights.load import load
from llama_jax.weights.open import Opened, open_model


@pytest.mark.smollm2
def test_the_real_file_as_the_original_library_counts_it(smollm2_gguf, original):
    tensors = original.tensors
    found = report(open_model(smollm2_gguf))
    assert found.types == collections.Counter(tensor.tensor_type.name for tensor in tensors)
    assert found.nbytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert (
        found.parameters
        == found.expected_parameters
        == sum(math.prod(map(int, tensor.shape)) for tensor in tensors)
    )
    assert (found.preset, found.format, found.layout, found.chat_template) == (
        "smollm2-135m",
        "gguf",
        "adjacent",
        "chatml",
    )
    assert found.stops == {0: "<|endoftext|>", 2: "<|im_end|>"}
    assert (found.begin, found.adds_begin) == ("<|im_start|>", False)
    assert (found.tokenizer_vocab_size, found.odd) == (49152, ())


def test_a_hugging_face_directory(tiny_directory):
    tensors = load_file(tiny_directory / "model.safetensors")
    found = report(open_model(tiny_directory))
    assert found.types == {"float32": len(tensors)}
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (
        found.parameters
        == found.expected_parameters
        == sum(tensor.size for tensor in tensors.values())
    )
    assert (found.preset, found.format, found.layout, found.chat_template) == (
        None,
        "hugging_face",
        "halves",
        "chatml",
    )
    assert found.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert found.odd == (
        "the chat template ends turns with '<|im_end|>' (2), which the files do not "
        "declare as a stop",
    )


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_shards_of_metas_count_once(tmp_path, family, count):
    """Norms are in every shard, key/value heads in several of eight: each parameter counts once."""
    pytest.importorskip("torch", reason="its files are written by torch")
    config = FAMILIES[family]
    params = random_parameters(config)
    write_meta(tmp_path / "model", config, params, count)
    found = report(open_model(tmp_path / "model"))
    assert (
        found.parameters == found.expected_parameters == sum(leaf.size for leaf in _leaves(params))
    )
    assert (found.layout, found.chat_template, found.stops) == ("adjacent", "none", {})


def _leaves(tree):
    return [
        leaf
        for node in tree.values()
        for leaf in (_leaves(node) if isinstance(node, dict) else [node])
    ]


def test_a_run(tmp_path, tiny_directory):
    params = random_parameters(TINY)
    with Checkpoints.open(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        state = {"params": params, "moments": random_parameters(TINY, seed=1), "step": jnp.int32(3)}
        checkpoints.save(3, state, {"model": dataclasses.asdict(TINY)})
    shutil.copy(tiny_directory / "tokenizer.json", tmp_path / "run")
    found = report(open_model(tmp_path / "run"))
    assert (found.origin, found.layout, found.types) == (
        "run run at step 3",
        "halves",
        {"float32": 12},
    )
    assert found.parameters == found.expected_parameters
    assert found.nbytes == 4 * found.parameters
    assert found.odd == (
        "the tokenizer has 280 tokens, the model 97: ids from 97 on are of no use",
    )


class Declared:
    """A source of which only the architecture is looked at."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config

    def read(self, name: str, layer: int | None) -> np.ndarray:
        raise AssertionError


def odd_architecture(config: LlamaConfig) -> list[str]:
    opened = Opened(Declared(config), None, None, (0,), "gguf", pathlib.Path("m"), "m")
    return [
        sentence
        for sentence in warnings_of(opened, Contents({}, 0, 0, False))
        if "no tokenizer" not in sentence
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_odd_about_published_models(name):
    assert odd_architecture(preset(name)) == []


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        (
            "llama3-8b",
            {"rope_theta": 1e4},
            "the sizes are those of llama3-8b, but rope_theta is 10000.0 and there 500000.0",
        ),
        (
            "llama3.1-8b",
            {"norm_eps": 1e-6},
            "the sizes are those of llama3.1-8b, but norm_eps is 1e-06 and there 1e-05",
        ),
        (
            "llama3.2-1b",
            {"tied_head": False},
            "the sizes are those of llama3.2-1b, but tied_head is false and there true",
        ),
        (
            "llama-7b",
            {"vocab_size": 32001},
            "the sizes are those of llama-7b, but vocab_size is 32001 and there 32000",
        ),
        (
            "llama3.2-1b",
            {"rope_scaling": None},
            "the sizes are those of llama3.2-1b, but rope_scaling is none and there llama3 by 32",
        ),
        (
            "llama2-7b",
            {"rope_theta": 1e6, "context_length": 16384},
            "the sizes are those of llama2-7b, but rope_theta is 1000000.0 and there 10000.0; "
            "context_length is 16384 and there 4096",
        ),
    ],
)
def test_sizes_of_a_published_model_with_other_numbers(name, changes, sentence):
    assert odd_architecture(dataclasses.replace(preset(name), **changes)) == [sentence]


def test_a_context_beyond_its_scaling():
    scaling = RopeScaling(
        "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=1000
    )
    config = dataclasses.replace(TINY, rope_scaling=scaling, context_length=8001)
    sentence = (
        "a context of 8001 tokens is declared, 8000 are what its RoPE scaling is known to reach"
    )
    assert odd_architecture(config) == [sentence]
    assert odd_architecture(dataclasses.replace(config, context_length=8000)) == []


@pytest.fixture
def directory(tiny_directory, tmp_path) -> pathlib.Path:
    """A copy in which nothing is odd."""
    copy = shutil.copytree(tiny_directory, tmp_path / "tiny")
    describe(copy, eos_token_id=[0, 2], dtype="float32")
    return copy


def describe(directory: pathlib.Path, **values) -> None:
    """Changes keys of config.json, or takes them away where they are None."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_nothing_odd(directory):
    found = report(open_model(directory))
    assert found.odd == ()
    assert len(found.brief()) == 1


def test_a_tied_head_that_is_stored(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        directory / "model.safetensors",
    )
    describe(directory, tie_word_embeddings=True)
    found = report(open_model(directory))
    assert found.odd == (
        "the head is tied to the embedding, and a copy of the embedding is stored as a "
        "head all the same",
    )
    assert found.parameters == found.expected_parameters


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_type_than_declared(directory, key):
    describe(directory, dtype=None)
    describe(directory, **{key: "bfloat16"})
    assert report(open_model(directory)).odd == (
        "config.json says the weights are 'bfloat16', they are float32",
    )


def test_several_types(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, directory / "model.safetensors")
    assert report(open_model(directory)).odd == (
        "the tensors are of several types: 29 of float32, 1 of float16",
    )


def test_a_tie_that_is_not_declared(directory):
    describe(directory, tie_word_embeddings=None)
    (sentence,) = report(open_model(directory)).odd
    assert sentence.startswith("config.json does not say whether the head is tied")


def test_nothing_that_ends_a_text(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    describe(directory, eos_token_id=None)
    found = report(open_model(directory))
    assert found.odd == (
        "there is no tokenizer among the files",
        "no token is known to end a text: generation goes on to its limit",
    )
    assert (found.chat_template, found.stops, found.tokenizer_vocab_size) == ("none", {}, None)
    assert len(found.brief()) == 2
    assert "and 1 more" in found.brief()[1]


def test_turn_tokens_that_are_not_special(directory):
    """They are control all the same, and it is said."""
    state = json.loads((directory / "tokenizer.json").read_text())
    for entry in state["added_tokens"]:
        entry["special"] = entry["content"] != "<|im_end|>"
    (directory / "tokenizer.json").write_text(json.dumps(state))
    describe(directory, eos_token_id=0)
    opened = open_model(directory)
    assert opened.stop_ids == (0, 2)
    assert any(
        sentence.startswith("'<|im_end|>' structure conversations, yet")
        for sentence in report(opened).odd
    )


def test_what_the_tokenizers_description_says_against_what_is_done(directory):
    """The begin token of transformers 5, and chat templates none of which is the default."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    does = open_model(directory).tokenizer.adds_begin
    named = [{"name": "rag", "template": "R"}]
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_bos_token": not does, "chat_template": named})
    )
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    opened = open_model(directory)
    odd = report(opened).odd
    assert opened.tokenizer.adds_begin is does
    assert any(
        line.startswith(f"tokenizer_config.json says add_bos_token: {str(not does).lower()}, yet")
        for line in odd
    )
    assert "there are chat templates named 'rag' and none named default: none is used" in odd


def test_a_foreign_template(directory):
    (directory / "chat_template.jinja").write_text("{{ messages[0].content | upper }}")
    assert report(open_model(directory)).chat_template == "foreign"


def test_it_is_json(directory):
    found = report(open_model(directory))
    values = json.loads(json.dumps(found.to_dict()))
    assert values == found.to_dict()
    assert values["model"]["dim"] == TINY.dim
    assert values["stops"] == {"0": "<|endoftext|>", "2": "<|im_end|>"}


def test_nothing_from_a_file_reaches_the_terminal_as_a_command(directory):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["\x1b[2J\x07evil\nline", *(letter * 250 for letter in "abcde")])
    tokenizer.save(str(directory / "tokenizer.json"))
    lines = report(open_model(directory)).lines()
    assert all(line.isprintable() for line in lines)
    assert any(r"\x1b[2J" in line for line in lines)
    assert max(map(len, lines)) < 1100


def test_a_loaded_model_carries_it(directory):
    assert load(directory).report == report(open_model(directory))
