"""A run that is interrupted and gone on with ends in the very bits of one that was not."""

import pathlib
import random
import re
import signal
import time

import numpy as np
import pytest
from faults.harness import (
    STEPS,
    Child,
    assert_bitwise,
    checkpoint_steps,
    copy_run,
    make_run,
    metrics,
)

from llama_jax.weights.restore import verify_checkpoints
from llama_jax.weights.run import RUN_CHECKPOINTS


def assert_whole(config) -> None:
    """Every checkpoint of a run, wherever it was interrupted, is what was saved."""
    found = list(verify_checkpoints(pathlib.Path(config.run.dir) / RUN_CHECKPOINTS))
    assert [state.condition for state in found] == ["ok"] * len(found)


def test_sigterm_and_the_same_command_again(spawn, run, reference):
    """1, 5: SIGTERM in step 6 saves step 6 and exits 0; another process ends in the same bits,
    losses, rates and tokens.
    """
    child = spawn.train(run, fault="in_data:6:term").expect(0)
    assert "SIGTERM: saving after this step; Ctrl-C within 5 s ends at once" in child.errors
    assert checkpoint_steps(run)[-1] == 6
    spawn.train(run).expect(0).wait_for("resumed from step 6")
    assert_bitwise(run, reference)


def test_with_everything_that_has_a_state(spawn, tmp_path, corpus, reference):
    """2: the same with accumulation, dropout, bfloat16 and data that are left out."""
    changes = {
        "run": {"steps": 8, "checkpoint_every": 3, "init": reference.run.dir},
        "data": {"accumulation": 4, "skip_steps": ((2, 3), (6, 6))},
        "compute": {"dtype": "bfloat16"},
        "adapter": {"rank": 2, "dropout": 0.3},
    }
    runs = [make_run(tmp_path / name, corpus, **changes) for name in ("straight", "stopped")]
    spawn.train(runs[0]).expect(0)
    spawn.train(runs[1], fault="in_data:5:term").expect(0)
    spawn.train(runs[1]).expect(0).wait_for("resumed from step 5")
    assert_bitwise(runs[1], runs[0])


@pytest.mark.timeout(1200)
def test_kill_9_at_random_moments(spawn, tmp_path, corpus, reference):
    """3: killed three times while checkpoints are written one after the other: all that are listed
    are whole.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    source = random.Random(seed)
    run = make_run(tmp_path / "run", corpus, reference, run={"checkpoint_every": 1})
    for _ in range(3):
        child = spawn.train(run, fault="before_update:*:slow=0.1")
        first = int(child.wait_for(r"resumed from step (\d+)|from the start")[1] or 0)
        if first < STEPS - 2:
            child.wait_for(rf"^ *{first + 1}/")
        time.sleep(source.random() * 0.15)
        child.kill()
        if checkpoint_steps(run):
            assert_whole(run)
    spawn.train(run).expect(0)
    assert_bitwise(run, reference)


def test_ctrl_c_once_and_twice(spawn, run, reference):
    """7: the first Ctrl-C saves and exits 0; the second, before that is done, ends at once with
    130.
    """
    twice = spawn.train(run, fault="in_data:5:int,before_update:5:int").expect(130)
    assert "Traceback" not in twice.errors
    assert checkpoint_steps(run) == [4]
    spawn.train(run, fault="in_data:7:int").expect(0)
    assert checkpoint_steps(run) == [4, 7]
    spawn.train(run).expect(0)
    assert_bitwise(run, reference)


MESHES = [(2, (2, 1, 1, 1)), (8, (2, 2, 2, 1)), (8, (2, 1, 2, 2))]


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, corpus, reference):
    """The run stopped at step 6, and the hashes of the batches that are left; only to be copied."""
    from faults.harness import spawner

    directory = tmp_path_factory.mktemp("stopped")
    config = make_run(directory / "run", corpus, reference)
    with spawner(directory) as children:
        children.train(config, fault="in_data:6:term").expect(0)
        whole = copy_run(config, directory / "whole")
        return config, batches(children.train(whole, fault="in_data:*:hash").expect(0))


def batches(child: Child) -> list[str]:
    return re.findall(r"^hash (\w+)$", child.errors, re.MULTILINE)


@pytest.mark.parametrize(("devices", "mesh"), MESHES, ids=["2-data", "8-all", "8-context"])
def test_going_on_with_another_mesh(spawn, tmp_path, reference, stopped, devices, mesh):
    """19: on 2 and 8 devices and other axes of the mesh: the state is verified, batches are the
    same, losses to 1e-5.
    """
    config, expected = stopped
    run = copy_run(config, tmp_path / "run")
    axes = [
        f"--mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor", "context"), mesh)
    ]
    child = spawn.train(run, fault="in_data:*:hash", devices=devices, more=axes).expect(0)
    child.wait_for("resumed from step 6")
    assert len(expected) == STEPS - 6
    assert batches(child) == expected
    losses, straight = ([line["train/loss"] for line in metrics(c)] for c in (run, reference))
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, straight, rtol=1e-5)
    assert_whole(run)


def test_two_runs_in_a_directory(spawn, run, reference):
    """20: the second is refused; after kill -9 of the first, nothing holds the directory any
    more.
    """
    first = spawn.train(run, fault="before_update:3:hang")
    first.wait_for(r"^ *2/")
    second = spawn.train(run).expect(2)
    assert re.search(r"^error: run\.dir: another process trains in ", second.errors, re.MULTILINE)
    first.send(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    spawn.train(run).expect(0)
    assert_bitwise(run, reference)
