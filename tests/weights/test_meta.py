"""Meta's checkpoints: every type and number of shards, what `params.json` leaves out, and damaged
directories refused.
"""

import dataclasses
import json
import random
import resource
import time
import tracemalloc

import numpy as np
import pytest
from matrix import rounds
from meta_files import FAMILIES, declared, meta_tensors, save, shards, write_meta
from support import random_parameters

from llama_jax.errors import InputError
from llama_jax.presets import PRESETS, name_of
from llama_jax.weights.meta import MetaSource, config_from_meta
from llama_jax.weights.source import Source

torch = pytest.importorskip("torch", reason="Meta's files are written by PyTorch, on Python 3.11")
pytestmark = pytest.mark.parity

CONFIG = FAMILIES["llama2"]
LLAMA3 = FAMILIES["llama3"]


@pytest.fixture(scope="module")
def params():
    return random_parameters(CONFIG, seed=13)


def refusal(directory) -> str:
    with pytest.raises(InputError) as refused:
        MetaSource.open(directory)
    message = str(refused.value)
    assert message.startswith(str(directory))
    assert message.count(str(directory)) == 1
    assert "\n" not in message
    return message


def rewrite(directory, number: int, tensors, dtype: str = "float32") -> None:
    """Another shard in the place of one."""
    path = directory / f"consolidated.{number:02}.pth"
    path.unlink(missing_ok=True)
    save(path, tensors, dtype)


# --- tensors ---


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_is_read_as_it_is(tmp_path, params, count, dtype):
    source = MetaSource.open(write_meta(tmp_path / "meta", CONFIG, params, count, dtype))
    assert isinstance(source, Source)
    kind = getattr(torch, dtype)
    for path, given in {"embedding": params["embedding"], "head": params["head"]}.items():
        got = source.read(path, None)
        assert got.dtype.name == dtype
        np.testing.assert_array_equal(
            got.astype(np.float32), torch.tensor(np.asarray(given)).to(kind).float().numpy()
        )
    for path in ("wq", "wk", "wv", "wo"):
        got = source.read(f"layers/attention/{path}", 1).astype(np.float32)
        expected = (
            torch.tensor(np.asarray(params["layers"]["attention"][path][1]))
            .to(kind)
            .float()
            .numpy()
        )
        np.testing.assert_array_equal(got, expected)


