"""The watch on the host: when skipped steps are too many, where the run goes back to, what it
leaves out, what it tells.
"""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_jax.data.batches import Steps, joined
from llama_jax.errors import CorruptError
from llama_jax.training.recovery import (
    MADE_AFTER,
    RUN_REWINDS,
    Rewind,
    Rewinds,
    Skipped,
    Trouble,
    Watch,
    in_words,
    plan_rewind,
    ranges,
    skipped_lines,
)
from llama_jax.training.step import WINDOW, StepMetrics, fresh_guard, noted


def figures(flags) -> list[StepMetrics]:
    return [
        StepMetrics(
            np.float32(np.nan if bad else 2),
            np.float32(1),
            np.float32(1e-3),
            np.float32(9),
            np.bool_(bad),
            {},
        )
        for bad in flags
    ]


def first_trouble(flags, patience: int, since: int = 0) -> tuple[int, ...] | None:
    """The steps of the first trouble, by the words of the policy, with nothing remembered from step
    to step.
    """
    for step in range(len(flags)):
        if not flags[step] or step < since:
            continue
        sequence = 0
        while step - sequence >= since and flags[step - sequence]:
            sequence += 1
        if sequence >= patience:
            return tuple(range(step - sequence + 1, step + 1))
        recent = [k for k in range(max(since, step - 199), step + 1) if flags[k]]
        if len(recent) >= max(patience, 10):
            return tuple(recent)
    return None


def guard_after(flags):
    put, guard = jax.jit(noted), fresh_guard()
    for step, bad in enumerate(flags):
        guard = put(guard, jnp.int32(step), jnp.bool_(not bad), jnp.float32(2), jnp.float32(1))
    return jax.device_get(guard)


def watched(
    flags, patience: int, cuts: list[int], start: int = 0, since: int = 0
) -> tuple[tuple[int, ...] | None, list[str]]:
    """What a watch finds that is begun after `start` steps and shown the figures piece by piece."""
    lines: list[str] = []
    watch = Watch(patience, guard_after(flags[:start]), start, since, lines.append)
    done = start
    for end in [*sorted({cut for cut in cuts if start < cut < len(flags)}), len(flags)]:
        trouble = watch.add(end, figures(flags[done:end]))
        if trouble:
            return tuple(one.step for one in trouble.steps), lines
        done = end
    assert watch.skipped == sum(flags)
    return None, lines


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trouble_is_found_at_the_same_step_however_the_figures_come_and_the_run_was_restarted(data):
    seed, share = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.02, 0.05, 0.3, 0.9]))
    flags = (np.random.default_rng(seed).random(data.draw(st.integers(1, 420))) < share).tolist()
    patience, since = data.draw(st.sampled_from([1, 3, 10, 30])), data.draw(st.integers(0, 60))
    expected = first_trouble(flags, patience, since)
    cuts = data.draw(st.lists(st.integers(0, 420), max_size=6))
    # A state is never saved after a trouble that was not seen.
    seen = len(flags) if expected is None else expected[-1]
    assume(since <= seen)  # what the run was sent back to is where it goes on from
    start = data.draw(st.integers(since, seen))
    assert watched(flags, patience, cuts, start, since)[0] == expected


def test_ten_in_a_sequence_or_five_percent_of_the_last_two_hundred():
    assert WINDOW == 200
    assert watched([False] * 7 + [True] * 10, 10, [])[0] == tuple(range(7, 17))
    assert watched([False] * 7 + [True] * 9 + [False] * 20, 10, [])[0] is None
    every_20th = [step % 20 == 5 for step in range(400)]
    assert watched(every_20th, 10, [])[0] == tuple(range(5, 200, 20))
    assert watched([step % 21 == 5 for step in range(400)], 10, [])[0] == tuple(range(5, 200, 21))
    assert watched([step % 23 == 5 for step in range(400)], 10, [])[0] is None


def test_what_is_said_of_skipped_steps():
    _, lines = watched([False, True, False, True, True, True, False], 10, [2])
    assert lines == [
        "warning: step 2 skipped (loss nan, gradient norm 1); nothing was learned there",
        "warning: steps 4 to 6 skipped (loss nan, gradient norm 1); nothing was learned there",
    ]
    assert skipped_lines([]) == []


