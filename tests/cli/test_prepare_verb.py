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


def start(*arguments):
    command = [sys.executable, "-m", "llama_jax", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    return [int(word) for word in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path, lines, tiny_directory, capsys):
    options = ["--input", lines, "--tokenizer", tiny_directory, "--shard-tokens", "100k", "--workers", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with start("prepare", *options, "--output", killed) as process:
        while not list(killed.glob("train-*.tokens")):
            time.sleep(0.05)
            assert process.poll() is None
        children = children_of(process)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 300
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    assert not any(os.path.exists(f"/proc/{child}") for child in children)  # workers end with the process that started them
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
    with start("prepare", "--input", lines, "--tokenizer", tiny_directory, "--shard-tokens", "100k", "--workers", "2",
               "--output", tmp_path / "out") as process:  # fmt: skip
        while not list((tmp_path / "out").glob("train-*.tokens")):
            time.sleep(0.05)
        children = children_of(process)
        os.kill(children[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "ended without a word" in errors
    assert not (tmp_path / "out" / "manifest.json").exists()
