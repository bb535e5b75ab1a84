"""`infer.py`: text on standard output, everything else on standard error, and one line for what is wrong."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from llama_jax.cli.infer import in_order, main, write_json, write_text
from llama_jax.cli.program import run_program
from llama_jax.generation.text import Completion, Piece, generate
from llama_jax.weights.load import load

ROOT = pathlib.Path(__file__).parents[2]
KEYS = ["prompt", "text", "token_ids", "stop_reason", "prompt_tokens", "new_tokens"]
STATISTICS = re.compile(
    r"prompt \d+ tokens, first token after [\d.]+ s; \d+ new tokens, then ([\d.]+ tokens/s|-) \(compilation included\); "
    r"ended by (length|stop|length, stop)\n"
)


def infer(*arguments, stdin: bytes = b"", **environment) -> subprocess.CompletedProcess:
    """`python infer.py ARGUMENTS` as a user runs it."""
    return subprocess.run(
        [sys.executable, ROOT / "infer.py", *map(str, arguments)],
        input=stdin, capture_output=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def typed(monkeypatch):
    """Puts bytes on the standard input of this process."""

    def put(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return put


def run(*arguments) -> int:
    """The same program inside this process: compiled programs are shared with the other tests."""
    return run_program(lambda: main([str(argument) for argument in arguments], "infer.py"))


@pytest.fixture(scope="module")
def expected(tiny_directory) -> list[Completion]:
    model = load(tiny_directory)
    return [
        *generate(model, ["The cat", "你好 🎉"], max_new_tokens=8),
        *generate(model, ["The cat"], max_new_tokens=8, chat=True),
    ]


def test_text_and_statistics(tiny_directory, expected):
    """As a process, text and nothing else on standard output, the prompts in their order."""
    done = infer("--model", tiny_directory, "--prompt", "The cat", "--prompt", "你好 🎉", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{expected[0].text}\n{expected[1].text}\n"
    first, last = done.stderr.decode().splitlines(keepends=True)
    assert re.fullmatch(r"Hugging Face tiny loaded in [\d.]+ s, float32\n", first)
    assert STATISTICS.fullmatch(last)


@pytest.mark.smollm2
def test_the_real_model_answers(smollm2_gguf):
    question = "What is the capital of France?"
    done = infer("--model", smollm2_gguf, "--chat", "--prompt", question, "--max-new-tokens", 24, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer) == KEYS
    assert answer["text"] == "The capital of France is Paris."
    assert answer["stop_reason"] == "stop"
    assert b"ended by stop" in done.stderr


def test_json_of_lines(tiny_directory, expected, typed, capsys):
    """One object a prompt, in the order of the lines; empty lines are none, and only a line feed ends one."""
    typed("The cat\n\n你好 🎉\r\n  \na\u2028b\x0cc".encode())
    assert run("--model", tiny_directory, "--json", "--max-new-tokens", 8) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [list(answer) for answer in answers] == [KEYS] * 3
    assert [answer["prompt"] for answer in answers] == ["The cat", "你好 🎉", "a\u2028b\x0cc"]
    assert answers[:2] == [completion._asdict() for completion in expected[:2]]


def test_all_of_standard_input_is_one_prompt(tiny_directory, typed, capsys):
    typed(b"The cat\nsat.\n")
    assert run("--model", tiny_directory, "--prompt", "-", "--json", "--max-new-tokens", 8) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "The cat\nsat.\n"


def test_chat_and_seeds(tiny_directory, expected, capsys):
    arguments = ("--model", tiny_directory, "--prompt", "The cat", "--chat", "--max-new-tokens", 8, "--json")
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out) == expected[2]._asdict()
    texts = []
    for seed in (1, 1, 2):
        assert run(*arguments, "--temperature", 1, "--top-p", 0.99, "--top-k", 200, "--seed", seed) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_interrupted(tiny_directory):
    """Ctrl-C in the middle of a text: what was written stays, the status says it, nothing else is printed."""
    code = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"sys.argv[0] = 'infer.py'; runpy.run_path({str(ROOT / 'infer.py')!r}, run_name='__main__')"
    arguments = ["--model", tiny_directory, "--prompt", "The cat", "--max-new-tokens", "60000"]
    command = [sys.executable, "-c", code, *arguments]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as program:
        begun = program.stdout.read(8)
        program.send_signal(signal.SIGINT)
        rest, errors = program.communicate(timeout=120)
    assert program.returncode == 130
    assert begun
    assert len(begun + rest) < 2048  # written as it came, not when a buffer (of 4096 bytes or more) was full
    assert len(errors.splitlines()) == 1, errors
    assert b"loaded" in errors


@pytest.mark.parametrize(("arguments", "words"), [
    (["--promt", "a"], "argument '--promt' is unknown; the nearest is --prompt"),
    (["--max_new_tokens", "3"], "argument '--max_new_tokens' is unknown; the nearest is --max-new-tokens"),
    (["--prompt", "a", "--temp", "1"], "argument '--temp' is unknown; the nearest is --temperature"),
    (["--prompt", "a", "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
    (["--prompt", "a", "--top-k", "2.5"], "argument --top-k: invalid int value: '2.5'"),
    (["--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--prompt"], "argument --prompt: expected one argument"),
    (["--prompt", "a", "-x"], "unrecognized arguments: -x"),
    (["--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens: -1 given; 0 or more expected"),
    (["--prompt", "a", "--temperature", "nan"], "temperature: nan given"),
    (["--prompt", "a", "--seed", "99999999999999999999999"], "seed: 99999999999999999999999 given"),
    (["--prompt", ""], "prompt 1 has 0 tokens"),
    (["--prompt", "a\udcff"], "surrogate"),
    ([], "standard input is empty; one prompt a line expected"),
])  # fmt: skip
def test_wrong_use_is_one_line(tiny_directory, typed, capsys, arguments, words):
    typed(b" \n")
    assert run("--model", tiny_directory, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = [line for line in err.splitlines() if not line.startswith("Hugging Face tiny loaded")]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert words in error[0]


@pytest.mark.parametrize(("kind", "words"), [("missing", "nothing given"), ("text file", "another file given")])
def test_no_model(kind, words, tmp_path, capsys):
    path = tmp_path / "model"
    if kind == "text file":
        path.write_text("a")
    assert run("--model", path, "--prompt", "a") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: {words}")
    assert err.count("\n") == 1


def test_no_model_named(capsys):
    assert run("--prompt", "a") == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --model; see --help\n"


def test_chat_without_a_template(tiny_directory, tmp_path, capsys):
    directory = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "plain"))
    (directory / "tokenizer_config.json").write_text("{}")
    assert run("--model", directory, "--prompt", "a", "--chat") == 2
    assert capsys.readouterr().err.endswith("error: Hugging Face plain has no chat template; ask without chat\n")


def test_standard_input_that_is_no_text(tiny_directory, typed, capsys):
    typed(b"good\nbad \xff\n")
    assert run("--model", tiny_directory) == 2
    assert capsys.readouterr().err == "error: standard input is not UTF-8 text at byte 9; convert it first\n"


def test_wrong_use_as_a_process(tmp_path):
    """No traceback, and no wait for JAX."""
    done = infer("--model", tmp_path, "--promt", "a")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: argument '--promt' is unknown; the nearest is --prompt\n"


def test_output_that_takes_no_emoji(tiny_directory, expected):
    """A terminal in an old encoding shows a mark in place of the character; the program goes on."""
    arguments = ("--model", tiny_directory, "--prompt", "你好 🎉", "--max-new-tokens", 8)
    done = infer(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii") == expected[1].text.encode("ascii", "replace").decode() + "\n"
    assert "?" in expected[1].text.encode("ascii", "replace").decode()
    assert json.loads(infer(*arguments, "--json", PYTHONIOENCODING="ascii").stdout) == expected[1]._asdict()


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"], "infer.py")
    assert ended.value.code == 0
    assert "--max-new-tokens N" in capsys.readouterr().out


def test_texts_come_in_the_order_of_their_prompts(capsys):
    """Pieces of two prompts come interleaved; they are written one text after the other."""
    ends = [Completion("p0", "a b", [1, 2], "length", 1, 2), Completion("p1", "cd", [3, 4], "stop", 1, 2)]
    pieces = [Piece(0, "a", 1, None), Piece(1, "c", 1, None), Piece(1, "d", 1, ends[1]), Piece(0, " b", 1, ends[0])]
    assert write_text(in_order(pieces, 2), ["<p0>", "<p1>"]) == ends
    assert capsys.readouterr().out == "<p0>a b\n<p1>cd\n"
    assert write_json(in_order(pieces, 2)) == ends
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [end._asdict() for end in ends]
