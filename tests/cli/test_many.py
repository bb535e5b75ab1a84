"""Many prompts: answers equal those asked one by one, in the order of the input, and an interrupted
run goes on.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import INFER, KEEP
from safetensors.numpy import load_file, save_file

from llama_jax.cli.batch import Job, batch_settings, batches
from llama_jax.cli.infer import main
from llama_jax.cli.main import run_program
from llama_jax.cli.requests import Request
from llama_jax.generation.sampling import sequence_keys
from llama_jax.generation.text import generate
from llama_jax.weights.load import load

LINES = [
    {"id": "a", "prompt": "The cat sat on the mat. The dog sat on the log."},
    {"messages": [{"role": "user", "content": "你好 🎉"}], "temperature": 1.0, "seed": 5},
    {"id": 3, "prompt": "The", "max_new_tokens": 3, "stop": "x"},
    {
        "prompt": "dog",
        "top_k": 5,
        "temperature": 2,
        "logit_bias": {"70": 2.5},
        "repetition_penalty": 1.3,
    },
    {"prompt": "The cat " * 9, "min_p": 0.1, "temperature": 1},
]


OWN = {
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "seed": 0,
    "logit_bias": {},
    "stop": [],
}


def written(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return str(path)


def run(*arguments) -> int:
    return run_program(lambda: main([str(argument) for argument in arguments], "infer.py"))


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return load(tiny_directory)


def one_by_one(tiny, line: dict, index: int, **settings) -> list:
    """The answers to one request, asked alone."""
    own = {name: value for name, value in line.items() if name not in ("id", "prompt", "messages")}
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): value for token, value in own["logit_bias"].items()}
    prompt = line.get("prompt") or line["messages"]
    return generate(
        tiny,
        [prompt],
        **{"seed": sequence_keys(0, 1, index), "max_new_tokens": 12, **settings, **own},
    )


def test_answers_are_those_asked_one_by_one(tiny, tiny_directory, tmp_path, capsys):
    """Two a batch, each with its own settings, limits and seeds; written in order, with what was
    asked for.
    """
    name = written(tmp_path / "in.jsonl", LINES)
    arguments = [
        "--model",
        tiny_directory,
        "--input",
        name,
        "--max-new-tokens",
        12,
        "--batch-size",
        2,
        "--logprobs",
        0,
    ]
    assert run(*arguments) == 0
    answers = objects(capsys.readouterr().out)
    assert [(answer["index"], answer["id"]) for answer in answers] == [
        (0, "a"),
        (1, None),
        (2, 3),
        (3, None),
        (4, None),
    ]
    for index, (line, answer) in enumerate(zip(LINES, answers)):
        (expected,) = one_by_one(tiny, line, index)
        assert answer["token_ids"] == expected.token_ids
        assert (answer["text"], answer["stop_reason"]) == (expected.text, expected.stop_reason)
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (
            expected.prompt_tokens,
            expected.new_tokens,
        )
        assert len(answer["logprobs"]) == answer["new_tokens"]
    assert answers[2]["new_tokens"] == 3


def test_samples(tiny, tiny_directory, tmp_path, capsys):
    name = written(tmp_path / "in.jsonl", [{"prompt": "The cat"}, {"prompt": "dog", "seed": 9}])
    arguments = [
        "--input",
        name,
        "--max-new-tokens",
        6,
        "--temperature",
        1,
        "--samples",
        2,
        "--seed",
        3,
    ]
    assert run("--model", tiny_directory, *arguments) == 0
    answers = objects(capsys.readouterr().out)
    expected = [
        *generate(tiny, ["The cat"], max_new_tokens=6, temperature=1.0, samples=2, seed=3),
        *generate(tiny, ["dog"], max_new_tokens=6, temperature=1.0, samples=2, seed=9),
    ]
    assert [(answer["index"], answer["sample"]) for answer in answers] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [answer["token_ids"] for answer in answers] == [
        sequence.token_ids for sequence in expected
    ]


def test_prompts_as_messages(tiny, tiny_directory, tmp_path, capsys):
    """--chat and --system: a prompt is a user's message; messages that bring their own system
    message keep it.
    """
    system = {"role": "system", "content": "Own."}
    lines = [{"prompt": "Hi"}, {"messages": [system, {"role": "user", "content": "Hi"}]}]
    name = written(tmp_path / "in.jsonl", lines)
    common = ["--model", tiny_directory, "--input", name, "--max-new-tokens", 6]
    assert run(*common, "--chat", "--system", "Brief.") == 0
    texts = [answer["text"] for answer in objects(capsys.readouterr().out)]
    asked = [
        [{"role": "system", "content": words}, {"role": "user", "content": "Hi"}]
        for words in ("Brief.", "Own.")
    ]
    assert texts == [completion.text for completion in generate(tiny, asked, max_new_tokens=6)]


BAD = [
    ("{", "not JSON"),
    ("[1]", "[1] given; a JSON object expected"),
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "temprature": 1}', "key 'temprature' is unknown"),
    ('{"text": "a"}', "key 'text' is unknown"),
    ('{"id": 1}', "prompt or messages expected"),
    ('{"prompt": "a", "messages": []}', "prompt or messages expected, and one of them only"),
    ('{"prompt": 3}', "prompt: 3 given; text expected"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ('{"prompt": "a", "id": [1]}', "id: [1] given"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature: 'hot' given; a number expected"),
    ('{"prompt": "a", "temperature": NaN}', "temperature: nan given"),
    ('{"prompt": "a", "temperature": [1]}', "temperature: [1] given; a number expected"),
    ('{"prompt": "a", "top_k": 1.5}', "top_k: 1.5 given"),
    ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens: True given"),
    ('{"prompt": "a", "stop": [""]}', "stop: [''] given"),
    ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: {'x': 1} given"),
    ('{"prompt": "a", "logit_bias": {"1": null}}', "logit_bias: 1: None given"),
    ('{"messages": []}', "messages: [] given"),
    ('{"messages": [{"role": "user"}]}', "messages[0]: {'role': 'user'} given"),
    ('{"messages": [{"role": "king", "content": "a"}]}', "messages[0]: {'role': 'king'"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words[:24] for _, words in BAD])
def test_bad_lines_are_named_before_anything_is_loaded(line, words, tmp_path, capsys):
    """The model is not even there: nobody has looked for it."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + "\n")
    assert (
        run("--model", tmp_path / "none", "--input", path, "--output", tmp_path / "out.jsonl") == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}, line 3: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": ""}, "the prompt has 0 tokens; 1 to 50"),
        ({"prompt": "the " * 100}, "tokens; 1 to 50 (the model's context) expected"),
        ({"prompt": "a", "logit_bias": {"4000": 1}}, "logit_bias: token 4000 given"),
    ],
)
def test_what_the_model_cannot_take_is_named_before_anything_is_written(
    line, words, tiny_directory, tmp_path, capsys
):
    path = tmp_path / "in.jsonl"
    written(path, [{"prompt": "good"}, line])
    common = ["--model", tiny_directory, "--context", 50, "--input", path]
    assert run(*common, "--output", tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}, line 3: ")
    assert words in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"\n \n", "no requests found"), (b"\xff\n", "not UTF-8")],
)
def test_no_input(content, words, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert run("--model", tmp_path, "--input", path) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "words"),
    [("", "not a file"), ("no/out", "there is no directory"), ("in.jsonl", "line 1: written for")],
)
def test_no_output(output, words, tmp_path, capsys):
    name = written(tmp_path / "in.jsonl", LINES)
    before = (tmp_path / "in.jsonl").read_bytes()
    assert run("--model", tmp_path, "--input", name, "--output", tmp_path / output) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_going_on(tiny_directory, tmp_path, capsys):
    """From every whole line and from a torn one on, the same file; of another input, model or
    settings, nothing is touched.
    """
    name, out = written(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    common = ["--model", tiny_directory, "--input", name, "--output", out, "--batch-size", 2]
    assert run(*common, "--max-new-tokens", 6) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    zeros = b"\0" * 5000  # a file system may leave them after a loss of power
    for torn in (
        b"",
        lines[0],
        b"".join(lines[:2]) + lines[2][:30],
        b"".join(lines[:4]) + lines[4][:9] + zeros,
    ):
        out.write_bytes(torn)
        assert run(*common, "--max-new-tokens", 6) == 0
        assert out.read_bytes() == whole
    capsys.readouterr()
    assert run(*common, "--max-new-tokens", 6) == 0
    assert capsys.readouterr().err == f"{out}: all 5 requests are answered already\n"
    for other in (
        ["--max-new-tokens", 7],
        ["--max-new-tokens", 6, "--temperature", 1],
        ["--max-new-tokens", 6, "--samples", 2],
    ):
        assert run(*common, *other) == 2
        assert (
            "line 1: written for another input, another model or other settings"
            in capsys.readouterr().err
        )
    written(tmp_path / "in.jsonl", [*LINES[:2], {"prompt": "other"}])
    assert run(*common, "--max-new-tokens", 6) == 2
    assert "line 3: written for another input" in capsys.readouterr().err
    for foreign in (b"{}\n", b"my notes", b'{"id": "a", "index": 1'):
        out.write_bytes(lines[0] + foreign)
        assert run(*common, "--max-new-tokens", 6) == 2
        assert "line 2: written for another input" in capsys.readouterr().err
        assert out.read_bytes() == lines[0] + foreign


def test_killed_in_the_middle(tiny_directory, tmp_path):
    """kill -9, then the same command: the file of an undisturbed run."""
    name = written(
        tmp_path / "in.jsonl",
        [{"id": i, "prompt": "The cat " * (i % 7 + 1), "temperature": 1} for i in range(48)],
    )
    common = [
        "--model",
        tiny_directory,
        "--input",
        name,
        "--batch-size",
        2,
        "--max-new-tokens",
        150,
    ]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*common, "--output", whole) == 0
    command = [sys.executable, INFER, *map(str, common), "--output", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | KEEP
    ) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = out.read_bytes()
    assert 0 < len(killed) < len(whole.read_bytes())
    assert run(*common, "--output", out) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_pipes(tiny_directory, monkeypatch, capfd):
    """Standard output, of libraries too, holds JSON and nothing else; standard error tells the
    rest.
    """
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in LINES[:2])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    with os.fdopen(os.dup(1), "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert (
            run("--model", tiny_directory, "--input", "-", "--output", "-", "--max-new-tokens", 12)
            == 0
        )
    out, err = capfd.readouterr()
    assert [answer["index"] for answer in objects(out)] == [0, 1]
    assert "programs compiled" in err.splitlines()[-1]