def trouble_at(*steps: int) -> Trouble:
    return Trouble("why", tuple(Skipped(step, math.nan, 1.0) for step in steps))


@pytest.mark.parametrize(
    ("steps", "saved", "to", "wrong"),
    [
        ([7, 8, 9], [], 0, ((7, 9),)),  # nothing saved yet: from the start
        ([7, 8, 9], [4, 6], 6, ((7, 9),)),
        (
            [7, 8, 9],
            [4, 7],
            7,
            ((7, 9),),
        ),  # a state with 7 updates is from before step 7, which counts from 0
        ([7, 8, 9], [4, 8], 4, ((7, 9),)),  # the newer one was made after a bad step
        (
            [3, 30, 31, 60],
            [20, 25],
            25,
            ((30, 31), (60, 60)),
        ),  # what is older than all checkpoints stays as it is
        ([3, 30, 31, 60], [20, 40], 40, ((60, 60),)),
        ([3, 30, 60], [61], None, None),
    ],
)
def test_where_to_go_back_to(steps, saved, to, wrong):
    if to is None:
        with pytest.raises(ValueError):
            plan_rewind(trouble_at(*steps), saved, lambda step: step)
        return
    rewind = plan_rewind(trouble_at(*steps), saved, lambda step: step + 100)
    assert (rewind.to, rewind.steps) == (to, wrong)
    assert rewind.data == tuple((first + 100, last + 100) for first, last in wrong)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8))
def test_joined_ranges_hold_the_same_numbers(pairs):
    pairs = [(first, first + more) for first, more in pairs]
    got = joined(*[(pair,) for pair in pairs])
    numbers = {number for first, last in pairs for number in range(first, last + 1)}
    assert {number for first, last in got for number in range(first, last + 1)} == numbers
    assert all(b[0] > a[1] + 1 for a, b in itertools.pairwise(got))
    steps = Steps(4, skip=got)  # which takes them
    assert [steps.data_step(step) for step in range(20)] == [
        n for n in range(200) if n not in numbers
    ][:20]


def test_rewinds_are_remembered_and_tell_which_checkpoints_were_left(tmp_path):
    rewinds = Rewinds(tmp_path)
    assert (rewinds.done, rewinds.skip, rewinds.since) == ((), (), 0)
    rewinds.add(Rewind(20, "why", ((21, 30),), ((21, 30),)))
    rewinds.add(Rewind(40, "why", ((47, 47), (50, 51)), ((57, 57), (60, 61))))
    rewinds.add(Rewind(20, "why", ((22, 22),), ((31, 31),)))
    again = Rewinds(tmp_path)
    assert again.done == rewinds.done
    assert again.skip == ((21, 31), (57, 57), (60, 61))
    assert (again.since, again.times(20), again.times(40), again.times(0)) == (20, 2, 1, 0)
    made = {10: 0, 20: 0, 30: 0, 40: 1, 45: 1, 50: 2, 60: 3}  # checkpoint: rewinds before it
    assert again.left_behind({step: {MADE_AFTER: count} for step, count in made.items()}) == [
        30,
        40,
        45,
        50,
    ]
    assert again.left_behind({15: {}, 25: {}}) == [25]


@pytest.mark.parametrize(
    "content",
    ["", "[", "{}x", '[{"to": 3}]', '[{"to": "x", "reason": "", "steps": [], "data": []}]', "[7]"],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line(tmp_path, content):
    (tmp_path / RUN_REWINDS).write_text(content)
    with pytest.raises(CorruptError, match=RUN_REWINDS) as caught:
        Rewinds(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_file_is_json_for_people(tmp_path):
    Rewinds(tmp_path).add(Rewind(20, "10 consecutive steps were skipped", ((21, 30),), ((21, 30),)))
    entry = {
        "to": 20,
        "reason": "10 consecutive steps were skipped",
        "steps": [[21, 30]],
        "data": [[21, 30]],
    }
    assert json.loads((tmp_path / RUN_REWINDS).read_text()) == [entry]
    assert in_words(ranges([3, 7, 8, 9])) == "3, 7 to 9"
    assert in_words(ranges([3, 7, 8, 9]), 1) == "4, 8 to 10"
