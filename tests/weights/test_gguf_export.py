"""Models written as GGUF: read by the original library, by transformers and by our own reader."""

import dataclasses
import tracemalloc

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from support import TINY, VARIANTS, random_parameters, torch_state

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import preset
from llama_jax.weights.gguf import NAMES, GgufSource
from llama_jax.weights.gguf_blocks import ENCODINGS
from llama_jax.weights.gguf_write import write_gguf
from llama_jax.weights.source import Source, flat_shapes

WIDE = dataclasses.replace(
    TINY, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=96, layers=2
)  # whole blocks of 32
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.token_type": [1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
}


class TreeSource:
    """A stacked parameter tree as a `Source`."""

    def __init__(self, config: LlamaConfig, params, dtype=np.float32) -> None:
        self.config = config
        self.dtype = dtype
        self.flat = {
            "/".join(part.key for part in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }

    def read(self, name: str, layer: int | None) -> np.ndarray:
        tensor = self.flat[name] if layer is None else self.flat[name][layer]
        return tensor.astype(self.dtype)


def source_of(config: LlamaConfig, dtype=np.float32) -> TreeSource:
    return TreeSource(config, random_parameters(config, seed=3), dtype)


def places(config: LlamaConfig) -> list[tuple[str, int | None]]:
    paths = flat_shapes(config)
    return [
        (p, layer)
        for p in paths
        for layer in (range(config.layers) if p.startswith("layers/") else [None])
    ]


def refusal(source, path, dtype="float32", tokenizer=(), template=None) -> str:
    with pytest.raises(InputError) as refused:
        write_gguf(source, path, dtype, dict(tokenizer), template, "n")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_reads_back_bit_for_bit(tmp_path, name):
    source = source_of(VARIANTS[name])
    write_gguf(source, tmp_path / "m.gguf", "float32", {}, None, name)
    back = GgufSource.open(tmp_path / "m.gguf")
    assert back.config == source.config
    for place in places(source.config):
        np.testing.assert_array_equal(back.read(*place), source.read(*place))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_narrow_types_read_back_bit_for_bit(tmp_path, dtype, stored):
    """Weights that were of the type before stay what they are; norms are float32 all the same."""
    source = source_of(WIDE, stored)
    assert isinstance(source, Source)
    write_gguf(source, tmp_path / "m.gguf", dtype, {}, None, "n")
    back = GgufSource.open(tmp_path / "m.gguf")
    for place in places(WIDE):
        read = back.read(*place)
        assert read.dtype == (stored if read.ndim == 2 else np.float32)
        np.testing.assert_array_equal(read, source.read(*place).astype(read.dtype))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")],
)
def test_original_library_finds_its_own_encoding(tmp_path, dtype, kind):
    source = source_of(WIDE)
    write_gguf(source, tmp_path / "m.gguf", dtype, {}, None, "n")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(found) == len(places(WIDE))
    for path, layer in places(WIDE):
        weights = source.read(path, layer)
        weights = np.ascontiguousarray(weights if path == "embedding" else weights.T)
        if path.endswith(("wq", "wk")):  # as the converter of llama.cpp permutes
            weights = weights.reshape(-1, 2, 8, 64).swapaxes(1, 2).reshape(weights.shape)
        tensor = found[NAMES[path].format(layer)]
        expected = gguf.GGMLQuantizationType[kind if weights.ndim == 2 else "F32"]
        assert tensor.tensor_type == expected
        assert tuple(map(int, tensor.shape))[::-1] == weights.shape
        encoded = gguf.quants.quantize(weights, expected)
        np.testing.assert_array_equal(
            np.ascontiguousarray(tensor.data).view(np.uint8), encoded.view(np.uint8)
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_numbers_of_every_size_are_encoded_as_by_the_original_library(dtype):
    random = np.random.default_rng(6)
    weights = random.standard_normal((4096, 64), np.float32) * 10 ** random.uniform(
        -30, 4, (4096, 1)
    ).astype(np.float32)
    weights[:64] = np.round(weights[-64:] * 127) / 2  # halves
    weights[64:128] = 0
    kind = gguf.GGMLQuantizationType[ENCODINGS[dtype].type]
    weights = np.clip(weights, -65000, 65000)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(weights, kind).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(ENCODINGS[dtype].encode(weights), expected)


def test_halves_are_rounded_away_from_zero():
    """With 127 as the largest weight of its block the scale is 1, and each weight is its own
    quantum.
    """
    weights = np.zeros((1, 32), np.float32)
    weights[0, :6] = [127, 0.5, -0.5, 1.5, -2.5, 0.49999997]
    assert ENCODINGS["q8_0"].encode(weights)[2:8].view(np.int8).tolist() == [127, 1, -1, 2, -3, 0]


@pytest.mark.filterwarnings("error")
def test_blocks_of_zeros_and_of_next_to_nothing_become_zeros():
    """Scales of which float16 makes zero, some too small to be inverted in float32."""
    weights = np.repeat(
        np.array([[0.0], [1e-44], [-1e-40], [1e-38], [1e-8]], np.float32), 32, axis=1
    )
    encoded = ENCODINGS["q8_0"].encode(weights)
    kind = gguf.GGMLQuantizationType.Q8_0
    assert not gguf.quants.dequantize(encoded.reshape(5, 34), kind).any()


def test_metadata_are_what_llama_cpp_reads(tmp_path):
    write_gguf(source_of(WIDE), tmp_path / "m.gguf", "q8_0", TOKENIZER, "{{ messages }}", "Tiny é")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    padded = {
        "tokenizer.ggml.tokens": ["a", "b", "ab", *[f"[PAD{i}]" for i in range(3, 97)]],
        "tokenizer.ggml.token_type": [1, 1, 3, *[5] * 94],
    }
    assert found == TOKENIZER | padded | {
        "general.architecture": "llama",
        "general.name": "Tiny é",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.alignment": 32,
        "llama.vocab_size": 97,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 10000.0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    unsigned = ("general.file_type", "llama.block_count", "tokenizer.ggml.bos_token_id")
    assert [fields[key].types[0].name for key in unsigned] == ["UINT32"] * 3


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "ALL_F32"), ("float16", "MOSTLY_F16"), ("bfloat16", "MOSTLY_BF16")],
)
def test_file_type_is_the_original_librarys(dtype, kind):
    assert ENCODINGS[dtype].file_type == gguf.LlamaFileType[kind]


