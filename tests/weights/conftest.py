"""GGUF files: tiny ones written by the original library, and the real one read by it."""

import pathlib

import gguf
import numpy as np
import pytest

# A plain LLaMA with unequal widths everywhere, so that a swapped axis shows: V 96, D 64, L 2, N 4,
# K 2, H 32, F 160.
METADATA = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 160,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 32,
    "llama.vocab_size": 96,
}
LAYER = {
    "attn_norm": (64,),
    "attn_q": (128, 64),
    "attn_k": (64, 64),
    "attn_v": (64, 64),
    "attn_output": (64, 128),
    "ffn_norm": (64,),
    "ffn_gate": (160, 64),
    "ffn_up": (160, 64),
    "ffn_down": (64, 160),
}
SHAPES = {"token_embd.weight": (96, 64), "output_norm.weight": (64,), "output.weight": (96, 64)} | {
    f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER.items()
}


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds.get(type(value), writer.add_array)(key, value)


@pytest.fixture(scope="session")
def original(smollm2_gguf):
    """The real file, read by the original library."""
    return gguf.GGUFReader(smollm2_gguf)


@pytest.fixture
def tensors():
    """Random weights of the tiny model, by the names of GGUF."""
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def _write(writer: gguf.GGUFWriter, metadata: dict, tensors: dict, types: dict) -> None:
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            kind = gguf.GGMLQuantizationType[types.get(name, "F32")]
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def write_gguf(tmp_path, tensors):
    """Writes a file: `write_gguf(metadata, tensors, types)`, where None values leave keys or
    tensors out.
    """

    def write(metadata=(), changed=(), types=(), architecture="llama") -> pathlib.Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        _write(writer, METADATA | dict(metadata), tensors | dict(changed), dict(types))
        return path

    return write


@pytest.fixture
def write_parts(tmp_path, tensors):
    """Writes the tiny model in parts of at most `most` tensors: `write_parts(most, small_first)`;
    the paths in order.
    """

    def write(most=9, small_first=False) -> list[pathlib.Path]:
        writer = gguf.GGUFWriter(
            tmp_path / "tiny.gguf", "llama", split_max_tensors=most, small_first_shard=small_first
        )
        _write(writer, METADATA, tensors, {})
        return sorted(tmp_path.glob("tiny-*-of-*.gguf"))

    return write
