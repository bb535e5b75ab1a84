"""A run that stands still."""

import json
import pathlib
import re
import time

from faults.harness import assert_bitwise, checkpoint_steps, make_run


def test_data_that_never_comes(spawn, tmp_path, corpus, reference):
    """10: all stacks on standard error and in a file, exit 3 within the limit, and the run can be
    gone on with.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"hang_seconds": 3.0})
    child = spawn.train(run, fault="in_data:6:hang")
    child.wait_for("fault: in_data 6 hang")
    began = time.monotonic()
    child.expect(3)
    assert (
        time.monotonic() - began > 1
    )  # ten updates of a busy machine may be longer than the limit
    line = r"error: the run has stood still for \d+ s in data \(step 5 was the last; at most \d+ s, run\.hang_seconds 3\)"
    stacks = pathlib.Path(run.run.dir, "hang.txt").read_text()
    for text in (child.errors, stacks):
        assert re.search(line, text)
        assert "in _hang" in text  # where the loop stands
        assert "in look" in text  # and who looked: all threads
    heartbeat = json.loads(pathlib.Path(run.run.dir, "heartbeat.json").read_text())
    assert heartbeat["step"] >= 1
    assert heartbeat["loss"] > 1
    assert abs(heartbeat["time"] - time.time()) < 600
    assert checkpoint_steps(run) == [4]
    spawn.train(run).expect(0).wait_for("resumed from step 4$")
    assert_bitwise(run, reference)
    assert json.loads(pathlib.Path(run.run.dir, "heartbeat.json").read_text())["step"] == 12


def test_what_takes_long_is_no_hang(spawn, tmp_path, corpus, reference):
    """10: the other way round: an evaluation longer than the limit, which has an allowance of its
    own.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"hang_seconds": 3.0})
    spawn.train(run, fault="in_eval:12:slow=5").expect(0)


def test_an_evaluation_longer_than_any_allowance(spawn, tmp_path, corpus, reference):
    """10: every batch of it comes; the run ends well, with its last checkpoint, which is there
    before the evaluation is.
    """
    run = make_run(tmp_path / "run", corpus, reference, run={"hang_seconds": 1.0})
    child = spawn.train(run, fault="in_eval_batch:12-12:slow=2.5")
    child.wait_for("fault: in_eval_batch 12 slow")
    began = time.monotonic()
    child.expect(0)
    assert time.monotonic() - began > 12  # times the limit
    assert checkpoint_steps(run)[-1] == 12
    assert re.search(r"^held-out  .* nats/token, .* bits/byte", child.output, re.MULTILINE)


def test_killed_in_its_evaluation_a_run_has_the_checkpoint_of_that_step(
    spawn, tmp_path, corpus, reference
):
    """10: so that it does not begin again before it for ever."""
    run = make_run(tmp_path / "run", corpus, reference, run={"eval_every": 8})
    spawn.train(run, fault="in_eval_batch:8:settled,in_eval_batch:8:kill9").expect(-9)
    assert checkpoint_steps(run) == [4, 8]
    spawn.train(run).expect(0).wait_for("resumed from step 8$")
    assert_bitwise(run, reference)
