"""`convert`: what it prints, what it refuses, and that the result is the same model."""

import dataclasses
import io
import json
import pathlib
import pydoc_data.topics
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import sentencepiece
from support import TINY, random_parameters, random_tokens

from llama_jax.cli.convert import main
from llama_jax.cli.main import run_program
from llama_jax.model.llama import logits
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model

PROSE = pydoc_data.topics.topics["for"]
CONFIG = dataclasses.replace(TINY, layers=2, vocab_size=400)


def convert(*arguments) -> int:
    return run_program(lambda: main([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run directory as `train.py` leaves it."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    with Checkpoints.open(directory / "checkpoints", keep=1) as checkpoints:
        state = {"params": random_parameters(CONFIG, seed=3), "step": jnp.int32(7)}
        checkpoints.save(7, state, {"model": dataclasses.asdict(CONFIG)})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines() * 20),
        model_writer=model,
        vocab_size=CONFIG.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def require_same_model(path: pathlib.Path, original: pathlib.Path) -> None:
    """Bit for bit the same logits, ids and stops."""
    given, expected = load(path), load(original)
    assert given.config == expected.config
    tokens = random_tokens(given.config, (1, 20))
    np.testing.assert_array_equal(
        logits(given.params, tokens, given.config), logits(expected.params, tokens, expected.config)
    )
    assert isinstance(given.tokenizer, Tokenizer)
    assert given.tokenizer.encode(PROSE) == expected.tokenizer.encode(PROSE)
    assert given.stop_ids == expected.stop_ids
    assert (given.template and given.template.source) == (
        expected.template and expected.template.source
    )


def test_hugging_face_to_hugging_face(tiny_directory, tmp_path, capsys):
    out = tmp_path / "the copy"
    assert (
        convert(tiny_directory, out, "--format", "hugging_face", "--max-shard-size", "100KB") == 0
    )
    printed = capsys.readouterr()
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    pattern = rf"{out}: hugging_face, {size:.1f} MB in \d+\.\d s; python -m llama_jax infer --model '{out}' --prompt TEXT\n"
    assert re.fullmatch(pattern, printed.out)
    brief = load(tiny_directory).report.brief()
    assert brief[1].startswith("odd: the chat template ends turns with '<|im_end|>' (2)")
    lines = printed.err.splitlines()
    assert lines[:2] == brief
    lines = lines[2:]
    assert lines[0] == "converting Hugging Face tiny, 77,904 parameters"
    assert lines[-1] == "  100% read"
    assert len(lines) <= 11
    assert len(list(out.glob("model-0000?-of-0000?.safetensors"))) > 2
    require_same_model(out, tiny_directory)


def test_the_report_goes_along(tiny_directory, tmp_path):
    """In the metadata of every file, read by the libraries of these formats; where the model lay is
    left out.
    """
    expected = load(tiny_directory).report.to_dict()
    del expected["path"]
    assert (
        convert(
            tiny_directory,
            tmp_path / "out",
            "--format",
            "hugging_face",
            "--max-shard-size",
            "100KB",
        )
        == 0
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["llama_jax.made_from"]) == json.loads(
                json.dumps(expected)
            )
    assert convert(tiny_directory, tmp_path / "out.gguf", "--format", "gguf") == 0
    field = (
        pytest.importorskip("gguf")
        .GGUFReader(tmp_path / "out.gguf")
        .get_field("llama_jax.made_from")
    )
    assert json.loads(field.contents()) == json.loads(json.dumps(expected))


@pytest.mark.slow  # the next two go there as well, one by way of GGUF
def test_run_to_hugging_face(run, tmp_path):
    assert convert(run, tmp_path / "out", "--format", "hugging_face") == 0
    require_same_model(tmp_path / "out", run)


@pytest.mark.parity
def test_run_to_transformers(run, tmp_path):
    torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
    import transformers

    assert convert(run, tmp_path / "out", "--format", "hugging_face") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    tokens = random_tokens(CONFIG, (1, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
    np.testing.assert_allclose(
        logits(random_parameters(CONFIG, seed=3), tokens, CONFIG), expected, atol=1e-4, rtol=0
    )
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(
        PROSE, add_special_tokens=False
    )["input_ids"]
    assert ids == load(run).tokenizer.encode(PROSE)


@pytest.mark.parametrize("origin", ["hugging_face", "run"])
def test_to_gguf(origin, tiny_directory, run, tmp_path, capsys):
    source = run if origin == "run" else tiny_directory
    out = tmp_path / "out.gguf"
    assert convert(source, out, "--format", "gguf") == 0
    assert capsys.readouterr().out.startswith(f"{out}: gguf, {out.stat().st_size / 1e6:.1f} MB in ")
    require_same_model(out, source)
    assert convert(out, tmp_path / "back", "--format", "hugging_face") == 0
    require_same_model(tmp_path / "back", source)


def test_declared_stops_go_to_gguf(tiny_directory, tmp_path, capsys):
    source = shutil.copytree(tiny_directory, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 70, 71, 72]}))
    assert convert(source, tmp_path / "out.gguf", "--format", "gguf") == 0
    assert "stop ids 72 do not fit into GGUF" in capsys.readouterr().err
    assert open_model(tmp_path / "out.gguf").stop_ids == (0, 2, 70, 71)


def test_gguf_in_the_dtype_asked_for(tiny_directory, tmp_path):
    gguf = pytest.importorskip("gguf")
    for dtype, kinds in (("float16", {"F16", "F32"}), ("keep", {"F32"})):
        out = tmp_path / f"{dtype}.gguf"
        assert convert(tiny_directory, out, "--format", "gguf", "--dtype", dtype) == 0
        assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == kinds


REFUSED = {
    "a dtype of GGUF": (
        ["--format", "hugging_face", "--dtype", "q8_0"],
        "--dtype q8_0 given, one of keep, float32",
    ),
    "shards of GGUF": (
        ["--format", "gguf", "--max-shard-size", "1GB"],
        "--max-shard-size given with --format gguf",
    ),
    "no format": ([], "the following arguments are required: --format"),
    "another format": (["--format", "onnx"], "invalid choice: 'onnx'"),
    "no size": (
        ["--format", "hugging_face", "--max-shard-size", "much"],
        "size 'much' given; a number with a unit",
    ),
    "an unknown option": (["--format", "gguf", "--overwrite"], "argument '--overwrite' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_one_line(case, tiny_directory, tmp_path, capsys):
    options, message = REFUSED[case]
    assert convert(tiny_directory, tmp_path / "out", *options) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "message"),
    [("hugging_face", "a directory that is not empty"), ("gguf", "something already")],
)
def test_what_is_there_is_left_alone(form, message, tiny_directory, tmp_path, capsys):
    (tmp_path / "out.gguf").mkdir()
    (tmp_path / "out.gguf" / "mine").write_text("mine")
    assert convert(tiny_directory, tmp_path / "out.gguf", "--format", form) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out.gguf", "mine"]


def test_no_model_given(tmp_path, capsys):
    assert convert(tmp_path / "nothing", tmp_path / "out", "--format", "hugging_face") == 2
    assert "no such file or directory" in capsys.readouterr().err


def test_without_a_tokenizer(tiny_directory, tmp_path, capsys):
    """Weights alone go to Hugging Face's format; a GGUF file without a tokenizer is of no use."""
    (tmp_path / "source").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "source" / name).write_bytes((tiny_directory / name).read_bytes())
    assert convert(tmp_path / "source", tmp_path / "out", "--format", "hugging_face") == 0
    assert capsys.readouterr().out.endswith("; there was no tokenizer to go with it\n")
    assert convert(tmp_path / "source", tmp_path / "out.gguf", "--format", "gguf") == 2
    assert "has no tokenizer; put its tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "status", "form"),
    [
        ("SIGINT", 130, "hugging_face"),
        ("SIGTERM", 143, "gguf"),
        pytest.param("SIGINT", 130, "gguf", marks=pytest.mark.slow),
        pytest.param("SIGTERM", 143, "hugging_face", marks=pytest.mark.slow),
    ],
)
def test_as_a_process_that_is_interrupted(tiny_directory, tmp_path, name, status, form):
    """Ctrl-C, or a system that shuts down, at the second line of progress: not a word, nothing
    left.
    """
    code = f"""if True:
        import signal, sys
        from llama_jax.cli import convert
        from llama_jax.cli.main import run_program
        advance = convert.Progress.advance
        def interrupted(self, count):
            advance(self, count)
            signal.raise_signal(signal.{name})
        convert.Progress.advance = interrupted
        arguments = [{str(tiny_directory)!r}, {str(tmp_path / "out.gguf")!r}, "--format", {form!r}]
        sys.exit(run_program(lambda: convert.main(arguments)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.splitlines()[2].startswith("converting ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_jax():
    code = """if True:
        import sys
        from llama_jax.cli.main import run_verb
        try:
            run_verb(["convert", "--help"])
        finally:
            assert "jax" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout
        for word in ("SRC", "DST", "--format", "--dtype", "--max-shard-size", "q8_0")
    )
