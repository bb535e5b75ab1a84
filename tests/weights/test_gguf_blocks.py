"""Element types of GGUF against the original library, bit for bit."""

import gguf
import numpy as np
import pytest

from llama_jax.weights.gguf_blocks import BLOCK_TYPES, DECODERS


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_decoded_weights_equal_the_original_librarys(name):
    weights = np.random.default_rng(1).standard_normal((48, 256), np.float32) * 3
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    decoded = DECODERS[name](data.reshape(-1).view(np.uint8)).astype(np.float32).reshape(weights.shape)
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_arbitrary_bytes_decode_as_in_the_original_library(name):
    """All nibbles, signs and scales, not only those that quantisation produces."""
    kind = gguf.GGMLQuantizationType[name]
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(2).integers(0, 256, (64, 16 * nbytes), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(DECODERS[name](data.reshape(-1)), gguf.quants.dequantize(data, kind).reshape(-1))


def test_names_and_sizes_are_those_of_the_original_library():
    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (block.name, block.length, block.nbytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])
