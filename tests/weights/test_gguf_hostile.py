"""Thousands of damaged files, of every element type and in parts: read, or refused in one line, in
little time and memory.
"""

import collections
import pathlib
import resource
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from matrix import ALL, rounds

from llama_jax.errors import InputError
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.gguf_blocks import DECODERS

KINDS = [
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
ROUNDS = rounds(60, 300)  # for each kind, and for the parts

# The smallest LLaMA whose matrices have rows of 256: V 3, D 256, L 1, N 1, K 1, H 2, F 1.
METADATA = {
    "block_count": 1,
    "context_length": 8,
    "embedding_length": 256,
    "feed_forward_length": 1,
    "attention.head_count": 1,
    "attention.key_length": 2,
    "attention.value_length": 2,
}
WIDE = {
    "token_embd": 3,
    "output": 3,
    "blk.0.attn_q": 2,
    "blk.0.attn_k": 2,
    "blk.0.attn_v": 2,
    "blk.0.ffn_gate": 1,
    "blk.0.ffn_up": 1,
}
NARROW = {
    "blk.0.attn_output": (256, 2),
    "blk.0.ffn_down": (256, 1),
    "blk.0.attn_norm": (256,),
    "blk.0.ffn_norm": (256,),
    "output_norm": (256,),
    "rope_freqs": (1,),
}

ABSURD = [
    struct.pack("<Q", number)
    for number in (0, 1, 2, 3, 255, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1)
]


def write(path: pathlib.Path, kind: str, **parts: int) -> list[pathlib.Path]:
    """A valid file (or several) whose wide matrices are of one kind, their bytes random."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", **parts)
    for key, value in METADATA.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_description("x" * 1000)
    number = gguf.GGMLQuantizationType[kind]
    length, nbytes = gguf.GGML_QUANT_SIZES[number]
    for name, rows in WIDE.items():
        data = random.integers(0, 256, (rows, 256 // length * nbytes), np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=number)
    for name, shape in NARROW.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


def mutated(random: np.random.Generator, data: bytes, header: int) -> bytes:
    """One of the ways in which a file goes wrong, by accident or on purpose; a damaged header is
    the worst.
    """
    end = len(data) if random.random() < 0.3 else header
    at, length = int(random.integers(0, end)), int(random.integers(1, 40))
    way = random.integers(0, 5)
    if way == 0:
        flipped = bytearray(data)
        for position in random.integers(0, end, length % 6 + 1):
            flipped[position] = random.integers(0, 256)
        return bytes(flipped)
    if way == 1:
        return data[:at] + ABSURD[length % len(ABSURD)] + data[at + 8 :]
    if way == 2:
        return data[: int(random.integers(0, len(data)))]
    if way == 3:
        return data[:at] + data[at + length :]
    source = int(random.integers(0, header))
    return data[:at] + data[source : source + length] + data[at + length % 2 * length :]


def outcome(path: pathlib.Path) -> str:
    try:
        file = GgufSource.open(path).file
        for name in file.tensors:
            file.read(name)
    except InputError as error:
        message = str(error)
    else:
        return "read"
    assert "\n" not in message
    assert len(message) < 2000
    return "refused"


def hammer(path: pathlib.Path, entrance: pathlib.Path, seed: int) -> collections.Counter:
    """Outcomes of opening `entrance` while `path` is replaced by mutations of itself."""
    random = np.random.default_rng(seed)
    data = path.read_bytes()
    header = GgufSource.open(entrance).file
    end = min(tensor.offset for tensor in header.tensors.values())
    outcomes: collections.Counter = collections.Counter()
    for _ in range(ROUNDS):
        path.unlink()  # the old one may still be mapped: it must not shrink
        path.write_bytes(mutated(random, data, min(end, len(data))))
        outcomes[outcome(entrance)] += 1
    path.unlink()
    path.write_bytes(data)
    assert outcome(entrance) == "read"
    return outcomes


def peak_of_process() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(autouse=True)
def bounded():
    """Little memory, and 20 seconds of the processor."""
    start, before = time.process_time(), peak_of_process()
    yield
    assert time.process_time() - start < 20
    assert peak_of_process() - before < 64 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_of_every_kind_are_read_or_refused(tmp_path, kind):
    (path,) = write(tmp_path / "tiny.gguf", kind)
    outcomes = hammer(path, path, KINDS.index(kind))
    assert min(outcomes["read"], outcomes["refused"]) > ROUNDS // 20


@pytest.mark.parametrize("number", range(3))
def test_mutations_of_a_part_are_read_or_refused(tmp_path, number):
    parts = write(tmp_path / "tiny.gguf", "Q4_0", split_max_tensors=5)
    assert len(parts) == 3
    outcomes = hammer(parts[number], parts[0], number)
    assert min(outcomes["read"], outcomes["refused"]) > ROUNDS // 20


ENORMOUS = (1 << 40, 1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize("number", ENORMOUS)
def test_absurd_numbers_at_every_place_of_the_header(tmp_path, number):
    """Counts, lengths, dimensions and offsets among them. In `make test` the numbers take turns at
    the places.
    """
    turn, turns = (0, 1) if ALL else (ENORMOUS.index(number), len(ENORMOUS))
    (path,) = write(tmp_path / "tiny.gguf", "Q4_0")
    data = path.read_bytes()
    text = data.index(b"x" * 1000)
    tracemalloc.start()
    for at in [
        *range(4, 24),
        *[*range(24, text, 5), *range(text + 1000, text + 1400, 7)][turn::turns],
    ]:
        path.unlink()
        path.write_bytes(data[:at] + struct.pack("<Q", number) + data[at + 8 :])
        outcome(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "shape", [(1 << 32, 1 << 32), (1 << 62, 4, 4), (1 << 16,) * 4, ((1 << 64) - 1, 2), (1 << 63, 2)]
)
def test_dimensions_whose_product_overflows_are_refused(tmp_path, shape):
    """In 64 bits these have next to no elements, or exactly none."""
    (path,) = write(tmp_path / "tiny.gguf", "F32")
    old = b"rope_freqs.weight" + struct.pack("<IQ", 1, 1)
    new = b"rope_freqs.weight" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(InputError, match="cut short"):
        GgufSource.open(path)


@pytest.mark.parametrize(
    "kind", sorted(kind.name for kind in gguf.GGML_QUANT_SIZES if kind.name not in DECODERS)
)
def test_types_that_are_not_supported_are_not_called_damage(tmp_path, kind):
    """Every type that the original library knows the size of."""
    with pytest.raises(InputError) as refused:
        GgufSource.open(write(tmp_path / "model.gguf", kind)[0])
    assert f"element types not supported: {kind} (" in str(refused.value)
    assert "damaged" not in str(refused.value)