def test_two_processes_do_not_write_one_file(tiny_directory, tmp_path, capsys):
    import fcntl

    name, out = written(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out.jsonl"
    out.touch()
    with out.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run("--model", tiny_directory, "--input", name, "--output", out) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert os.stat(out).st_size == 0


@pytest.mark.parametrize("done", [0, 3, 11])
def test_batches(done):
    """Every request that is not answered yet, in batches that do not depend on what is, of like
    limits, sorted by length.
    """
    requests = [
        Request(i, i + 1, None, "", {"max_new_tokens": 5 + 3 * (i % 2)}, 0, "") for i in range(40)
    ]
    lengths = [(7 * i) % 40 for i in range(40)]
    found = list(batches(Job(requests, 1, None, 2, done), lengths))
    every = list(batches(Job(requests, 1, None, 2, 0), lengths))
    assert found == [batch for batch in every if any(request.number >= done for request in batch)]
    assert sorted(request.number for batch in every for request in batch) == list(range(40))
    assert all(
        len({request.settings["max_new_tokens"] for request in batch}) == 1 for batch in every
    )
    assert all(request.number < 16 for batch in every[:8] for request in batch)
    first = [lengths[request.number] for batch in every[:4] for request in batch]
    assert first == sorted(first)


def test_limits_of_their_own_fill_batches():
    """Forty requests with forty limits are ten batches of four, not forty of one."""
    requests = [Request(i, i + 1, None, "", {"max_new_tokens": 64 + i}, 0, "") for i in range(40)]
    assert [len(batch) for batch in batches(Job(requests, 1, None, 4, 0), [9] * 40)] == [4] * 10
    settings = batch_settings(
        [request._replace(settings={**OWN, **request.settings}) for request in requests[:2]], 2
    )
    assert settings["max_new_tokens"] == [64, 64, 65, 65]


def test_an_output_of_other_weights_is_not_continued(tiny_directory, tmp_path, capsys):
    """Two models of one name, a template that was edited, drafting where there was none: each is
    another output.
    """
    name = written(tmp_path / "in.jsonl", [{"prompt": "The cat"}, {"prompt": "dog"}])
    models = [shutil.copytree(tiny_directory, tmp_path / place / "m") for place in "ab"]
    weights = models[1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a bit of one weight
    weights.write_bytes(content)
    template, output = tmp_path / "t.jinja", tmp_path / "out.jsonl"
    template.write_text("{{ messages[0].content }}")
    common = [
        "--input",
        name,
        "--output",
        output,
        "--max-new-tokens",
        3,
        "--chat",
        "--chat-template",
        template,
    ]
    assert run("--model", models[0], *common) == 0
    output.write_bytes(
        output.read_bytes().splitlines(keepends=True)[0]
    )  # interrupted after one answer
    torn = output.read_bytes()
    capsys.readouterr()
    for changed in (["--model", models[1]], ["--model", models[0], "--speculate", 2]):
        assert run(*changed, *common) == 2
        assert (
            "line 1: written for another input, another model or other settings"
            in capsys.readouterr().err
        )
    template.write_text("{{ messages[0].content }}!")
    assert run("--model", models[0], *common) == 2
    template.write_text("{{ messages[0].content }}")
    assert output.read_bytes() == torn
    assert run("--model", models[0], *common) == 0
    assert len(objects(output.read_text())) == 2


def test_penalties_of_a_request_and_guessing(tiny_directory, tmp_path, capsys):
    """Refused before anything is written, by its line."""
    name = written(
        tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "repetition_penalty": 1.2}]
    )
    output = tmp_path / "out.jsonl"
    assert (
        run("--model", tiny_directory, "--input", name, "--output", output, "--speculate", 4) == 2
    )
    assert f"{name}, line 3: a penalty given with --speculate" in capsys.readouterr().err
    assert not output.exists()


def test_logits_that_are_no_numbers_name_their_line(tiny, tiny_directory, tmp_path, capsys):
    """A damaged weight that only some prompts meet: what was answered before it stays, and the
    status is 2.
    """
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_directory, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.embed_tokens.weight"][tiny.tokenizer.encode("x")[0]] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    lines = written(tmp_path / "in.jsonl", [{"prompt": "The cat", "stop": "x"}, {"prompt": "ax"}])
    common = [
        "--input",
        lines,
        "--max-new-tokens",
        3,
        "--logit-bias",
        f"{tiny.tokenizer.encode('a')[0]}=1000",
    ]
    assert (
        run("--model", damaged, *common, "--batch-size", 1, "--output", tmp_path / "out.jsonl") == 2
    )
    assert [answer["text"] for answer in objects((tmp_path / "out.jsonl").read_text())] == ["aaa"]
    assert (
        "line 3 of the input: sequence 1: logits that are NaN or infinite computed for new token 1"
        in capsys.readouterr().err
    )
