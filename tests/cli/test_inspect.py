"""`inspect`: the report on standard output, quickly, or one line about what is wrong."""

import json
import subprocess
import sys

import pytest

from llama_jax.cli.main import run_verb
from llama_jax.errors import InputError
from llama_jax.weights.inspect import report
from llama_jax.weights.open import open_model


def test_text(tiny_directory, capsys):
    assert run_verb(["inspect", str(tiny_directory)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    rows = {line[:15].strip(): line[15:] for line in output.out.splitlines()}
    assert rows["model"] == "Hugging Face tiny"
    assert rows["stops"] == "0 <|endoftext|>, 2 <|im_end|>"
    assert rows["chat template"] == "chatml"
    assert rows["odd"].startswith("the chat template ends turns with '<|im_end|>'")


def test_json_and_nothing_else(tiny_directory, capsys):
    assert run_verb(["inspect", str(tiny_directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report(open_model(tiny_directory)).to_dict()


def test_what_is_wrong_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: " + done.stderr.split(": ", 2)[2]
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--jsn", "a"]])
def test_wrong_use(arguments):
    with pytest.raises(InputError):
        run_verb(["inspect", *arguments])


def test_neither_jax_nor_the_weights_are_needed(tiny_directory):
    code = (
        "import sys; from llama_jax.cli.main import run_verb; run_verb(sys.argv[1:]); assert "
        "'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tiny_directory)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_terminal_without_the_characters(tiny_directory, tmp_path):
    directory = tmp_path / "模型"
    directory.symlink_to(tiny_directory)
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax", "inspect", str(directory)],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert rb"Hugging Face \u6a21\u578b" in done.stdout
