"""A run that was interrupted ends in the very bits of one that was not."""

from faults.harness import assert_bitwise, checkpoint_steps


def test_stopped_and_gone_on_with(spawn, run, reference):
    """1: no fault: 12 steps equal 6, another process, and 6 more."""
    spawn.train(run, fault="in_data:6:term").expect(0)
    assert checkpoint_steps(run)[-1] == 6
    spawn.train(run).expect(0).wait_for("going on from step 6")
    assert_bitwise(run, reference)
