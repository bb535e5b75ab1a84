"""`infer.py`: text on standard output, everything else on standard error, and one line for what is
wrong.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from processes import INFER, KEEP, infer
from safetensors.numpy import load_file, save_file

from llama_jax.cli.infer import main
from llama_jax.cli.main import run_program
from llama_jax.cli.models import rope_scaling
from llama_jax.cli.writing import AnswerWriter, as_dict
from llama_jax.config import RopeScaling
from llama_jax.errors import InputError
from llama_jax.generation.text import Completion, Piece, generate
from llama_jax.weights.load import load

KEYS = ["prompt", "text", "token_ids", "stop_reason", "prompt_tokens", "new_tokens"]
STATISTICS = re.compile(
    r"prompt \d+ tokens, first token after [\d.]+ s; \d+ new tokens, then ([\d.]+ tokens/s|-) \(compilation included\); "
    r"ended by (length|stop|length, stop); \d+ programs compiled \(begin \d+, cache \d+, decode \d+, prefill \d+\)\n"
)


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
    done = infer(
        "--model",
        tiny_directory,
        "--prompt",
        "The cat",
        "--prompt",
        "你好 🎉",
        "--max-new-tokens",
        8,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{expected[0].text}\n{expected[1].text}\n"
    first, odd, last = done.stderr.decode().splitlines(keepends=True)
    assert re.fullmatch(
        r"Hugging Face tiny: custom architecture, .* chat template chatml; loaded in [\d.]+ s, float32\n",
        first,
    )
    assert (
        odd == "odd: the chat template ends turns with '<|im_end|>' (2), which the files do not "
        "declare as a stop\n"
    )
    assert STATISTICS.fullmatch(last)


@pytest.mark.smollm2
def test_the_real_model_answers(smollm2_gguf):
    question = "What is the capital of France?"
    done = infer(
        "--model", smollm2_gguf, "--chat", "--prompt", question, "--max-new-tokens", 24, "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer) == KEYS
    assert answer["text"] == "The capital of France is Paris."
    assert answer["stop_reason"] == "stop"
    assert b"ended by stop" in done.stderr


def test_json_of_lines(tiny_directory, expected, typed, capsys):
    """One object a prompt, in the order of the lines; empty lines are none, and only a line feed
    ends one.
    """
    typed("The cat\n\n你好 🎉\r\n  \na\u2028b\x0cc".encode())
    assert run("--model", tiny_directory, "--json", "--max-new-tokens", 8, "--batch-size", 2) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [list(answer) for answer in answers] == [KEYS] * 3
    assert [answer["prompt"] for answer in answers] == ["The cat", "你好 🎉", "a\u2028b\x0cc"]
    assert answers[:2] == [as_dict(completion) for completion in expected[:2]]


def test_all_of_standard_input_is_one_prompt(tiny_directory, typed, capsys):
    typed(b"The cat\nsat.\n")
    assert run("--model", tiny_directory, "--prompt", "-", "--json", "--max-new-tokens", 8) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "The cat\nsat.\n"


def test_chat_and_seeds(tiny_directory, expected, capsys):
    arguments = (
        "--model",
        tiny_directory,
        "--prompt",
        "The cat",
        "--chat",
        "--max-new-tokens",
        8,
        "--json",
    )
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out) == as_dict(expected[2])
    texts = []
    for seed in (1, 1, 2):
        assert (
            run(*arguments, "--temperature", 1, "--top-p", 0.99, "--top-k", 200, "--seed", seed)
            == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_interrupted(tiny_directory):
    """Ctrl-C in the middle of a text: what was written stays, the status says it, nothing else is
    printed.
    """
    command = [
        sys.executable,
        INFER,
        "--model",
        tiny_directory,
        "--prompt",
        "The cat",
        "--max-new-tokens",
        "60000",
    ]
    buffered = {
        key: value for key, value in (os.environ | KEEP).items() if key != "PYTHONUNBUFFERED"
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    ) as program:
        begun = program.stdout.read(8)
        program.send_signal(signal.SIGINT)
        rest, errors = program.communicate(timeout=300)
    assert program.returncode == 130
    assert begun
    assert (
        len(begun + rest) < 2048
    )  # written as it came, not when a buffer (of 4096 bytes or more) was full
    assert len(errors.splitlines()) == 2, errors  # what was loaded, and what is odd about it
    assert b"loaded" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--promt", "a"], "argument '--promt' is unknown; the nearest is --prompt"),
        (
            ["--max_new_tokens", "3"],
            "argument '--max_new_tokens' is unknown; the nearest is --max-new-tokens",
        ),
        (
            ["--prompt", "a", "--temp", "1"],
            "argument '--temp' is unknown; the nearest is --temperature",
        ),
        (
            ["--prompt", "a", "--max-new-tokens", "many"],
            "argument --max-new-tokens: invalid int value: 'many'",
        ),
        (["--prompt", "a", "--top-k", "2.5"], "argument --top-k: invalid int value: '2.5'"),
        (["--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--prompt"], "argument --prompt: expected one argument"),
        (["--prompt", "a", "-x"], "unrecognized arguments: -x"),
        (
            ["--prompt", "a", "--max-new-tokens", "-1"],
            "max_new_tokens: -1 given; 0 or more expected",
        ),
        (["--prompt", "a", "--temperature", "nan"], "temperature: nan given"),
        (
            ["--prompt", "a", "--seed", "99999999999999999999999"],
            "seed: 99999999999999999999999 given",
        ),
        (["--prompt", "a", "--min-p", "2"], "min_p: 2.0 given"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty: 0.0 given"),
        (["--prompt", "a", "--presence-penalty", "nan"], "presence_penalty: nan given"),
        (["--prompt", "a", "--frequency-penalty", "1e9"], "frequency_penalty: 1000000000.0 given"),
        (
            ["--prompt", "a", "--logit-bias", "x=1"],
            "argument --logit-bias: 'x=1' given; ID=VALUE expected",
        ),
        (["--prompt", "a", "--logit-bias", "3=nan"], "logit_bias: 3: nan given"),
        (
            ["--prompt", "a", "--logit-bias", "999=1"],
            "logit_bias: token 999 given; the vocabulary goes from 0 to 279",
        ),
        (["--prompt", "a", "--stop", ""], "argument --stop: an empty text given"),
        (["--prompt", "a", "--samples", "0"], "samples: 0 given; 1 or more expected"),
        (["--prompt", "a", "--logprobs", "0"], "--logprobs given without --json"),
        (["--prompt", "a", "--draft", "x"], "--draft given without --speculate"),
        (["--prompt", "a", "--speculate", "33"], "speculate: 33 given; 0 to 32 expected"),
        (
            ["--prompt", "a", "--speculate", "3", "--presence-penalty", "1"],
            "--speculate given with a penalty",
        ),
        (
            ["--prompt", "a", "--logprobs", "101", "--json"],
            "logprobs: 101 given; 0 to 100 expected",
        ),
        (["--prompt", "a", "--system", "b"], "--system given without --chat"),
        (["--prompt", "a", "--output", "b"], "--output given without --input"),
        (["--prompt", "a", "--input", "b"], "--prompt and --input given"),
        (["--input", "b", "--batch-size", "0"], "--batch-size: 0 given; 1 or more expected"),
        (["--prompt", "a", "--context", "0"], "context_length: 0 given"),
        (
            ["--prompt", "a a a a a a", "--context", "5"],
            "tokens; 1 to 5 (the model's context) expected",
        ),
        (["--prompt", "a", "--rope-theta", "-1"], "rope_theta: -1.0 given"),
        (
            ["--prompt", "a", "--rope-scaling", "yarn:2"],
            "--rope-scaling: 'yarn:2' given; linear:FACTOR, llama3:",
        ),
        (
            ["--prompt", "a", "--rope-scaling", "linear:two"],
            "--rope-scaling: 'linear:two' given; numbers expected",
        ),
        (["--prompt", "a", "--rope-scaling", "linear:0"], "rope_scaling.factor: 0.0 given"),
        (
            ["--prompt", "a", "--chat", "--chat-template", "alpaca"],
            "no built-in format (llama2, llama3, chatml), and no file",
        ),
        (
            ["--prompt", "a", "--chat", "--chat-template", "llama3"],
            "chat format llama3: the tokenizer lacks",
        ),
        (["--prompt", "a", "--quantize", "int2"], "argument --quantize: invalid choice: 'int2'"),
        (["--prompt", ""], "prompt 1 has 0 tokens"),
        (["--prompt", "a\udcff"], "surrogate"),
        ([], "standard input is empty; one prompt a line expected"),
    ],
)
def test_wrong_use_is_one_line(tiny_directory, typed, capsys, arguments, words):
    typed(b" \n")
    assert run("--model", tiny_directory, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = [
        line
        for line in err.splitlines()
        if not line.startswith(("Hugging Face tiny: ", "odd: ", "context"))
    ]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert words in error[0]


def test_settings_of_the_text(tiny_directory, capsys):
    """Every flag reaches the generation: the same as from Python."""
    model = load(tiny_directory)
    flags = [
        "--temperature",
        1.5,
        "--min-p",
        0.01,
        "--repetition-penalty",
        1.2,
        "--presence-penalty",
        0.5,
        "--frequency-penalty",
        0.25,
        "--logit-bias",
        "70=3.5",
        "--logit-bias",
        "71=-1",
        "--seed",
        4,
        "--samples",
        2,
        "--logprobs",
        2,
        "--max-new-tokens",
        20,
    ]
    settings = {
        "temperature": 1.5,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "samples": 2,
        "frequency_penalty": 0.25,
        "logit_bias": {70: 3.5, 71: -1.0},
        "seed": 4,
        "logprobs": 2,
    }
    expected = generate(model, ["The cat"], max_new_tokens=20, **settings)
    assert run("--model", tiny_directory, "--prompt", "The cat", "--json", *flags) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [
        json.loads(json.dumps({"sample": i, **as_dict(sequence)}))
        for i, sequence in enumerate(expected)
    ]
    stop = expected[0].text[4:6]
    assert (
        run(
            "--model",
            tiny_directory,
            "--prompt",
            "The cat",
            "--json",
            *flags,
            "--stop",
            stop,
            "--stop",
            r"\n",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[0])["stop_reason"] == "stop_string"


def test_line_feeds_end_a_text(tiny_directory, capsys):
    """`\\n` on the command line is a line feed."""
    feed = load(tiny_directory).tokenizer.encode("\n")[0]
    flags = ["--logit-bias", f"{feed}=1000", "--max-new-tokens", 5]
    assert (
        run("--model", tiny_directory, "--prompt", "The cat", "--json", *flags, "--stop", r"\n")
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["stop_reason"], answer["new_tokens"]) == ("", "stop_string", 1)


def test_the_model_run_otherwise(tiny_directory, capsys):
    """Context and RoPE are those of the command line, and that is said."""
    model = load(tiny_directory)
    config = dataclasses.replace(
        model.config,
        context_length=1 << 17,
        rope_theta=5e4,
        rope_scaling=RopeScaling("linear", 2.0),
    )
    (expected,) = generate(model._replace(config=config), ["The cat sat"], max_new_tokens=8)
    flags = ["--context", 1 << 17, "--rope-theta", 5e4, "--rope-scaling", "linear:2"]
    assert (
        run(
            "--model",
            tiny_directory,
            "--prompt",
            "The cat sat",
            "--json",
            "--max-new-tokens",
            8,
            *flags,
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out) == as_dict(expected)
    assert (
        "context 65536 -> 131072, RoPE theta 10000 -> 50000, RoPE unscaled -> linear 2; "
        "quality beyond" in err
    )
    assert expected.token_ids != generate(model, ["The cat sat"], max_new_tokens=8)[0].token_ids


def test_narrow_weights_and_caches(tiny_directory, capsys):
    from llama_jax.model.quantize import quantize

    model = load(tiny_directory)
    narrow = model._replace(params=quantize(model.params, bits=8))
    (expected,) = generate(narrow, ["The cat sat"], max_new_tokens=8, cache_dtype="int8")
    flags = ["--quantize", "int8", "--cache-dtype", "int8"]
    assert (
        run(
            "--model",
            tiny_directory,
            "--prompt",
            "The cat sat",
            "--json",
            "--max-new-tokens",
            8,
            *flags,
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out) == as_dict(expected)
    assert re.search(r"weights in int8: 0\.\d -> 0\.\d MB", err)


def test_chat_templates_and_system_messages(tiny_directory, tmp_path, capsys):
    model = load(tiny_directory)
    messages = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]
    flags = [
        "--model",
        tiny_directory,
        "--prompt",
        "Hi",
        "--chat",
        "--system",
        "Brief.",
        "--json",
        "--max-new-tokens",
        8,
    ]
    (expected,) = generate(model, [messages], max_new_tokens=8)
    for template in ([], ["--chat-template", "chatml"]):
        assert run(*flags, *template) == 0
        assert json.loads(capsys.readouterr().out) == as_dict(expected)
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    assert run(*flags, "--chat-template", own) == 0
    end = model.tokenizer.special_tokens["<|endoftext|>"]
    encode = model.tokenizer.encode
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(
        [*encode("Brief."), end, *encode("Hi"), end]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("linear:2.5", RopeScaling("linear", 2.5)),
        ("llama3:8:1:4:8192", RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_scalings(text, expected):
    assert rope_scaling(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none:1",
        "linear",
        "linear:",
        "linear:2:3",
        "llama3:8",
        "llama3:8:1:4:1.5",
        "llama3:8:4:1:9",
    ],
)
def test_rope_scalings_that_are_none(text):
    with pytest.raises(InputError, match="rope"):
        rope_scaling(text)


def test_a_terminal_takes_no_commands_from_a_model(tiny_directory, capsys, monkeypatch):
    """Escape sequences that a model writes are shown as marks; in a pipe they are what they are."""
    escape = load(tiny_directory).tokenizer.encode("\x1b")[0]
    arguments = (
        "--model",
        tiny_directory,
        "--prompt",
        "The cat",
        "--max-new-tokens",
        3,
        "--logit-bias",
        f"{escape}=1000",
    )
    assert run(*arguments) == 0
    assert capsys.readouterr().out == "\x1b\x1b\x1b\n"
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        assert run(*arguments) == 0
    seen = b""
    with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
        while more := os.read(master, 1 << 16):
            seen += more
    os.close(master)
    assert "\ufffd" * 3 + "\r\n" in seen.decode()
    assert "\x1b[2mThe cat\x1b[0m" in seen.decode()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "no such file or directory"), ("text file", "another file given")],
)
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
    assert (
        capsys.readouterr().err
        == "error: the following arguments are required: --model; see --help\n"
    )


def test_chat_without_a_template(tiny_directory, tmp_path, capsys):
    directory = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "plain"))
    (directory / "tokenizer_config.json").write_text("{}")
    assert run("--model", directory, "--prompt", "a", "--chat") == 2
    assert capsys.readouterr().err.endswith(
        "error: Hugging Face plain has no chat template; name one with --chat-template, "
        "or ask without --chat\n"
    )


def test_standard_input_that_is_no_text(tiny_directory, typed, capsys):
    typed(b"good\nbad \xff\n")
    assert run("--model", tiny_directory) == 2
    assert (
        capsys.readouterr().err
        == "error: standard input is not UTF-8 text at byte 9; convert it first\n"
    )


def test_wrong_use_as_a_process(tmp_path):
    """No traceback, and no wait for JAX."""
    done = infer("--model", tmp_path, "--promt", "a")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: argument '--promt' is unknown; the nearest is --prompt\n"


def test_output_that_takes_no_emoji(tiny_directory, expected, monkeypatch):
    """A terminal in an old encoding shows a mark in place of the character; the program goes on."""
    arguments = ("--model", tiny_directory, "--prompt", "你好 🎉", "--max-new-tokens", 8)

    def written(*more: str) -> bytes:
        """As Python's own streams are with PYTHONIOENCODING=ascii."""
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert run(*arguments, *more) == 0
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue()

    assert written().decode("ascii") == expected[1].text.encode("ascii", "replace").decode() + "\n"
    assert "?" in expected[1].text.encode("ascii", "replace").decode()
    assert json.loads(written("--json")) == as_dict(expected[1])


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"], "infer.py")
    assert ended.value.code == 0
    assert "--max-new-tokens N" in capsys.readouterr().out


