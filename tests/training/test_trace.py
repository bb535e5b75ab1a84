"""Traces of some steps: which steps are in them, that nothing is lost by a trace that fails, what
starts none.
"""

import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from test_loop import Recorder, _one_device, changed, config, corpus  # noqa: F401 (fixtures)
from tiny_runs import read_state, state_bytes

from llama_jax.training.loop import prepare
from llama_jax.training.run_log import Trace


def traced_steps(directory: pathlib.Path) -> list[int]:
    """The steps in the one trace below a directory, in the order of their time."""
    (path,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    marks = [event for event in events if event.get("name") == "train"]
    return [
        int(event["args"]["step_num"]) for event in sorted(marks, key=lambda event: event["ts"])
    ]


@jax.jit
def program(x):
    return x + 1


def drive(trace, steps):
    """The results of a program that is run as the loop runs its own."""
    results = []
    for step in steps:
        with trace.step(step):
            result = program(jnp.float32(step))
        results.append(float(result))
    return results


def test_a_run_traces_what_was_asked_and_computes_the_same(config, tmp_path):  # noqa: F811
    plain = changed(config, run={"dir": str(tmp_path / "plain"), "steps": 6})
    prepare(plain, Recorder()).train()
    display, again = Recorder(), Recorder()
    traced = changed(config, run={"steps": 6, "profile": "3:5", "checkpoint_every": 6})
    prepare(traced, display).train()
    (line,) = [event for event in display.events if event.startswith("trace")]
    folder = pathlib.Path(traced.run.dir) / "profile"
    assert traced_steps(folder) == [3, 4, 5]
    (path,) = folder.rglob("perfetto_trace.json.gz")
    assert (
        line == f"trace     steps 3 to 5: open {path} at https://ui.perfetto.dev, or xprof "
        f"--logdir {folder}"
    )
    assert state_bytes(read_state(traced, 6)) == state_bytes(read_state(plain, 6))
    prepare(
        changed(traced, run={"steps": 8}), again
    ).train()  # from step 6: nothing is left to trace
    assert not [event for event in again.events if "trace" in event]
    assert traced_steps(folder) == [3, 4, 5]


@pytest.mark.parametrize(
    ("steps", "found"), [(range(4, 9), [4, 5]), (range(1, 4), [3]), (range(6, 9), [])]
)
def test_of_the_steps_wanted_those_that_are_done(tmp_path, steps, found):
    """A run that goes on in the middle, one that ends there, one that begins behind it."""
    said = []
    trace = Trace("3:5", tmp_path / "profile", said.append)
    assert drive(trace, steps) == [step + 1 for step in steps]
    trace.close()
    trace.close()
    assert len(said) == bool(found)
    assert (traced_steps(tmp_path / "profile") if found else []) == found


@pytest.mark.parametrize("part", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_a_warning(tmp_path, monkeypatch, part):
    def fail(*args, **settings):
        raise RuntimeError("no room\nat all")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(
            jax.profiler, name, fail if name == part else lambda *args, **settings: None
        )
    said = []
    trace = Trace("2:3", tmp_path, said.append)
    assert drive(trace, range(1, 6)) == [2, 3, 4, 5, 6]
    trace.close()
    assert said == ["warning: run.profile: no trace (RuntimeError: no room at all)"]


def test_a_second_trace_in_a_process_is_a_warning(tmp_path):
    with jax.profiler.trace(str(tmp_path / "other")):
        said = []
        assert drive(Trace("1:2", tmp_path / "mine", said.append), range(1, 4)) == [2, 3, 4]
    assert len(said) == 1
    assert said[0].startswith("warning: run.profile: no trace (")