def test_scores_of_unused_tokens_are_the_lowest(tmp_path):
    tokenizer = TOKENIZER | {"tokenizer.ggml.scores": [0.0, -1.0, -2.0]}
    write_gguf(source_of(WIDE), tmp_path / "m.gguf", "float32", tokenizer, None, "n")
    scores = GgufSource.open(tmp_path / "m.gguf").file.metadata["tokenizer.ggml.scores"]
    assert scores == [0.0, -1.0, -2.0, *[-10000.0] * 94]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama3_is_a_tensor(tmp_path, factor):
    """By Meta's three cases, one frequency after the other, in the heads of Llama 3.1 and 3.2."""
    scaling = preset("llama3.2-1b" if factor == 32 else "llama3.1-8b").rope_scaling
    config = dataclasses.replace(WIDE, head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    write_gguf(source_of(config), tmp_path / "m.gguf", "float32", {}, None, "n")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    (found,) = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    expected = []
    for channel in range(0, 128, 2):
        wavelength = 2 * np.pi * 5e5 ** (channel / 128)
        smooth = (8192 / wavelength - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else middle)
    np.testing.assert_allclose(found.data, np.array(expected, np.float32), rtol=1e-6)
    assert found.tensor_type == gguf.GGMLQuantizationType.F32
    assert not [key for key in reader.fields if "scaling" in key]
    assert GgufSource.open(tmp_path / "m.gguf").config == config


def test_scalings_that_the_format_cannot_tell_are_refused(tmp_path):
    for scaling in (
        RopeScaling("llama3", 8.0, 1.0, 2.0, 8192),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 1 << 26),
    ):
        source = source_of(dataclasses.replace(WIDE, rope_scaling=scaling))
        assert "cannot be told in GGUF" in refusal(source, tmp_path / "m.gguf")


