"""`open_model`: what lies at a path, told from headers alone, and names on the Hub."""

import base64
import dataclasses
import fnmatch
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub import TEMPLATE
from meta_files import FAMILIES, write_meta
from support import TINY, random_parameters

from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model
from llama_jax.weights.source import Source


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_directory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("runs") / "first"
    with Checkpoints.open(directory / "checkpoints", keep=3) as checkpoints:
        for step in (5, 9):
            state = {"params": random_parameters(TINY, seed=step), "step": jnp.int32(step)}
            checkpoints.save(step, state, {"model": dataclasses.asdict(TINY)})
    shutil.copy(tiny_directory / "tokenizer.json", directory)
    return directory


def test_a_hugging_face_directory(tiny_directory):
    opened = open_model(tiny_directory)
    assert isinstance(opened.source, Source)
    assert (opened.format, opened.path, opened.origin) == (
        "hugging_face",
        tiny_directory,
        "Hugging Face tiny",
    )
    assert opened.template.source == TEMPLATE
    assert opened.stop_ids == (0, 2)


@pytest.mark.smollm2
@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_gguf_file_of_weights_alone(write_gguf, kind):
    path = write_gguf({} if kind is None else {"tokenizer.ggml.model": kind})
    opened = open_model(path)
    assert (opened.tokenizer, opened.template, opened.stop_ids) == (None, None, ())
    assert load(path).config.vocab_size == 96
    with pytest.raises(InputError, match=f"^{path}: tokenizer.ggml.model: 'bert' given"):
        open_model(write_gguf({"tokenizer.ggml.model": "bert"}))


def test_a_gguf_file_whatever_type_the_path_has(smollm2_gguf):
    opened = open_model(str(smollm2_gguf))
    assert (opened.format, opened.path, opened.stop_ids) == ("gguf", smollm2_gguf, (0, 2))


def test_a_run_reads_nothing_but_its_manifest(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "first")
    for path in (copy / "checkpoints" / "9" / "state").rglob("*"):
        path.is_file() and path.unlink()
    opened = open_model(copy)
    assert isinstance(opened.source, Source)
    assert (opened.format, opened.origin, opened.source.config) == (
        "run",
        "run first at step 9",
        TINY,
    )


def test_a_run_as_a_source(run):
    source, expected = open_model(run).source, random_parameters(TINY, seed=9)
    np.testing.assert_array_equal(source.read("embedding", None), expected["embedding"])
    np.testing.assert_array_equal(
        source.read("final_norm/scale", None), expected["final_norm"]["scale"]
    )
    for layer in range(3):
        np.testing.assert_array_equal(
            source.read("layers/attention/wk", layer), expected["layers"]["attention"]["wk"][layer]
        )


def test_a_run_keeps_the_stops_of_its_model(tmp_path, tiny_directory):
    """Those that mean the same tokens to it; what is no report is passed over."""
    text = open_model(tiny_directory).tokenizer.decode([70])
    for number, (stops, expected) in enumerate(
        [
            ({"0": "<|endoftext|>", "70": text}, (0, 2, 70)),
            ({"70": text + "x", "1" * 99: "y", "z": None}, (0, 2)),
            ([70], (0, 2)),
        ]
    ):
        run = tmp_path / str(number)
        with Checkpoints.open(run / "checkpoints", keep=1) as checkpoints:
            state = {"params": random_parameters(TINY), "step": jnp.int32(1)}
            checkpoints.save(
                1, state, {"model": dataclasses.asdict(TINY), "made_from": {"stops": stops}}
            )
        shutil.copy(tiny_directory / "tokenizer.json", run)
        shutil.copy(tiny_directory / "tokenizer_config.json", run)
        assert open_model(run).stop_ids == expected


