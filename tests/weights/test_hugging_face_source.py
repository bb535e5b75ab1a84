"""Weights of a Hugging Face directory: the values that transformers saved, and damaged or hostile
directories refused.
"""

import collections
import json
import os
import re
import resource
import sys

import ml_dtypes
import numpy as np
import pytest
from matrix import rounds
from safetensors.numpy import load_file, save_file

from llama_jax.errors import InputError
from llama_jax.weights.hf_read import NAMES, HuggingFaceSource
from llama_jax.weights.source import Source, file_shapes, flat_shapes

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
INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors(tmp_path):
    from llama_jax.weights.hf_read import config_from_hugging_face

    random = np.random.default_rng(6)
    shapes = file_shapes(config_from_hugging_face(VALUES), NAMES)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path, tensors):
    """A good directory with one file of weights."""
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def shard(directory, weight_map: dict | None = None) -> None:
    """Splits the weights into two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:8], "b.safetensors": names[8:]}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, directory / part)
    found = {name: part for part, inside in parts.items() for name in inside}
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": found if weight_map is None else weight_map})
    )


def refusal(directory) -> str:
    with pytest.raises(InputError) as refused:
        HuggingFaceSource.open(directory)
    message = str(refused.value)
    assert message.startswith(str(directory))
    assert "\n" not in message
    return message


def save(directory, tensors, **values) -> None:
    (directory / "config.json").write_text(json.dumps(VALUES | values))
    save_file(tensors, directory / "model.safetensors")


def test_tensors_are_turned_and_never_reordered(directory, tensors):
    source = HuggingFaceSource.open(directory)
    assert isinstance(source, Source)
    np.testing.assert_array_equal(
        source.read("embedding", None), tensors["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(source.read("head", None), tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(
        source.read("final_norm/scale", None), tensors["model.norm.weight"]
    )
    names = {
        "attention/wq": "self_attn.q_proj",
        "attention/wk": "self_attn.k_proj",
        "attention/wv": "self_attn.v_proj",
        "attention/wo": "self_attn.o_proj",
        "feed_forward/gate": "mlp.gate_proj",
        "feed_forward/up": "mlp.up_proj",
        "feed_forward/down": "mlp.down_proj",
        "attention_norm/scale": "input_layernorm",
        "feed_forward_norm/scale": "post_attention_layernorm",
    }
    for path, name in names.items():
        np.testing.assert_array_equal(
            source.read(f"layers/{path}", 1), tensors[f"model.layers.1.{name}.weight"].T
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_float_types_stay_as_they_are(directory, tensors, dtype):
    save(directory, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    read = HuggingFaceSource.open(directory).read("layers/attention/wo", 1)
    assert read.dtype == dtype
    np.testing.assert_array_equal(
        read, tensors["model.layers.1.self_attn.o_proj.weight"].T.astype(dtype)
    )


def test_shards_read_like_one_file(directory):
    whole = HuggingFaceSource.open(directory)
    shard(directory)
    parts = HuggingFaceSource.open(directory)
    for name, layer in (
        ("embedding", None),
        ("layers/attention/wq", 1),
        ("final_norm/scale", None),
    ):
        np.testing.assert_array_equal(parts.read(name, layer), whole.read(name, layer))


def test_buffers_of_old_versions_are_ignored(directory, tensors):
    save(
        directory,
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)},
    )
    HuggingFaceSource.open(directory)


def test_a_stored_tied_head_has_to_equal_the_embedding(directory, tensors, monkeypatch):
    monkeypatch.setattr("llama_jax.weights.hf_read._COMPARED_ROWS", 20)
    embedding = tensors["model.embed_tokens.weight"]
    save(directory, tensors | {"lm_head.weight": embedding}, tie_word_embeddings=True)
    assert HuggingFaceSource.open(directory).config.tied_head
    other = embedding.copy()
    other[-1, -1] += 1
    save(directory, tensors | {"lm_head.weight": other}, tie_word_embeddings=True)
    assert "lm_head.weight differs" in refusal(directory)
    save(directory, tensors | {"lm_head.weight": other[:-1]}, tie_word_embeddings=True)
    assert "misshapen" in refusal(directory)


def test_tensors_that_do_not_fit_are_refused_by_name(directory, tensors):
    save(directory, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    assert "1 missing: 'lm_head.weight'" in refusal(directory)
    save(directory, tensors | {"score.weight": np.zeros(3, np.float32)})
    assert "1 unexpected: 'score.weight'" in refusal(directory)
    save(directory, tensors | {"model.norm.weight": np.zeros(3, np.float32)})
    assert "1 misshapen: 'model.norm.weight (3,) where (24,) is expected'" in refusal(directory)
    save(directory, tensors | {"model.norm.weight": np.zeros(24, np.int32)})
    assert "'model.norm.weight' has type int32" in refusal(directory)


def test_damaged_files_are_refused(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for damaged in (
        b"",
        data[:4],
        data[:100],
        data[:-1],
        b"\xff" * 16 + data,
        data[:8] + b"x" + data[9:],
        data + b"x",
    ):
        path.write_bytes(damaged)
        assert "model.safetensors cannot be read" in refusal(directory)


def _flipped(data: bytes, random) -> bytes:
    mutated = bytearray(data)
    for position in random.integers(0, min(len(data), 3000), random.integers(1, 4)):
        mutated[position] = random.integers(0, 256)
    return bytes(mutated)


def _spliced(data: bytes, random) -> bytes:
    """Cut short, or a stretch of it moved somewhere else."""
    start, length, to = random.integers(0, min(len(data), 3000), 3)
    if random.random() < 0.2:
        return data[:start]
    stretch = data[start : start + length % 50]
    return data[:to] + stretch + data[to + (len(stretch) if random.random() < 0.5 else 0) :]


_ABSURD = (
    "-1",
    "0",
    "1e400",
    "-1e308",
    "1" * 400,
    "9223372036854775808",
    "null",
    "true",
    '""',
    "[]",
    "{}",
    "[" * 900 + "]" * 900,
    '"../../etc/passwd"',
    '"/etc/passwd"',
    '"\\u0000"',
    "NaN",
    "0.5",
    '"llama3"',
    "Infinity",
    '{"a": [1, {"b": null}]}',
)


def _retold(data: bytes, random) -> bytes:
    """One value of the JSON replaced by an absurd one."""
    values = list(re.finditer(rb"(?<=[:\[,])\s*(\d[\d.e+-]*|\"[^\"]*\"|true|false|null)", data))
    start, end = random.choice([match.span(1) for match in values])
    return data[:start] + _ABSURD[random.integers(len(_ABSURD))].encode() + data[end:]


def _retold_header(data: bytes, random) -> bytes:
    """The header of a safetensors file with an absurd value, its length put right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = _retold(data[8:end], random)
    return len(header).to_bytes(8, "little") + header + data[end:]


