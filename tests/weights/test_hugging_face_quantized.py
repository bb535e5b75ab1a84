"""Quantized directories: 8-bit floats times their scales, by a loop over every weight; other
schemes refused by name.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.errors import InputError
from llama_jax.weights.hf_read import NAMES, HuggingFaceSource, config_from_hugging_face
from llama_jax.weights.inspect import report
from llama_jax.weights.open import open_model
from llama_jax.weights.source import file_shapes

VALUES = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
GATE = "model.layers.0.mlp.gate_proj.weight"  # [40, 24]
BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {}}},
}
# of `config.json`, the end of the scale's name, its shape, rows and columns that share one
SCHEMES = {
    "a tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "weight_scale",
        (),
        (40, 24),
    ),
    "a tensor, one number": (COMPRESSED, "weight_scale", (1,), (40, 24)),
    "a channel": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (40, 1), (1, 24)),
    "a block": (BLOCK, "weight_scale_inv", (3, 2), (16, 16)),
    "a block, named otherwise": (
        COMPRESSED | {"config_groups": {"group_0": {"weights": {"block_structure": [8, 24]}}}},
        "weight_scale",
        (5, 1),
        (8, 24),
    ),
}


def save(directory, scheme, **more) -> dict[str, np.ndarray]:
    """A directory with plain weights, but for those in `more`; returns what it holds."""
    random = np.random.default_rng(9)
    shapes = file_shapes(config_from_hugging_face(VALUES), NAMES)
    tensors = {
        name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()
    } | more
    (directory / "config.json").write_text(json.dumps(VALUES | {"quantization_config": scheme}))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def refusal(directory) -> str:
    with pytest.raises(InputError) as refused:
        HuggingFaceSource.open(directory)
    assert "\n" not in str(refused.value)
    assert "remove" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("case", SCHEMES)
def test_8_bit_floats_are_dequantized(tmp_path, case):
    scheme, end, shape, (rows, columns) = SCHEMES[case]
    random = np.random.default_rng(4)
    narrow = random.standard_normal((40, 24)).astype(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(0.5, 2, shape).astype(np.float32)
    stem = GATE.removesuffix("weight")
    save(
        tmp_path,
        scheme,
        **{GATE: narrow, stem + end: scale, stem + "input_scale": np.ones(1, np.float32)},
    )
    expected = np.empty((40, 24))
    table = scale.reshape(-(-40 // rows), -(-24 // columns))
    for row in range(40):
        for column in range(24):
            expected[row, column] = float(narrow[row, column]) * float(
                table[row // rows, column // columns]
            )
    opened = open_model(tmp_path)
    read = opened.source.read("layers/feed_forward/gate", 0)
    assert read.dtype == np.float32 == opened.source.dtype("layers/feed_forward/gate", 0)
    np.testing.assert_allclose(read, expected.T, rtol=1e-6)
    found = report(opened)
    assert any("1 weights are 8-bit floats and are dequantized" in line for line in found.odd)
    assert found.parameters == found.expected_parameters


def test_a_scale_that_is_missing_or_does_not_fit(tmp_path):
    narrow = np.zeros((40, 24), ml_dtypes.float8_e4m3fn)
    save(tmp_path, BLOCK, **{GATE: narrow})
    assert f"'{GATE}' is float8_e4m3fn and has no weight_scale" in refusal(tmp_path)
    save(tmp_path, BLOCK, **{GATE: narrow, GATE + "_scale_inv": np.ones((2, 3), np.float32)})
    assert "has shape (2, 3); one of (1, 1), (40, 1), (3, 2) expected" in refusal(tmp_path)
    save(
        tmp_path,
        BLOCK | {"weight_block_size": [0, 16]},
        **{GATE: narrow, GATE + "_scale_inv": np.ones((2, 3), np.float32)},
    )
    assert "weight_block_size is [0, 16]" in refusal(tmp_path)
    save(tmp_path, None, **{GATE: narrow})
    assert "has type float8_e4m3fn" in refusal(tmp_path)


OTHERS = {
    "bitsandbytes": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "new-method": {"quant_method": "new-method"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_are_named(tmp_path, name):
    save(tmp_path, OTHERS[name])
    message = refusal(tmp_path)
    assert "config.json: the model is quantized (quantization_config" in message
    assert f"'{name}'" in message
    assert "fetch the model unquantized" in message


def test_quantized_tensors_without_a_word_in_the_config(tmp_path):
    """As GPTQ's first tools wrote, which described themselves in a file of their own."""
    save(tmp_path, None, **{GATE.removesuffix("weight") + "qweight": np.zeros((3, 40), np.int32)})
    assert (
        "the model is quantized (it has the tensor 'model.layers.0.mlp.gate_proj.qweight')"
        in refusal(tmp_path)
    )


def test_null_is_no_quantization(tmp_path):
    save(tmp_path, None)
    assert HuggingFaceSource.open(tmp_path).scheme is None
