"""Which states are saved when some saves fail: told at once, tried again after 1, 2, 4 ... steps,
and at the end.
"""

import collections
import pathlib

import jax.numpy as jnp
import pytest

from llama_jax.training import checkpointing as saving
from llama_jax.training.checkpointing import Saver
from llama_jax.training.step import TrainState
from llama_jax.weights.checkpoint import Checkpoints, SaveError

STATE = TrainState(None, {"w": jnp.zeros((10, 10))}, None, None)  # 400 bytes


class Disk(Checkpoints):
    """Checkpoints on a disk that takes none while it is full; a failure shows at the start or at
    the next look.
    """

    def __init__(self, full: range, late: bool) -> None:
        self.full, self.late, self.failed = full, late, None
        self.tried, self.kept = [], []

    def save(self, step, state, metadata):
        self.tried.append(step)
        if step not in self.full:
            return self.kept.append(step)
        self.failed = step
        return None if self.late else self.poll()

    def poll(self):
        step, self.failed = self.failed, None
        if step is not None:
            raise SaveError(f"checkpoint {step} was not written: full")

    def wait(self):
        self.poll()

    def steps(self):
        return self.kept


def run(disk: Disk, steps: int, every: int, directory=pathlib.Path("/")) -> tuple[Saver, list[str]]:
    """The loop, as far as saves go."""
    lines: list[str] = []
    saver = Saver(disk, directory, every, dict, lines.append)
    for step in range(1, steps + 1):
        if saver.due(step) or step == steps:
            saver.save(step, STATE)
    saver.finish(steps, STATE)
    return saver, [line for line in lines if "was not written" in line]


@pytest.mark.parametrize("late", [False, True])
def test_every_save_that_goes_well_is_made_once(late):
    disk = Disk(range(0), late)
    saver, lines = run(disk, 12, 5)
    assert disk.tried == disk.kept == [5, 10, 12]
    assert (saver.failures, lines) == (0, [])


@pytest.mark.parametrize(
    ("late", "tried"), [(False, [10, 11, 13, 17, 20, 30, 40]), (True, [10, 12, 15, 20, 30, 40])]
)
def test_a_failed_save_is_tried_again(late, tried):
    """At once told means after 1, 2, 4 steps; a failure in the background is known a step later."""
    disk = Disk(range(10, 17), late)
    saver, lines = run(disk, 40, 10)
    assert disk.tried == tried
    assert disk.kept == [step for step in tried if step not in disk.full]
    assert saver.failures == len(lines) == len([step for step in tried if step in disk.full])
    assert lines[0] == "warning: checkpoint 10 was not written: full"
    assert lines[1].endswith("full (2 consecutive failures)")


def test_after_a_success_it_counts_from_one_again():
    disk = Disk(range(10, 12), late=False)
    disk.full = [10, 11, 30]
    saver, lines = run(disk, 40, 10)
    assert disk.tried == [10, 11, 13, 20, 30, 31, 40]
    assert "in a row" not in lines[-1]
    assert saver.failures == 3


@pytest.mark.parametrize("late", [False, True])
def test_the_last_state_is_tried_twice(late):
    disk = Disk(range(9, 100), late)
    _, lines = run(disk, 9, 10)
    assert disk.tried == [9, 9]
    assert len(lines) == 2
    assert disk.kept == []


def test_several_hosts_save_in_step(monkeypatch):
    """One host's failure is not known to the others, and a save needs all: it is tried again when
    it is due for all.
    """
    monkeypatch.setattr(saving.jax, "process_count", lambda: 2)
    disk = Disk(range(10, 20), late=True)
    run(disk, 30, 10)
    assert disk.tried == [10, 20, 30]


@pytest.mark.parametrize(("free", "warned"), [(881, False), (879, True)])
def test_too_little_room_is_told_before_the_first_save(tmp_path, monkeypatch, free, warned):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    told = []
    disk = Disk(range(0), late=False)
    saver = Saver(disk, tmp_path, 1, dict, lambda line: told.append((line, list(disk.tried))))
    for step in (1, 2):
        saver.save(step, STATE)
    assert len(told) == warned
    if warned:
        ((line, tried),) = told
        assert tried == []
        assert line.startswith(f"warning: {tmp_path}: 0.00 GB free, a checkpoint has 0.00 GB")