_MUTATIONS = {
    "config.json": (_flipped, _spliced, _retold),
    INDEX: (_flipped, _spliced, _retold),
    "a.safetensors": (_flipped, _spliced, _retold_header),
}


def test_mutated_directories_load_or_raise_input_error(directory):
    """Of each file as many: read, or refused in one line, and memory does not grow."""
    shard(directory)
    count, random = rounds(240, 1020), np.random.default_rng(8)
    outcomes = collections.Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, mutations in _MUTATIONS.items():
        data = (directory / name).read_bytes()
        for turn in range(count):
            (directory / name).write_bytes(mutations[turn % 3](data, random))
            outcomes[name, _outcome(directory)] += 1
        (directory / name).write_bytes(data)
    assert {kind for _, kind in outcomes} == {"read", "refused"}
    assert (
        min(outcomes[name, kind] for name in _MUTATIONS for kind in ("read", "refused"))
        > count / 200
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def _outcome(directory) -> str:
    try:
        source = HuggingFaceSource.open(directory)
        for name in flat_shapes(source.config):
            source.read(name, 0 if name.startswith("layers/") else None)
    except InputError as error:
        return (
            "refused" if len(str(error)) < 2000 and "\n" not in str(error) else "refused at length"
        )
    return "read"


def test_headers_that_ask_for_memory_are_refused(directory, tensors):
    """A header of 60 MB, all of it valid, and a length that no file has."""
    path = directory / "model.safetensors"
    padded = json.dumps({"__metadata__": {"a": "b" * (60 << 20)}}).encode()
    path.write_bytes(len(padded).to_bytes(8, "little") + padded)
    assert "a header of" in refusal(directory)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "cannot be read" in refusal(directory)


def test_sizes_beyond_any_array(directory):
    """Nothing times very much is nothing: no byte of the file is missing."""
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    ).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_pipes_do_not_make_it_wait(directory, name):
    shard(directory)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    if name == "model.safetensors":
        assert HuggingFaceSource.open(directory).config.layers == 2  # the index is taken
        (directory / INDEX).unlink()
    refusal(directory)


