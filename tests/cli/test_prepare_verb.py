"""`prepare` and `data verify` as processes: what they print, exit codes, kill -9."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import ROOT, child_environment

from llama_jax.cli.main import run_verb
from llama_jax.cli.prepare import main, read_fields
from llama_jax.data.token_set import TokenSet
from llama_jax.errors import InputError

PUBLISHED = {
    "ShareGPT": [
        {
            "conversations": [
                {"from": "human", "value": f"q{i}"},
                {"from": "gpt", "value": f"a{i}"},
            ],
            "id": i,
        }
        for i in range(30)
    ],
    "Alpaca": [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(30)],
    "OpenAI": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": f"q{i}"}]},
                {"role": "assistant", "content": f"a{i}", "weight": 1},
            ]
        }
        for i in range(30)
    ],
    "renamed": [{"question": f"q{i}", "answer": f"a{i}"} for i in range(30)],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_conversations_become_the_same_tokens(tmp_path, tiny_directory, name, capsys):
    """Four forms of 30 records, one of them beside files that are left out: the tokens and masks of
    all are the same.
    """
    plain = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(30)]
    values = {"plain": plain, "other": PUBLISHED[name]}
    for folder, records in values.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps(records))
    (tmp_path / "other" / "notes.pdf").write_text("no")
    fields = (
        ["--field", "prompt=question", "--field", "completion=answer"] if name == "renamed" else []
    )
    for folder in values:
        command = [
            "--input",
            tmp_path / folder,
            "--output",
            tmp_path / f"{folder}.out",
            "--tokenizer",
            tiny_directory,
            "--workers",
            "1",
            "--held-out",
            "0.2",
            *(fields if folder == "other" else []),
        ]
        assert main([*map(str, command)]) == 0
    out, err = capsys.readouterr()
    assert out.count(": chat, 30 documents") == 2
    assert err.splitlines() == ["--input: left out, of unknown kind: notes.pdf (files: 1)"]
    for part in ("train", "held_out"):
        ours, theirs = (
            getattr(TokenSet.open(tmp_path / f"{folder}.out"), part) for folder in values
        )
        for mine, other in zip(ours.read(0, ours.size), theirs.read(0, theirs.size)):
            assert mine.tolist() == other.tolist()


@pytest.mark.parametrize("given", [["text"], ["text="], ["txt=body"], ["text=a", "text=b"]])
def test_wrong_fields_are_named(given):
    with pytest.raises(
        InputError,
        match=f"--field: '{given[-1]}' given, FIELD=NAME expected, once a field, of text, messages",
    ):
        read_fields(given)


def start(*arguments):
    command = [sys.executable, "-m", "llama_jax", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, status=0):
    with start(*arguments) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == status, output + errors
    return output, errors


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    source = random.Random(0)
    path = tmp_path_factory.mktemp("input") / "many.jsonl"
    texts = (" ".join(source.choices(["alpha", "beta", "gamma"], k=200)) for _ in range(3000))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def children_of(process):
    return [
        int(word)
        for word in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        .read_text()
        .split()
    ]


def test_documents_are_shown_with_their_masks(tmp_path, tiny_directory, capsys):
    path = tmp_path / "a.jsonl"
    talk = [("a", "one"), ("b", "two")]
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in talk))
    words = ["--input", path, "--tokenizer", tiny_directory, "--output", tmp_path / "out"]
    assert run_verb(["prepare", *map(str, words), "--held-out", "0", "--workers", "1"]) == 0
    capsys.readouterr()
    assert run_verb(["data", "show", str(tmp_path / "out"), "--first", "1"]) == 0
    first, *text = capsys.readouterr().out.splitlines()
    assert first.startswith("document 1: ")
    assert "\n".join(text) == (
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n"
    )
    words[-1] = tmp_path / "shards"  # one document in each
    given = [*map(str, words), "--shard-tokens", "1", "--held-out", "0", "--workers", "1"]
    assert run_verb(["prepare", *given]) == 0
    assert "shards: 2;" in capsys.readouterr().out
    assert run_verb(["data", "show", str(tmp_path / "shards")]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("document")] == [
        first.replace("1:", "0:", 1),
        first,
    ]
    with pytest.raises(InputError, match="documents from 0 to 1"):
        run_verb(["data", "show", str(tmp_path / "out"), "--first", "2"])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path, lines, tiny_directory, capsys):
    options = [
        "--input",
        lines,
        "--tokenizer",
        tiny_directory,
        "--shard-tokens",
        "100k",
        "--workers",
        "2",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with start("prepare", *options, "--output", killed) as process:
        while not list(killed.glob("parts/*/*.json")):
            time.sleep(0.05)
            assert process.poll() is None
        children = children_of(process)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 300
    while (
        any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert children
    assert not any(
        os.path.exists(f"/proc/{child}") for child in children
    )  # workers end with the process that started them
    assert not (killed / "manifest.json").exists()
    output, errors = run("prepare", *options, "--output", killed)
    assert "of them from before" in output
    assert "encoding:" in errors
    run("prepare", *options, "--output", whole)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in names:
        if name != "tokenizer":
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert run_verb(["data", "verify", str(whole)]) == 0
    assert capsys.readouterr().out.startswith(f"{whole}: whole; 3,000 documents")
    path = whole / "train-00001.tokens"
    content = bytearray(path.read_bytes())
    content[5000] ^= 8
    path.write_bytes(content)
    assert "train-00001.tokens" in run("data", "verify", whole, status=5)[1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_worker_that_dies_is_an_error(tmp_path, lines, tiny_directory):
    with start(
        "prepare",
        "--input",
        lines,
        "--tokenizer",
        tiny_directory,
        "--shard-tokens",
        "100k",
        "--workers",
        "2",
        "--output",
        tmp_path / "out",
    ) as process:
        while not list((tmp_path / "out").glob("parts/*/*.json")):
            time.sleep(0.05)
        children = children_of(process)
        os.kill(children[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "ended without an error" in errors
    assert not (tmp_path / "out" / "manifest.json").exists()