@pytest.mark.smollm2
def test_a_real_model_survives_the_way_out_and_in(tmp_path, smollm2_gguf):
    source = GgufSource.open(smollm2_gguf)
    file = tmp_path / "m.gguf"
    metadata = {
        key: value for key, value in source.file.metadata.items() if key.startswith("tokenizer.")
    }
    write_gguf(
        source, file, "float32", metadata, metadata.pop("tokenizer.chat_template"), "SmolLM2"
    )
    back = GgufSource.open(file)
    file.unlink()  # half a gigabyte; the mapping stays
    assert back.config == source.config
    assert {key: back.file.metadata[key] for key in metadata} == metadata
    for path, layer in places(source.config):
        if layer in (None, 0, 29):
            np.testing.assert_array_equal(back.read(path, layer), source.read(path, layer))


@pytest.mark.parity
def test_transformers_reads_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    params = random_parameters(WIDE, seed=3)
    write_gguf(TreeSource(WIDE, params), tmp_path / "m.gguf", "float32", {}, None, "n")
    config = transformers.LlamaConfig(**load_gguf_checkpoint(tmp_path / "m.gguf")["config"])
    model = transformers.LlamaForCausalLM(config)
    loaded = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)
    state = torch_state(params)
    assert loaded["tensors"].keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(loaded["tensors"][name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    ("dtype", "value", "named"),
    [
        ("float16", 65520.0, "a weight of size 65520 is out of range; take float32 or bfloat16"),
        ("float16", -1e30, "a weight of size 1e+30 is out of range"),
        ("bfloat16", 3.4e38, "out of range; take float32"),
        ("q8_0", 1e9, "out of range; take float32 or bfloat16"),
        ("q8_0", np.nan, "not finite"),
        ("float32", np.inf, "not finite"),
        ("float16", -np.inf, "not finite"),
    ],
)
def test_weights_out_of_range_name_their_tensor_and_leave_no_file(tmp_path, dtype, value, named):
    source = source_of(WIDE)
    source.flat["layers/feed_forward/up"] = source.flat["layers/feed_forward/up"].copy()
    source.flat["layers/feed_forward/up"][1, 5, 7] = value
    message = refusal(source, tmp_path / "m.gguf", dtype)
    assert message.startswith("tensor 'blk.1.ffn_up.weight': ")
    assert named in message
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_leaves_no_file(tmp_path):
    class Failing(TreeSource):
        def read(self, name, layer):
            if (name, layer) == ("layers/feed_forward/down", 1):
                raise InputError("disk gone")
            return super().read(name, layer)

    source = Failing(WIDE, random_parameters(WIDE))
    (tmp_path / "m.gguf").write_bytes(b"older")
    assert refusal(source, tmp_path / "m.gguf") == "disk gone"
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.gguf", b"older")]


def test_wrong_input_is_refused_before_anything_is_read(tmp_path):
    class Unread(TreeSource):
        def read(self, name, layer):
            raise AssertionError

    source, path = Unread(WIDE, {}), tmp_path / "m.gguf"
    assert "dtype 'int8' given, one of float32, float16, bfloat16, q8_0 expected" in refusal(
        source, path, "int8"
    )
    for wrong in (tmp_path / "m.bin", tmp_path / "absent" / "m.gguf", tmp_path):
        assert refusal(source, wrong).startswith(f"{wrong}: a file name ending in .gguf")
    assert "98 tokens, the model 97" in refusal(
        source, path, tokenizer={"tokenizer.ggml.tokens": ["x"] * 98}
    )
    assert "'llama.block_count' given" in refusal(source, path, tokenizer={"llama.block_count": 3})
    assert "metadata tokenizer.chat_template: " in refusal(source, path, template="\udfff")
    narrow = Unread(TINY, {})
    assert "tensor token_embd.weight: rows of 48 weights, multiples of 32" in refusal(
        narrow, path, "q8_0"
    )
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_a_tensor(tmp_path):
    """Of 26 matrices of 4 MiB, no more than the one being written and its reordered copy."""

    class Made(TreeSource):
        def read(self, name, layer):
            shape = flat_shapes(self.config)[name]
            return np.full(shape if layer is None else shape[1:], 0.5, np.float32)

    wide = LlamaConfig(
        vocab_size=1024,
        dim=1024,
        layers=4,
        heads=16,
        kv_heads=16,
        head_dim=64,
        ffn_dim=1024,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        context_length=128,
        tied_head=True,
    )
    tracemalloc.start()
    write_gguf(Made(wide, {}), tmp_path / "m.gguf", "float16", {}, None, "n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "m.gguf").stat().st_size > 29 * 2 << 20
    assert peak < 16 << 20
