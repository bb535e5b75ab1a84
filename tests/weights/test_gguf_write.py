"""The container that we write, opened by the original library."""

import pathlib

import gguf
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.weights.gguf_read import GgufFile
from llama_jax.weights.gguf_write import NewTensor, write_gguf_file

METADATA = {
    "general.architecture": "other",
    "text": "é\n<|x|>",
    "empty": "",
    "yes": True,
    "no": False,
    "count": 4294967295,
    "zero": 0,
    "real": 0.1,
    "texts": ["a", "", "é", "Ġthe"],
    "numbers": [1, -2, 2147483647],
    "reals": [0.5, -1e-3],
    "flags": [True, False],
    "none": [],
}


def tensor(name: str, values: np.ndarray, pieces: int = 1) -> NewTensor:
    raw = np.array_split(values.reshape(-1).view(np.uint8), pieces)
    return NewTensor(
        name, values.shape, {"float32": "F32", "float16": "F16"}[values.dtype.name], lambda: raw
    )


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"a": (3,), "b": (5, 7), "c": (1, 1), "d": (2, 3, 4)}
    return {
        name: random.standard_normal(shape).astype(np.float16 if name == "b" else np.float32)
        for name, shape in shapes.items()
    }


def test_original_library_reads_what_was_written(tmp_path):
    write_gguf_file(
        tmp_path / "x.gguf",
        METADATA,
        [tensor(name, values, pieces=2) for name, values in arrays().items()],
    )
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert fields.pop("general.alignment") == reader.alignment == 32
    assert fields == METADATA | {
        "real": float(np.float32(0.1)),
        "reals": [0.5, float(np.float32(-1e-3))],
    }
    types = {key: [kind.name for kind in reader.fields[key].types] for key in METADATA}
    assert [types[key] for key in ("text", "yes", "count", "real")] == [
        ["STRING"],
        ["BOOL"],
        ["UINT32"],
        ["FLOAT32"],
    ]
    assert [types[key] for key in ("texts", "numbers", "reals", "flags")] == [
        ["ARRAY", kind] for kind in ("STRING", "INT32", "FLOAT32", "BOOL")
    ]
    assert [found.name for found in reader.tensors] == list(arrays())
    for found in reader.tensors:
        assert found.data_offset % 32 == 0
        np.testing.assert_array_equal(found.data, arrays()[found.name])


def test_our_reader_reads_what_was_written(tmp_path):
    write_gguf_file(
        tmp_path / "x.gguf", METADATA, [tensor(name, values) for name, values in arrays().items()]
    )
    file = GgufFile.open(tmp_path / "x.gguf")
    assert file.metadata.keys() == METADATA.keys() | {"general.alignment"}
    for name, values in arrays().items():
        np.testing.assert_array_equal(file.read(name), values)


def test_a_file_may_hold_nothing(tmp_path):
    write_gguf_file(tmp_path / "x.gguf", {}, [])
    assert gguf.GGUFReader(tmp_path / "x.gguf").tensors == []


@pytest.mark.parametrize(
    "value",
    [
        1 << 32,
        -1,
        1e39,
        None,
        b"bytes",
        "\ud800",
        [1, 2.0],
        [True, 1],
        ["a", "\ud800"],
        [1 << 31],
        [[1]],
        {"a": 1},
        np.float32(1),
        [1e39],
    ],
)
def test_metadata_that_the_format_has_not_are_refused_by_key(tmp_path, value):
    with pytest.raises(InputError, match="metadata the_key: ") as refused:
        write_gguf_file(tmp_path / "x.gguf", {"fine": 1, "the_key": value}, [])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_error_in_the_middle_leaves_everything_as_it_was(tmp_path):
    def interrupted():
        yield np.zeros(8, np.uint8)
        raise KeyboardInterrupt

    tensors = [tensor("a", np.zeros(1 << 20, np.float32)), NewTensor("b", (4,), "F32", interrupted)]
    for before in ({}, {"x.gguf": b"older"}):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KeyboardInterrupt):
            write_gguf_file(tmp_path / "x.gguf", {}, tensors)
        assert files(tmp_path) == before


@pytest.mark.parametrize("length", [12, 20])
def test_content_of_another_length_than_declared_is_noticed(tmp_path, length):
    wrong = NewTensor("w", (4,), "F32", lambda: [np.zeros(length, np.uint8)])
    with pytest.raises(ValueError, match=f"tensor w: {length} bytes given, 16 expected"):
        write_gguf_file(tmp_path / "x.gguf", {}, [wrong])
    assert files(tmp_path) == {}
