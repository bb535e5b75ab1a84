"""The GGUF reader: the same as the original library on good files, InputError and nothing else on
bad ones.
"""

import collections
import struct
import sys
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.weights.gguf import GgufFile

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def record(name: str, shape=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def refusal(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        GgufFile.open(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.smollm2
def test_real_metadata_equal_the_original_librarys(smollm2_gguf, original):
    fields = {
        key: field.contents()
        for key, field in original.fields.items()
        if not key.startswith("GGUF.")
    }
    assert GgufFile.open(smollm2_gguf).metadata == fields


@pytest.mark.smollm2
def test_real_header_is_read_in_few_calls(smollm2_gguf):
    """A header has a hundred thousand strings. The original library makes 66 calls for each; here
    it is a fifth at most.
    """
    count = collections.Counter()
    sys.setprofile(lambda frame, event, argument: count.update([event]))
    try:
        metadata = GgufFile.open(smollm2_gguf).metadata
    finally:
        sys.setprofile(None)
    strings = sum(len(metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "merges"))
    assert strings > 90_000
    assert count["call"] + count["c_call"] < 66 * strings / 5


@pytest.mark.smollm2
def test_real_tensors_equal_the_original_librarys(smollm2_gguf, original):
    file = GgufFile.open(smollm2_gguf)
    originals = {tensor.name: tensor for tensor in original.tensors}
    assert file.tensors.keys() == originals.keys()
    for name, tensor in originals.items():
        ours = file.tensors[name]
        assert (ours.shape, ours.type) == (
            tuple(map(int, tensor.shape))[::-1],
            tensor.tensor_type.name,
        )
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        if name.startswith(("token_embd", "blk.0.", "blk.29.", "output_norm")):
            np.testing.assert_array_equal(
                file.read(name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            )


def test_every_kind_of_metadata_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    wanted = {}
    for kind, value in {
        "int8": -8,
        "uint8": 8,
        "int16": -16,
        "uint16": 16,
        "int32": -32,
        "uint32": 1 << 31,
        "int64": -64,
        "uint64": 1 << 63,
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "é\n",
    }.items():
        getattr(writer, f"add_{kind}")(kind, value)
        wanted[kind] = value
    wanted |= {
        "texts": ["a", "", "é"],
        "numbers": [1, -2, 3],
        "reals": [0.5, 1.5],
        "flags": [True, False],
    }
    for key in ("texts", "numbers", "reals", "flags"):
        writer.add_array(key, wanted[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile.open(tmp_path / "kinds.gguf").metadata
    assert {key: metadata[key] for key in wanted} == wanted
    assert [type(metadata[key]) for key in wanted] == [type(value) for value in wanted.values()]


def test_version_2_reads_like_version_3(write_gguf):
    path = write_gguf()
    latest = GgufFile.open(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + path.read_bytes()[8:])
    assert GgufFile.open(path).metadata == latest.metadata
    assert GgufFile.open(path).tensors == latest.tensors


def test_missing_file_and_directory_are_input_errors(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            GgufFile.open(path)


LONG = 1 << 40
ALIGNED = [entry("general.alignment", 4, struct.pack("<I", 32))]


@pytest.mark.parametrize(
    ("entries", "records", "named"),
    [
        ([entry("k", 9, struct.pack("<IQ", 0, LONG) + bytes(64))], [], "1099511627776 more bytes"),
        ([entry("k", 9, struct.pack("<IQ", 8, LONG) + bytes(64))], [], "more bytes"),
        (
            [entry("k", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 0))],
            [],
            "array of arrays",
        ),
        ([entry("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))], [], "type 77"),
        ([entry("k", 8, struct.pack("<Q", LONG))], [], "more bytes"),
        ([entry("k", 8, struct.pack("<Q", 2) + b"\xff\xff")], [], "UTF-8"),
        ([entry("k", 13, bytes(8))], [], "type 13"),
        ([entry("same", 4, bytes(4)), entry("same", 4, bytes(4))], [], "a second 'same'"),
        ([entry("general.alignment", 4, struct.pack("<I", 3))], [], "alignment is 3"),
        ([entry("general.alignment", 4, struct.pack("<I", 0))], [], "alignment is 0"),
        ([entry("general.alignment", 8, text("x"))], [], "alignment is 'x'"),
        (ALIGNED, [record("t"), record("t", offset=32)], "a second 't'"),
        (ALIGNED, [record("t"), record("u", offset=0)], "'u' lies over"),
        (ALIGNED, [record("t", offset=8)], "'t' is not aligned"),
        (ALIGNED, [record("t", shape=(1000,))], "cut short"),
        (ALIGNED, [record("t", offset=1 << 62)], "cut short"),
        (ALIGNED, [record("t", shape=(1 << 33, 1 << 33))], "cut short"),
        (ALIGNED, [record("t", shape=(0, 4))], "shape"),
        (ALIGNED, [record("t", shape=(48, 4), kind=2)], "whole blocks of 32"),
        (ALIGNED, [record("t", shape=(1, 1, 1, 1, 1))], "5 dimensions"),
        (ALIGNED, [record("t", shape=())], "0 dimensions"),
        (ALIGNED, [record("t", kind=999)], "element type 999"),
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path, entries, records, named):
    data = (
        HEAD
        + struct.pack("<QQ", len(records), len(entries))
        + b"".join(entries + records)
        + bytes(256)
    )
    tracemalloc.start()
    start = time.process_time()
    assert named in refusal(tmp_path / "hostile.gguf", data)
    assert time.process_time() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_other_formats_and_versions_are_refused_by_name(tmp_path):
    path = tmp_path / "other.gguf"
    assert "not a GGUF file" in refusal(path, b"GGML" + bytes(60))
    assert "not a GGUF file" in refusal(path, b"")
    assert "version 1 " in refusal(path, b"GGUF" + struct.pack("<I", 1) + bytes(60))
    assert "big-endian" in refusal(path, b"GGUF" + struct.pack(">I", 3) + bytes(60))
    assert "more bytes" in refusal(path, HEAD + struct.pack("<QQ", LONG, 0) + bytes(60))
    assert "more bytes" in refusal(path, HEAD + struct.pack("<QQ", 0, LONG) + bytes(60))


def test_every_truncation_is_refused(write_gguf, tmp_path):
    data = write_gguf().read_bytes()
    lengths = np.random.default_rng(3).integers(0, len(data) - 1, 60).tolist()
    for length in [*range(40), *lengths]:
        refusal(tmp_path / "cut.gguf", data[:length])


def test_unsupported_element_types_are_refused_by_name_when_read(write_gguf):
    path = write_gguf(types={"output.weight": "MXFP4"})
    with pytest.raises(InputError, match=r"'output.weight' has type MXFP4"):
        GgufFile.open(path).read("output.weight")
    with pytest.raises(InputError, match="'absent' is missing"):
        GgufFile.open(path).read("absent")


def hostile(path, kind: int, count: int, item: bytes) -> str:
    """A header with one array of so many items."""
    head = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<IIQ", 9, kind, count)
    )
    path.write_bytes(head + item * count)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "count", "item"),
    [(0, 60_000_000, b"\x01"), (8, 7_400_000, bytes(8)), (6, 15_000_000, bytes(4))],
)
def test_huge_arrays_are_refused_at_once(tmp_path, kind, count, item):
    """60 MB of header: bytes, empty texts, numbers. As lists they would take many times as much."""
    path = hostile(tmp_path / "x.gguf", kind, count, item)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(InputError, match="more than 4194304 items together"):
        GgufFile.open(path)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 4 << 20


def test_huge_tables_are_refused_at_once(tmp_path):
    entries = b"".join(
        struct.pack("<QIIB", 4, number, 0, 0) for number in range(0x01000000, 0x01000000 + 70_000)
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 70_000) + entries)
    with pytest.raises(InputError, match="a table of 70000 rows"):
        GgufFile.open(path)