def test_a_single_file_without_a_number_is_a_model(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    (directory / "consolidated.00.pth").rename(directory / "consolidated.pth")
    np.testing.assert_array_equal(
        MetaSource.open(directory).read("embedding", None), params["embedding"]
    )


def test_layers_that_share_one_storage_are_read(tmp_path, params):
    """LLaMA 1's larger files hold windows on one long storage a layer."""
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    tensors = meta_tensors(CONFIG, params)
    long = torch.cat([torch.tensor(tensor).reshape(-1) for tensor in tensors.values()])
    windows, start = {}, 0
    for name, tensor in tensors.items():
        windows[name] = long[start : start + tensor.size].view(tensor.shape)
        start += tensor.size
    (directory / "consolidated.00.pth").unlink()
    torch.save(windows, directory / "consolidated.00.pth")
    source = MetaSource.open(directory)
    np.testing.assert_array_equal(
        source.read("layers/attention/wk", 1), params["layers"]["attention"]["wk"][1]
    )
    np.testing.assert_array_equal(
        source.read("final_norm/scale", None), params["final_norm"]["scale"]
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama2", "llama3.2"])
def test_a_head_that_is_the_embedding_is_tied(tmp_path, family, count):
    """Left out, stored once more, or the same storage under two names."""
    config = dataclasses.replace(FAMILIES[family], tied_head=True)
    params = random_parameters(config, seed=14)
    directory = write_meta(tmp_path / "meta", config, params, count)
    assert MetaSource.open(directory).config == config
    untied = dataclasses.replace(config, tied_head=False)
    twice = params | {"head": np.asarray(params["embedding"]).T}
    assert MetaSource.open(write_meta(tmp_path / "twice", untied, twice, count)).config == config
    almost = np.array(twice["head"])
    almost[-1, -1] += 1
    assert (
        MetaSource.open(
            write_meta(tmp_path / "almost", untied, params | {"head": almost}, count)
        ).config
        == untied
    )


def test_a_head_in_the_storage_of_the_embedding_is_tied_without_reading(tmp_path, monkeypatch):
    config = FAMILIES["llama3.2"]
    directory = write_meta(tmp_path / "meta", config, random_parameters(config, seed=14))
    tensors = torch.load(directory / "consolidated.00.pth")
    (directory / "consolidated.00.pth").unlink()
    torch.save(
        {**tensors, "output.weight": tensors["tok_embeddings.weight"]},
        directory / "consolidated.00.pth",
    )
    monkeypatch.setattr("llama_jax.weights.pth.PthFile.view", None)
    assert MetaSource.open(directory).config == config


def test_one_read_holds_one_tensor(tmp_path):
    """Beside views of the files, also where the shards are merged and the rotary layout is
    turned.
    """
    config = dataclasses.replace(LLAMA3, dim=512, heads=8, kv_heads=8, head_dim=64, ffn_dim=64)
    source = MetaSource.open(
        write_meta(tmp_path / "meta", config, random_parameters(config, seed=15), 2)
    )
    nbytes = 512 * 512 * 4
    for path in ("layers/attention/wq", "layers/attention/wo"):
        tracemalloc.start()
        assert source.read(path, 0).nbytes == nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.3 * nbytes, path


def test_copies_of_norms_and_heads_have_to_agree(tmp_path, params):
    directory = write_meta(
        tmp_path / "meta", CONFIG, params, 8
    )  # eight shards, four key/value heads
    changed = shards(CONFIG, params, 8)[5]
    changed["norm.weight"] = changed["norm.weight"] + 1e-3
    changed["layers.1.attention.wv.weight"] = changed["layers.1.attention.wv.weight"][::-1].copy()
    rewrite(directory, 5, changed)
    source = MetaSource.open(directory)
    source.read("layers/attention/wv", 0)
    for path, layer, name in (
        ("final_norm/scale", None, "norm.weight"),
        ("layers/attention/wv", 1, "layers.1.attention.wv.weight"),
    ):
        with pytest.raises(InputError, match=f"tensor {name} differs between shards"):
            source.read(path, layer)


def test_numbers_that_are_none_are_copies_too(tmp_path, params):
    broken = params | {"final_norm": {"scale": np.full(64, np.nan)}}
    source = MetaSource.open(write_meta(tmp_path / "meta", CONFIG, broken, 2))
    assert np.isnan(source.read("final_norm/scale", None)).all()


def test_damage_is_noticed_and_named(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params, 2)
    path = directory / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    at = data.index(shards(CONFIG, params, 2)[1]["layers.0.feed_forward.w1.weight"].tobytes())
    data[at + 9] ^= 64
    path.unlink()
    path.write_bytes(data)
    source = MetaSource.open(directory)
    source.read("layers/feed_forward/gate", 1)
    with pytest.raises(
        InputError, match=r"consolidated.01.pth: entry .* does not match its checksum"
    ):
        source.read("layers/feed_forward/gate", 0)


# --- directories that do not fit ---


def test_missing_and_doubled_shards_are_refused_by_name(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params, 4)
    (directory / "consolidated.02.pth").rename(tmp_path / "02")
    assert "consolidated.02.pth is missing (3 shards found)" in refusal(directory)
    (directory / "consolidated.03.pth").unlink()
    assert "misshapen" in refusal(directory)
    (directory / "consolidated.pth").write_bytes(b"")
    assert "both there" in refusal(directory)
    for path in directory.glob("*.pth"):
        path.unlink()
    assert "consolidated.00.pth is missing (0 shards found)" in refusal(directory)
    (tmp_path / "none").mkdir()
    refusal(tmp_path / "none")
    assert "cannot be read" in refusal(tmp_path / "nowhere")


def test_tensors_that_do_not_fit_are_refused_by_name_and_file(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params, 2)
    one, other = shards(CONFIG, params, 2)
    rewrite(directory, 1, {**other, "layers.0.attention.wq.lora_a.weight": np.zeros((2, 2))})
    assert (
        "consolidated.01.pth: tensors do not fit the architecture: 1 unexpected: "
        "'layers.0.attention.wq.lora_a" in refusal(directory)
    )
    rewrite(directory, 1, {name: tensor for name, tensor in other.items() if "w2" not in name})
    assert "2 missing: 'layers.0.feed_forward.w2.weight'" in refusal(directory)
    rewrite(directory, 1, other | {"layers.1.attention.wo.weight": np.zeros((32, 64))})
    assert (
        "1 misshapen: 'layers.1.attention.wo.weight (32, 64) where (64, 32) is expected'"
        in refusal(directory)
    )
    rewrite(directory, 1, other, "bfloat16")
    assert "is bfloat16, float32 in the first file" in refusal(directory)
    for number, tensors in enumerate((one, other)):
        rewrite(directory, number, tensors, "int8")
    assert "is int8" in refusal(directory)
    rewrite(directory, 0, {name: tensor for name, tensor in one.items() if "w1" not in name})
    assert "layers.0.feed_forward.w1.weight is missing" in refusal(directory)
    rewrite(directory, 0, one | {"tok_embeddings.weight": np.zeros(3)})
    assert "tok_embeddings.weight is no matrix" in refusal(directory)


def test_shards_that_share_no_head_evenly_are_refused(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    for number in (1, 2):
        rewrite(directory, number, shards(CONFIG, params)[0])
    assert "3 shards given for 8 heads and 4 key/value heads" in refusal(directory)


def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    for changed in (
        {"dim": 1 << 40, "n_heads": 1 << 39},
        {"n_layers": 1 << 40},
        {"n_layers": 1000},
        {"dim": 1 << 17, "n_heads": 1 << 12},
    ):
        (directory / "params.json").write_text(json.dumps(declared(CONFIG, **changed)))
        tracemalloc.start()
        refusal(directory)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20


# --- params.json ---


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": "64"}, "dim is '64'"),
        ({"dim": True}, "dim is True"),
        ({"dim": 65}, "dim 65 is not a multiple of n_heads 8"),
        ({"n_heads": 0}, "not a multiple"),
        ({"n_heads": -8}, "not a multiple"),
        ({"n_kv_heads": 3}, "kv_heads: 3 given"),
        ({"n_layers": 0}, "layers: 0 given"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"norm_eps": float("nan")}, "norm_eps: nan"),
        ({"norm_eps": 0}, "norm_eps: 0.0"),
        ({"vocab_size": 97}, "misshapen"),
        ({"vocab_size": -2}, "vocab_size: -2"),
        ({"rope_theta": 12345.0}, "add max_seq_len"),
        ({"rope_theta": 0, "max_seq_len": 5}, "rope_theta: 0.0"),
        ({"use_scaled_rope": True}, "add rope_scaling_factor"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
        ({"rope_scaling_factor": 8}, "use_scaled_rope is not true"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "factor: 0.0"),
        (
            {"lora_args": {"rank": 16, "scale": 2.0}},
            "lora_args is given: a model with LoRA adapters",
        ),
        ({"quantization_args": {"group_size": 32}}, "quantization_args is given"),
        ({"moe_args": {"num_experts": 16}}, "moe_args is given"),
        ({"vision_chunk_size": 448}, "vision_chunk_size is given: a model with images"),
        ({"head_dim": 16}, "keys ['head_dim'] are unknown"),
        ({"qk_norm": True}, "keys ['qk_norm'] are unknown"),
    ],
)
def test_wrong_values_are_refused_by_key(tmp_path, params, changed, named):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    (directory / "params.json").write_text(json.dumps(declared(CONFIG, **changed)))
    assert named in refusal(directory)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"dim": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "does not hold a JSON object"),
        (b" " * ((16 << 20) + 1), "larger than"),
    ],
)
def test_files_that_are_no_description_are_refused(tmp_path, params, content, named):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    (directory / "params.json").write_bytes(content)
    assert f"params.json: {named}" in refusal(directory)


