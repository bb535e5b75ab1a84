"""Element types of GGUF against the original library, bit for bit."""

import tracemalloc

import gguf
import numpy as np
import pytest

from llama_jax.weights.gguf_blocks import BLOCK_TYPES, DECODERS

QUANTISED = [
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


def assert_same_bits(decoded: np.ndarray, expected: np.ndarray) -> None:
    """NaNs in the same places (their payload is the processor's affair), all else bit for bit,
    zeros' signs included.
    """
    assert decoded.dtype == expected.dtype == np.float32
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(decoded), ~numbers)
    np.testing.assert_array_equal(
        decoded[numbers].view(np.uint32), expected[numbers].view(np.uint32)
    )


def random_blocks(name: str, count: int, seed: int = 2) -> np.ndarray:
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    return np.random.default_rng(seed).integers(0, 256, (count, nbytes), np.uint8)


def original(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).reshape(-1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_decoded_weights_equal_the_original_librarys(name):
    weights = np.random.default_rng(1).standard_normal((48, 256), np.float32) * 3
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert_same_bits(
        DECODERS[name](data.reshape(-1).view(np.uint8)).astype(np.float32), expected.reshape(-1)
    )


@pytest.mark.parametrize("name", QUANTISED)
def test_arbitrary_bytes_decode_as_in_the_original_library(name):
    """All pieces, signs and scales, infinite and undefined ones too, not only those that
    quantisation produces.
    """
    blocks = random_blocks(name, 3000)
    assert_same_bits(DECODERS[name](blocks.reshape(-1)), original(name, blocks))


# Zeros of both signs, the smallest and largest numbers, infinity and what is no number, for every
# float16 of a block.
EXTREME = np.array(
    [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, np.inf, -np.inf, np.nan], np.float16
)
FLOAT16_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("fill", [None, 0, 255])
def test_extreme_scales_decode_as_in_the_original_library(name, fill):
    pairs = np.stack(np.meshgrid(EXTREME, EXTREME)).reshape(2, -1)
    blocks = random_blocks(name, pairs.shape[1])
    if fill is not None:
        blocks[:] = fill
    for scale, at in zip(pairs, FLOAT16_AT[name]):
        blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    assert_same_bits(DECODERS[name](blocks.reshape(-1)), original(name, blocks))


@pytest.mark.parametrize("name", QUANTISED)
def test_no_byte_of_a_block_is_left_unread(name):
    """One changed byte changes a weight; it need not in the first block, whose sub-blocks may have
    scales of zero.
    """
    blocks = random_blocks(name, 8)
    plain = DECODERS[name](blocks.reshape(-1))
    for at in range(blocks.shape[1]):
        changed = blocks.copy()
        changed[:, at] ^= 255
        assert not np.array_equal(DECODERS[name](changed.reshape(-1)), plain, equal_nan=True)


@pytest.mark.parametrize("name", ["Q5_1", "Q3_K", "Q6_K"])
def test_decoding_takes_little_more_memory_than_its_result(name):
    length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    data = random_blocks(name, (1 << 21) // length).reshape(-1)
    tracemalloc.start()
    weights = DECODERS[name](data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weights.nbytes == 8 << 20
    assert peak < weights.nbytes + (2 << 20)


def test_names_and_sizes_are_those_of_the_original_library():
    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (block.name, block.length, block.nbytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])