def test_runs_without_a_whole_checkpoint(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for step in (5, 9):
        (copy / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(CorruptError, match="all checkpoints are damaged"):
        open_model(copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint there"):
        open_model(copy)


def write_ranks(path: pathlib.Path) -> None:
    """A tokenizer.model in Llama 3's form, with no merge at all: the 256 bytes."""
    path.write_text(
        "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    )


@pytest.mark.parity
@pytest.mark.parametrize("above", [False, True])
def test_metas_directory(tmp_path, above):
    """With Llama 3's tokenizer, in the directory or above it, there is Llama 3's format; without
    one there is none.
    """
    pytest.importorskip("torch", reason="its files are written by torch")
    config, directory = FAMILIES["llama3"], tmp_path / "tiny"
    directory.mkdir()
    write_meta(directory, config, random_parameters(config))
    bare = open_model(directory)
    assert (bare.format, bare.origin, bare.tokenizer, bare.template) == (
        "meta",
        "Meta tiny",
        None,
        None,
    )
    write_ranks((tmp_path if above else directory) / "tokenizer.model")
    opened = open_model(directory)
    assert "<|start_header_id|>" in opened.template.source
    ends = [
        opened.tokenizer.special_tokens[token]
        for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ]
    assert opened.stop_ids == tuple(sorted(ends))
    wq = load(directory, form="stacked").params["layers"]["attention"]["wq"]
    np.testing.assert_array_equal(wq, random_parameters(config)["layers"]["attention"]["wq"])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("checkpoints/9", "the checkpoints of a run given; give the directory of the run"),
        ("checkpoints", "the checkpoints of a run given; give the directory of the run"),
        ("tokenizer.json", "one file of a model given; give its directory"),
    ],
)
def test_a_part_of_a_run(run, name, advice):
    with pytest.raises(InputError) as refused:
        open_model(run / name)
    assert str(refused.value) == f"{run / name}: {advice}, {run}"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "consolidated.00.pth", "pytorch_model.bin"]
)
def test_a_part_of_a_directory(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=f"one file of a model given; give its directory, {tmp_path}"
    ):
        open_model(tmp_path / name)


def test_paths_that_the_system_refuses(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        open_model("a" * 5000)
    with pytest.raises(InputError, match="no such file or directory"):
        open_model(tmp_path / "nowhere" / "model")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_files_beside_the_weights_are_no_links_elsewhere(tiny_directory, tmp_path, name):
    directory = shutil.copytree(tiny_directory, tmp_path / "tiny")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=f"{name} links to /etc/passwd, outside of the directory"):
        open_model(directory)


def test_opening_needs_no_jax(tiny_directory):
    code = (
        "import sys; from llama_jax.weights.open import open_model; open_model(sys.argv[1]); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_directory)], check=True, timeout=60)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tiny_directory, tmp_path, monkeypatch) -> pathlib.Path:
    """The Hub's download cache as its client lays it out, with one model in it: files are links to
    blobs.
    """
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "cache" / "models--someone--tiny-1.0"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(tiny_directory.iterdir())):
        shutil.copy(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize(
    "name", ["someone/tiny-1.0", "someone/tiny-1.0@main", f"someone/tiny-1.0@{COMMIT}"]
)
def test_a_name_on_the_hub(hub_cache, tiny_directory, name):
    opened = open_model(name)
    assert (opened.format, opened.path.name, opened.origin) == (
        "hugging_face",
        COMMIT,
        f"Hugging Face {name}",
    )
    expected = load(tiny_directory).params
    jax.tree.map(np.testing.assert_array_equal, load(name).params, expected)


@pytest.mark.parametrize("name", ["someone/other", "someone/tiny-1.0@v2"])
def test_a_name_that_is_not_in_the_cache(hub_cache, name):
    with pytest.raises(InputError) as refused:
        open_model(name)
    assert str(refused.value).startswith(
        f"{name}: nothing there, and not to be had from the Hugging Face Hub by that name"
    )
    assert "not in the cache" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_without_the_client(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"someone/tiny: nothing there; .*pip install 'llama-jax\[hf\]'"
    ):
        open_model("someone/tiny")


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "tiny",
        "../tiny",
        "/no/tiny",
        "someone/../tiny",
        "some one/tiny",
        "runs/tiny",
        "a/b@",
    ],
)
def test_other_paths_ask_nobody(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no such file or directory"):
        open_model(name)


def test_only_files_of_a_model_are_fetched(monkeypatch, tmp_path, tiny_directory):
    """What the client is asked for, matched as it does, leaves the rest of a repository where it
    is.
    """
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tiny_directory)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)
    )
    open_model("someone/tiny@v1.0")
    assert (asked["name"], asked["revision"]) == ("someone/tiny", "v1.0")
    wanted = {path.name for path in tiny_directory.iterdir()} | {
        "model-00001-of-00030.safetensors",
        "tokenizer.model",
    }
    unwanted = {
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "run.py",
        "model.onnx",
        "consolidated.safetensors",
        "flax_model.msgpack",
        "README.md",
    }
    matching = {
        name
        for name in wanted | unwanted
        for pattern in asked["allow_patterns"]
        if fnmatch.fnmatch(name, pattern)
    }
    assert matching == wanted