def test_harmless_keys_are_harmless(tmp_path, params):
    directory = write_meta(tmp_path / "meta", CONFIG, params)
    more = declared(
        CONFIG,
        ffn_dim_multiplier=1.3,
        max_batch_size=32,
        rope_theta=1e4,
        use_scaled_rope=False,
        vocab_size=96,
    )
    (directory / "params.json").write_text(
        json.dumps(more | {"lora_args": None, "quantization_args": None})
    )
    assert MetaSource.open(directory).config == CONFIG


# The files of the releases, written out from them; F and V are those of the weights.
RELEASED = {
    "llama-7b": {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-06,
        "vocab_size": -1,
    },
    "llama-65b": {
        "dim": 8192,
        "multiple_of": 256,
        "n_heads": 64,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama2-7b": {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama2-70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama3-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    },
    "llama3.1-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama3.2-1b": {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.5,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_models_are_recognised(name):
    known = PRESETS[name]
    config = config_from_meta(RELEASED[name], known.vocab_size, known.ffn_dim, known.tied_head)
    assert config == known
    assert name_of(config) == name


def test_every_published_model_has_its_context_and_scaling():
    for name, known in PRESETS.items():
        if name.startswith("llama"):
            values = {
                "dim": known.dim,
                "n_layers": known.layers,
                "n_heads": known.heads,
                "n_kv_heads": known.kv_heads,
                "norm_eps": known.norm_eps,
                "rope_theta": known.rope_theta,
                "use_scaled_rope": known.rope_scaling is not None,
            }
            config = config_from_meta(
                values, known.vocab_size + 16, known.ffn_dim, not known.tied_head
            )
            assert (config.context_length, config.rope_scaling) == (
                known.context_length,
                known.rope_scaling,
            ), name
            if known.rope_scaling:
                stated = config_from_meta(
                    values | {"rope_scaling_factor": 16},
                    known.vocab_size,
                    known.ffn_dim,
                    known.tied_head,
                )
                assert stated.rope_scaling == dataclasses.replace(known.rope_scaling, factor=16.0)


@pytest.mark.parametrize(
    ("changed", "context"),
    [
        ({}, 2048),
        ({"rope_theta": 5e5}, 8192),
        ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 7.0, "max_seq_len": 99}, 99),
        ({"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8}, 131072),
    ],
)
def test_context_of_unpublished_models(changed, context):
    assert config_from_meta(declared(CONFIG, **changed), 96, 176, False).context_length == context


# --- damage ---

VALUES = [
    None,
    True,
    0,
    -1,
    3,
    64,
    1 << 31,
    1 << 64,
    1e308,
    float("nan"),
    -0.5,
    "",
    "64",
    "\ud800",
    [],
    {},
    [64],
    {"dim": 64},
]


def changed(values: dict, draw: random.Random) -> dict:
    """The keys with one to three of them taken out, given an absurd value, or joined by one that is
    unknown.
    """
    result = dict(values)
    for _ in range(draw.choice([1, 1, 2, 3])):
        key = draw.choice(
            [*values, "vision_args", "quantization_args", "rope_scaling_factor", "x" * 5000]
        )
        if draw.random() < 0.2:
            result.pop(key, None)
        else:
            result[key] = draw.choice(VALUES)
    return result


def opens(directory) -> bool:
    """Whether a directory was opened (else: refused in one line)."""
    try:
        MetaSource.open(directory)
    except InputError as error:
        complaint = str(error)
    else:
        return True
    assert "\n" not in complaint
    assert len(complaint) < 2000
    return False


def test_mutations_of_what_params_json_says_are_read_or_refused(tmp_path, params):
    """Two of values, then one of bytes, in bounded time and memory."""
    count, directory = rounds(210, 1200), write_meta(tmp_path / "meta", CONFIG, params, 1)
    draw, read = random.Random(7), 0
    good, path = json.loads((directory / "params.json").read_text()), directory / "params.json"
    text = path.read_bytes()
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        if number % 3:
            content = json.dumps(changed(good, draw)).encode()
        else:
            at = draw.randrange(len(text))
            content = text[:at] + draw.randbytes(draw.randrange(4)) + text[at + draw.randrange(3) :]
        path.write_bytes(content)
        read += opens(directory)
    assert count / 30 < read < count * 2 / 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert time.process_time() - started < 60