def test_a_pipe_among_the_shards(directory):
    shard(directory)
    (directory / "b.safetensors").unlink()
    os.mkfifo(directory / "b.safetensors")
    assert "b.safetensors cannot be read" in refusal(directory)


def test_missing_files_are_named(directory, tmp_path):
    assert "config.json: cannot be read" in refusal(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(directory)
    shard_names = {"lm_head.weight": "gone.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": shard_names}))
    assert "gone.safetensors cannot be read" in refusal(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000, "1" * 5000, "null"])
def test_config_that_is_no_json_object(directory, text):
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refusal(directory)


def test_config_of_absurd_size(directory):
    with open(directory / "config.json", "wb") as file:
        file.truncate(1 << 30)
    assert "config.json: larger" in refusal(directory)


def test_index_of_absurd_size(directory):
    (directory / "model.safetensors").unlink()
    with open(directory / INDEX, "wb") as file:
        file.truncate(1 << 30)
    assert f"{INDEX}: larger" in refusal(directory)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "a.bin",
        "a.safetensors\n",
        ".",
        3,
        None,
    ],
)
def test_index_names_only_files_of_the_directory(directory, name):
    shard(directory, {"lm_head.weight": name})
    assert "plain name" in refusal(directory)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "nothing of the model",
            "places tensor 'lm_head.weight' nowhere, but it is in a.safetensors",
        ),
        (
            "in another file",
            "places tensor 'lm_head.weight' in b.safetensors, but it is in a.safetensors",
        ),
        ("too much", "places tensor 'more' in a.safetensors, but no file has it"),
        ("too little", "places tensor 'lm_head.weight' nowhere, but it is in a.safetensors"),
    ],
)
def test_an_index_that_is_not_of_these_files(directory, case, words):
    """transformers reads by the index, and would not find the tensor."""
    shard(directory)
    index = json.loads((directory / INDEX).read_text())
    changed = {
        "nothing of the model": {"nothing": "a.safetensors", "none": "b.safetensors"},
        "in another file": index["weight_map"] | {"lm_head.weight": "b.safetensors"},
        "too much": index["weight_map"] | {"more": "a.safetensors"},
        "too little": {
            name: file for name, file in index["weight_map"].items() if name != "lm_head.weight"
        },
    }
    (directory / INDEX).write_text(json.dumps({"weight_map": changed[case]}))
    assert words in refusal(directory)
    old = index["weight_map"] | {"model.layers.0.self_attn.rotary_emb.inv_freq": "a.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": old}))
    assert HuggingFaceSource.open(directory).config.layers == 2


def test_index_without_a_map(directory):
    for wrong in ([], {}, "a.safetensors"):
        (directory / "model.safetensors").exists() and shard(directory)
        (directory / INDEX).write_text(json.dumps({"weight_map": wrong}))
        assert "weight_map" in refusal(directory)


def test_a_tensor_in_two_files_is_refused(directory):
    tensors = load_file(directory / "model.safetensors")
    shard(directory)
    save_file(
        {
            "lm_head.weight": tensors["lm_head.weight"],
            "model.norm.weight": tensors["model.norm.weight"],
        },
        directory / "b.safetensors",
    )
    assert "in two files" in refusal(directory)


def test_links_stay_inside_or_lead_to_the_blobs_of_the_cache(directory, tensors, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    (directory / "model.safetensors").rename(elsewhere)
    (directory / "model.safetensors").symlink_to(elsewhere)
    assert "outside of the directory" in refusal(directory)
    cache = tmp_path_factory.mktemp("cache")
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate((elsewhere, directory / "config.json")):
        os.link(file, cache / "blobs" / str(number))
        (snapshot / ("model.safetensors", "config.json")[number]).symlink_to(
            f"../../blobs/{number}"
        )
    HuggingFaceSource.open(snapshot)


def test_nothing_outside_is_opened(directory, tmp_path_factory):
    """By the interpreter's own audit of every file it opens."""
    outside = tmp_path_factory.mktemp("outside") / "config.json"
    outside.write_text(json.dumps(VALUES))
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(outside)
    opened = []
    sys.addaudithook(
        lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None
    )
    refusal(directory)
    assert not [
        path
        for path in opened
        if path == str(directory / "config.json") or path.startswith(str(outside.parent))
    ]
