"""`checkpoint list` and `checkpoint verify`: what they find of what was done to a directory."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.cli.checkpoint import main
from llama_jax.cli.main import run_program
from llama_jax.training.step import TrainState, fresh_guard
from llama_jax.weights.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints 10, 20 and 30; only to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    rng = np.random.default_rng(0)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
        "norm": {"scale": jnp.ones(8, jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    with Checkpoints.open(directory / "checkpoints", keep=9) as checkpoints:
        for step in (10, 20, 30):
            state = TrainState(jnp.int32(step), params, optimizer, fresh_guard())
            checkpoints.save(step, state, {})
            checkpoints.wait()
    return directory


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def flip_weights(checkpoint: pathlib.Path) -> None:
    for path in checkpoint.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def verb(capsys, *words) -> tuple[int, str, str]:
    status = run_program(lambda: main([str(word) for word in words]))
    return status, *capsys.readouterr()


def objects(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_whole_ones(run, capsys):
    status, output, errors = verb(capsys, "verify", run, "--json")
    assert (status, errors) == (0, "")
    assert [(one["step"], one["condition"], one["reason"]) for one in objects(output)] == [
        (s, "ok", "") for s in (10, 20, 30)
    ]
    for one in objects(output):
        files = [
            path for path in (run / "checkpoints" / str(one["step"])).rglob("*") if path.is_file()
        ]
        assert one["nbytes"] == sum(path.stat().st_size for path in files)
        assert one["time"] == max(path.stat().st_mtime for path in files)


def test_a_flipped_bit_is_found_by_verify_alone(run, capsys):
    flip_weights(run / "checkpoints" / "20")
    status, output, _ = verb(capsys, "list", run, "--json")
    assert status == 0
    assert [one["condition"] for one in objects(output)] == ["committed"] * 3
    status, output, _ = verb(capsys, "verify", run, "--json")
    assert status == 5
    assert [one["condition"] for one in objects(output)] == ["ok", "damaged", "ok"]
    assert "checkpoints/20" in objects(output)[1]["reason"]
    assert verb(capsys, "verify", run, "--step", 20)[0] == 5
    assert verb(capsys, "verify", run, "--step", 30)[0] == 0


def test_what_else_lies_there(run, capsys):
    checkpoints = run / "checkpoints"
    (checkpoints / "10").rename(checkpoints / "10.corrupt")
    (checkpoints / "20" / "meta" / "metadata").write_text("{")
    (checkpoints / "40.orbax-checkpoint-tmp-1").mkdir()
    (checkpoints / "50" / "default").mkdir(parents=True)
    (checkpoints / "notes").mkdir()
    before = sorted(run.rglob("*"))
    status, output, _ = verb(capsys, "list", run)
    assert status == 5
    rows = [line.split(None, 4) for line in output.splitlines()[1:]]
    assert [(row[0], row[1] + row[2]) for row in rows][3:] == [("40", "0.00MB"), ("50", "0.00MB")]
    conditions = [line.split(":", 2)[2][4:] for line in output.splitlines()[1:]]
    assert conditions[0] == "set aside (10.corrupt)"
    assert conditions[1].startswith("damaged: ")
    assert "not JSON" in conditions[1]
    assert conditions[2:] == [
        "committed",
        "not committed (40.orbax-checkpoint-tmp-1)",
        "not committed",
    ]
    assert sorted(run.rglob("*")) == before


def test_large_arrays_are_read_in_parts(run, capsys, monkeypatch):
    from llama_jax.weights import restore as checkpoint_check

    monkeypatch.setattr(checkpoint_check, "_TOGETHER", 1)
    assert verb(capsys, "verify", run)[0] == 0
    flip_weights(run / "checkpoints" / "10")
    assert verb(capsys, "verify", run)[0] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "RUN", "--step", "7"), "--step: 7 given, one of [10, 20, 30] expected"),
        (
            ("list", "/nowhere"),
            "/nowhere/checkpoints: no such directory; a run with checkpoints expected",
        ),
        (("prove", "RUN"), "checkpoint 'prove' given; list or verify expected"),
        ((), "list or verify expected"),
        (("list", "RUN", "--steps", "1"), "--steps"),
    ],
)
def test_wrong_use_is_one_line(run, capsys, words, message):
    status, output, errors = verb(capsys, *(str(run) if word == "RUN" else word for word in words))
    assert (status, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_an_empty_directory(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert verb(capsys, "list", tmp_path)[:2] == (
        0,
        "      step        size  written              state\n",
    )
    assert "no checkpoint there" in verb(capsys, "verify", tmp_path)[2]


def test_as_a_process(run):
    command = [sys.executable, "-m", "llama_jax", "checkpoint", "verify", str(run)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["state", "ok", "ok", "ok"]