def test_texts_come_in_the_order_of_their_prompts(capsys):
    """Pieces of two prompts come interleaved; they are written one text after the other."""
    ends = [
        Completion("p0", "a b", [1, 2], "length", 1, 2),
        Completion("p1", "cd", [3, 4], "stop", 1, 2),
    ]
    pieces = [
        Piece(0, "a", 1, None),
        Piece(1, "c", 1, None),
        Piece(1, "d", 1, ends[1]),
        Piece(0, " b", 1, ends[0]),
    ]
    text, objects = AnswerWriter(["<p0>", "<p1>"]), AnswerWriter(["", ""], json=True)
    for piece in pieces:
        text.take(piece)
    assert capsys.readouterr().out == "<p0>a b\n<p1>cd\n"
    for piece in pieces:
        objects.take(piece)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        as_dict(end) for end in ends
    ]


@pytest.mark.parametrize("draft", [False, True], ids=["look-up", "draft"])
def test_guessing_ahead_does_not_change_the_text(tiny_directory, capsys, draft):
    flags = ["--model", tiny_directory, "--prompt", "The cat sat", "--json", "--max-new-tokens", 12]
    assert run(*flags) == 0
    expected = capsys.readouterr().out
    assert run(*flags, "--speculate", 3, *(["--draft", tiny_directory] if draft else [])) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "speculate" in err


def test_weights_that_are_not_finite_make_no_json(tiny_directory, tmp_path, capsys):
    """JSON has no NaN: the reason is said, and no line that its readers would choke on is
    written.
    """
    broken = shutil.copytree(tiny_directory, tmp_path / "nan")
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {
            name: np.full_like(x, np.nan) if name == "model.norm.weight" else x
            for name, x in tensors.items()
        },
        broken / "model.safetensors",
    )
    assert (
        run("--model", broken, "--prompt", "a", "--max-new-tokens", 2, "--json", "--logprobs", 1)
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert "sequence 1: logits that are NaN or infinite computed for new token 1" in err
