"""Disks that are full, files that are damaged, processes that die in the middle of a save."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest
from faults.child import flip_bit
from faults.harness import ROOT, assert_bitwise, checkpoint_steps, copy_run, make_run

from llama_jax.weights.run import RUN_CHECKPOINTS


def entries(config) -> set[str]:
    """What lies in the directory of a run's checkpoints."""
    return {path.name for path in (pathlib.Path(config.run.dir) / RUN_CHECKPOINTS).iterdir()}


@pytest.mark.parametrize(
    ("point", "left", "goes_on"),
    [("in_async_commit", {4}, 4), ("after_commit_before_gc", {4, 8}, 8)],
)
def test_killed_in_the_middle_of_a_save(spawn, tmp_path, corpus, reference, point, left, goes_on):
    """4: between data and commit the older step counts, between commit and clean-up the newer;
    nothing is left lying about.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"keep_checkpoints": 1})
    # The next update waits for the save, which would otherwise be overtaken by the end of the run.
    assert spawn.train(run, fault=f"{point}:8:kill9,in_data:9:slow=30").end() == -signal.SIGKILL
    assert set(checkpoint_steps(run)) == left
    spawn.train(run).expect(0).wait_for(f"resumed from step {goes_on}$")
    assert_bitwise(run, reference)
    assert entries(run) == {"12"}


def warnings(output: str) -> list[tuple[int, str]]:
    """Steps and reasons of saves that failed, in the order in which they are told."""
    found = re.findall(
        r"^warning: checkpoint \S+/(\d+) was not written: ([\w ]+)", output, re.MULTILINE
    )
    return [(int(step), reason.strip()) for step, reason in found]


def test_a_disk_that_is_full_for_a_while(spawn, tmp_path, corpus, reference):
    """11: told within a step, tried again at the next, nothing older lost, and the run ends as one
    that always had room.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"keep_checkpoints": 9})
    fault = "in_data:8:settled,in_data:8:full=20000,in_data:9:settled,in_data:10:space"
    child = spawn.train(run, fault=fault).expect(0)
    assert warnings(child.output) == [(8, "File too large")]
    assert child.output.index("/8 was not written") < child.output.index("\n10/12 ")
    assert checkpoint_steps(run) == [4, 10, 12]
    assert re.search(r"checkpoints +1 could not be written$", child.output, re.MULTILINE)
    assert_bitwise(run, reference)


def test_a_disk_that_stays_full(spawn, tmp_path, corpus, reference):
    """11: training goes on to its end, which is no success; the older checkpoint is untouched and
    gone on with.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"keep_checkpoints": 1})
    fault = "in_data:6:settled,in_data:6:full=20000,in_data:9:settled,in_data:11:settled"
    child = spawn.train(run, fault=fault).expect(5)
    steps = [step for step, _ in warnings(child.output)]
    assert steps == [
        8,
        10,
        12,
        12,
    ]  # known at 9, tried at 10, known at 11, tried at the end and once more
    assert "the last among them" in child.output
    assert [reason for _, reason in warnings(child.output)] == ["File too large"] * 4
    assert "Traceback" not in child.errors
    assert checkpoint_steps(run) == [4]
    spawn.train(run).expect(0).wait_for("resumed from step 4$")
    assert_bitwise(run, reference)


def test_all_checkpoints_damaged(spawn, tmp_path, reference):
    """16: an error that says so, and no training from the start."""
    run = copy_run(reference, tmp_path / "run")
    for step in checkpoint_steps(run):
        flip_bit(pathlib.Path(run.run.dir) / RUN_CHECKPOINTS / str(step))
    before = entries(run)
    child = spawn.train(run, more=["--run.steps", "20"]).expect(5)
    assert re.search(
        r"^error: .*all checkpoints are damaged .*; bring back a copy or start another run$",
        child.errors,
        re.M,
    )
    assert entries(run) == before
    assert not re.search(r"^ *\d+/20", child.output, re.MULTILINE)


def test_a_bit_flipped_while_nobody_looked(spawn, tmp_path, reference):
    """13: damage is told, the checkpoint set aside, and the steps are done again, to the same
    bits.
    """
    run = copy_run(reference, tmp_path / "run")
    damaged = pathlib.Path(run.run.dir) / RUN_CHECKPOINTS / "12"
    flip_bit(damaged)
    child = spawn.train(run, more=["--run.steps", "13"])
    child.expect(0).wait_for(
        r"^warning: checkpoint .*/12.* is damaged: .*; passed over for an older checkpoint$"
    )
    child.wait_for("resumed from step 8$")
    assert "12.corrupt" in entries(run)
    assert checkpoint_steps(run)[-2:] == [12, 13]


def test_a_thread_that_waits_for_ever_does_not_keep_the_program():
    """11: as one of a save that has failed may."""
    wait = "threading.Thread(target=threading.Event().wait).start()"
    code = (
        f"import threading; from llama_jax.cli.train import end_within; {wait}; end_within(0.5, 5)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 5
