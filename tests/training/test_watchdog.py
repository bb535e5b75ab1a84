"""When a run counts as standing still, in a time of its own; and the file that tells how far it
is.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from llama_jax.training.goodput import Clock
from llama_jax.training.watchdog import Heartbeat, Watchdog


class Figure:
    """A figure of an update that the device has not done yet."""

    def __init__(self):
        self.ready = False

    def is_ready(self):
        return self.ready


class Time:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Watched:
    """A watchdog of 100 s without a thread: it looks once a second of its time."""

    def __init__(self):
        self.time, self.clock, self.lines = Time(), Clock(), []
        self.dog = Watchdog(
            pathlib.Path("run/hang.txt"),
            100.0,
            self.clock,
            lambda path, line: self.lines.append(line),
            self.time,
        )
        self.dog._thread = True  # as if one looked

    def pass_by(self, seconds: int) -> None:
        for _ in range(seconds):
            self.time.seconds += 1
            self.dog.look()

    def update(self, step: int, seconds: int) -> None:
        figure = Figure()
        self.dog.begun(step, figure)
        self.pass_by(seconds - 1)
        figure.ready = True
        self.pass_by(1)


@pytest.fixture
def watched():
    return Watched()


def test_no_update_for_the_limit(watched):
    watched.update(7, 1)
    watched.pass_by(100)
    assert watched.lines == []
    watched.pass_by(1)
    assert watched.lines == [
        "error: the run has stood still for 101 s in an update (step 7 was the last; at "
        "most 100 s, run.hang_seconds 100); "
        "stacks are in run/hang.txt"
    ]


def test_the_first_update_has_time_to_be_compiled(watched):
    watched.pass_by(1200)
    assert watched.lines == []
    watched.pass_by(1)
    assert "(no step was completed; at most 1200 s" in watched.lines[0]


def test_slow_updates_are_waited_for_ten_times_as_long(watched):
    watched.update(1, 600)  # most of it in the compiler: that is not what an update takes
    for step in range(2, 9):
        watched.update(step, 50 if step % 2 else 30)
    watched.dog.begun(9, Figure())
    watched.pass_by(300)  # ten times the median of 30 s
    assert watched.lines == []
    watched.pass_by(1)
    assert "at most 300 s" in watched.lines[0]


def test_an_update_on_a_hung_device_is_none_however_many_are_begun(watched):
    watched.update(1, 1)
    for step in range(2, 6):
        watched.dog.begun(step, Figure())
        watched.pass_by(20)
    watched.pass_by(21)
    assert "step 1 was the last" in watched.lines[0]


@pytest.mark.parametrize(("part", "allowed"), [("data", 100), ("save", 600), ("eval", 1200)])
def test_parts_have_allowances(watched, part, allowed):
    watched.update(1, 1)
    with watched.clock(part):
        watched.pass_by(1 + allowed)  # it is noticed at the first look
        assert watched.lines == []
        watched.pass_by(1)
    assert f"in {part} (step 1 was the last; at most {allowed} s" in watched.lines[0]


def test_an_evaluation_that_has_always_taken_long(watched):
    watched.update(1, 1)
    with watched.clock("eval"):
        watched.pass_by(1001)
    watched.update(2, 1)
    with watched.clock("eval"):
        watched.pass_by(9900)
    assert watched.lines == []


def test_every_batch_of_an_evaluation_is_a_sign_of_life(watched):
    """An evaluation of a day, whose batches come; then one that stops coming."""
    watched.update(1, 1)
    with watched.clock("eval"):
        for _ in range(300):
            watched.clock.alive()
            watched.pass_by(290)
        watched.clock.alive()
        watched.pass_by(2901)  # ten times the longest of them; it is noticed at the first look
        assert watched.lines == []
        watched.pass_by(1)
    assert "in eval (step 1 was the last; at most 2900 s" in watched.lines[0]


def test_compiling_has_an_allowance(watched, tmp_path):
    module = tmp_path / "jax" / "_src" / "compiler.py"
    module.parent.mkdir(parents=True)
    code = compile("def compile_long(wait): wait()", str(module), "exec")
    names = {}
    eval(code, names)
    watched.update(1, 1)
    names["compile_long"](lambda: watched.pass_by(1200))
    assert watched.lines == []
    watched.pass_by(1)
    assert "at most 100 s" in watched.lines[0]  # nothing compiles any more


def test_a_process_that_was_stopped_is_given_time(watched):
    watched.update(1, 1)
    watched.time.seconds += 10_000  # SIGSTOP, a laptop asleep
    watched.dog.look()
    watched.pass_by(90)
    assert watched.lines == []


def test_the_real_compiler_is_where_it_is_looked_for():
    """JAX may move it; then this name has to follow."""
    import jax._src.compiler

    assert pathlib.Path(jax._src.compiler.__file__).match("jax/_src/compiler.py")
    assert callable(jax._src.compiler.compile_or_get_cached)


_HANGING = """
import pathlib, sys, time
from llama_jax.training.goodput import Clock
from llama_jax.training.watchdog import Watchdog
clock = Clock()
with Watchdog(pathlib.Path(sys.argv[1]), float(sys.argv[2]), clock), clock("data"):
    time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("file", "seconds", "sleep", "status"),
    [
        ("hang.txt", "0.3", "300", 3),
        ("hang.txt", "0", "1", 0),
        ("nowhere/hang.txt", "0.3", "300", 3),
    ],
)
def test_the_process_ends_with_all_stacks(tmp_path, file, seconds, sleep, status):
    command = [sys.executable, "-c", _HANGING, str(tmp_path / file), seconds, sleep]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == status
    if status:
        assert "has stood still" in done.stderr
        assert 'File "<string>", line 7' in done.stderr
        assert "in _watch" in done.stderr
    written = status and "/" not in file
    assert [path.name for path in tmp_path.iterdir()] == (["hang.txt"] if written else [])
    if written:
        assert 'File "<string>", line 7' in (tmp_path / "hang.txt").read_text()


def test_outside_of_its_block_nothing_is_watched(tmp_path):
    called = []
    with (
        contextlib.suppress(ZeroDivisionError),
        Watchdog(tmp_path, 5.0, Clock(), lambda *given: called.append(given)) as dog,
    ):
        raise ZeroDivisionError
    assert not dog._thread.is_alive()
    assert called == []


def test_a_heartbeat_now_and_then(tmp_path):
    now = Time()
    path = tmp_path / "heartbeat.json"
    heart = Heartbeat(path, now)
    seen = []
    for second in range(1, 25):
        now.seconds = second
        heart.beat(second * 2, 3.5)
        seen.append(json.loads(path.read_text()))
    assert [beat["step"] for beat in seen] == [2] * 10 + [22] * 10 + [42] * 4
    assert seen[-1] == {"step": 42, "time": 21, "loss": 3.5}
    heart.beat(50, None, always=True)
    assert json.loads(path.read_text()) == {"step": 50, "time": 24, "loss": None}
    assert [entry.name for entry in tmp_path.iterdir()] == ["heartbeat.json"]


def test_a_heart_without_a_disk_beats_on(tmp_path):
    Heartbeat(tmp_path / "nowhere" / "heartbeat.json").beat(1, 2.0)
