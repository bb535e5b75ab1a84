"""What a run is surrounded by: no network, strange terminals, text that ends."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from faults.harness import CHILD, ROOT, assert_bitwise, checkpoint_steps, config_file, make_run
from tiny_runs import child_environment, read_lines, read_state, state_bytes

from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup
from llama_jax.training.display import PlainDisplay
from llama_jax.training.loop import prepare


def test_without_a_network(spawn, run, reference):
    """38: training and generating ask for no network: there is none."""
    child = spawn.train(run, LLAMA_JAX_NO_NETWORK="1").expect(0)
    assert_bitwise(run, reference)
    words = [
        "infer",
        "--model",
        run.run.dir,
        "--prompt",
        "<1>",
        "--max-new-tokens",
        "4",
        "--temperature",
        "0",
    ]
    infer = spawn(words, LLAMA_JAX_NO_NETWORK="1").expect(0)
    for one in (child, infer):
        assert "no network" in one.errors
        assert "was asked for" not in one.errors


def run_child(config, stdout, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CHILD), "train", "--config", str(config_file(config))]
    variables = child_environment() | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command, env=variables, stdout=stdout, stderr=subprocess.PIPE, timeout=300
    )


def test_a_terminal_of_another_age(run):
    """40: an ASCII locale and twenty columns: nothing that cannot be shown, no control codes."""
    done = run_child(
        run,
        subprocess.PIPE,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONIOENCODING="ascii",
        TERM="dumb",
        COLUMNS="20",
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rb"[\n\x20-\x7e]*", done.stdout)
    assert b"12/12" in done.stdout


def test_no_standard_output_at_all(run, reference):
    """40: started with its output closed, as by `>&-`, a run trains as ever."""
    script = f'exec "{sys.executable}" "{CHILD}" train --config "{config_file(run)}" >&-'
    variables = child_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], env=variables, stderr=subprocess.PIPE, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert_bitwise(run, reference)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


def in_process(config, stop_at: int = 0) -> None:
    with open(os.devnull, "w") as nowhere:
        prepare(config, PlainDisplay(nowhere)).train(lambda step: step == stop_at)


@pytest.mark.usefixtures("one_device")
def test_ends_that_fall_together(run, tmp_path, corpus, reference):
    """27: stopped at the end of an epoch, ended at a step that no interval has: each state is saved
    once, no sequence is lost.
    """
    sequences, batch = (
        prepare(run, PlainDisplay(sys.stdout)).batches.sources[0].packing.count,
        run.data.batch_size,
    )
    epoch = sequences // batch
    steps = epoch + 3
    changes = {"steps": steps, "checkpoint_every": epoch, "keep_checkpoints": 9}
    runs = [
        make_run(tmp_path / name, corpus, reference, run=changes)
        for name in ("straight", "stopped")
    ]
    in_process(runs[0])
    in_process(runs[1], stop_at=epoch)
    in_process(runs[1])
    for config in runs:
        assert checkpoint_steps(config) == [epoch, steps]
        lines = read_lines(pathlib.Path(config.run.dir))
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert lines[-1]["train/tokens"] == steps * batch * run.data.length
    straight, stopped = (state_bytes(read_state(config, steps)) for config in runs)
    assert straight == stopped


@pytest.mark.usefixtures("one_device")
def test_no_array_moves_unasked(run, monkeypatch):
    """45: between the first and the last step nothing goes to or comes from the device but what the
    loop says.
    """
    from llama_jax.training import loop

    sharded_step = loop.sharded_step
    monkeypatch.setattr(loop, "sharded_step", lambda *given: guarded(sharded_step(*given)))
    calls = []

    def guarded(program):
        def call(*given):
            calls.append(1)
            with jax.transfer_guard("disallow"):
                return program(*given)

        return call

    with jax.checking_leaks():
        in_process(run)
    assert len(calls) == run.run.steps
