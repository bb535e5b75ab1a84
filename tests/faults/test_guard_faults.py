"""Bad steps in whole runs: skipped, gone back from, given up; killed in the middle; and devices
that disagree.
"""

import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from faults.poison import among, spoil
from tiny_runs import (
    ROOT,
    child_environment,
    read_lines,
    read_state,
    tiny_config,
    without_speed,
    write_corpus,
    write_yaml,
)

from llama_jax.cli.main import run_program
from llama_jax.errors import DivergedError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import loop, setup
from llama_jax.training import step as guard
from llama_jax.training.consistency import differing_replicas
from llama_jax.training.loop import prepare
from llama_jax.training.step import state_shapes
from llama_jax.weights.checkpoint import list_steps

pytestmark = pytest.mark.faults
POISON = pathlib.Path(__file__).with_name("poison.py")
STEPS = 16


class Recorder:
    """A display that remembers."""

    def __init__(self):
        self.records, self.events = [], []

    def start(self, heading, steps):
        pass

    def step(self, record):
        self.records.append(record)

    def event(self, text):
        self.events.append(text)

    def finish(self, summary):
        pass


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def make_config(path: pathlib.Path, corpus: pathlib.Path, **changes):
    """A run of 16 steps that may go back after three skipped ones."""
    run = {
        "steps": STEPS,
        "eval_every": 0,
        "checkpoint_every": 4,
        "log_every": 1,
        "keep_checkpoints": 9,
    }
    guard = {"patience": 3, **changes.pop("guard", {})}
    return tiny_config(path, corpus, run=run | changes.pop("run", {}), guard=guard, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """A run that leaves out the data of steps 5 to 7 from the beginning, by its config; only to be
    read.
    """
    config = make_config(
        tmp_path_factory.mktemp("reference") / "run", corpus, data={"skip_steps": ((5, 7),)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        spoil(patch.setattr, lambda step, data_step: "")  # the same program
        train(config)
    return config


@pytest.fixture
def make(tmp_path, corpus, reference):
    """Configs of runs, their data prepared."""

    def config(name: str, **changes):
        shutil.copytree(directory(reference) / "data", tmp_path / name / "data")
        return make_config(tmp_path / name, corpus, **changes)

    return config


def train(config, stop: int | None = None):
    """A run, to its end or to a step; its display."""
    display = Recorder()
    summary = prepare(config, display).train(should_stop=lambda step: step == stop)
    assert summary.saved
    assert summary.step == (stop or config.run.steps)
    return display, summary


def leaves(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def directory(config) -> pathlib.Path:
    return pathlib.Path(config.run.dir)


def saved_steps(config) -> list[int]:
    return list_steps(directory(config) / "checkpoints")


def numbers(config) -> list[dict]:
    """The metrics of a run without its events, its speed, and what is told of bad steps."""
    lines = without_speed(line for line in read_lines(directory(config)) if "event" not in line)
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("train/skipped", "train/rewinds")
        }
        for line in lines
    ]


def assert_same_weights(config, reference):
    ours, theirs = (read_state(one, STEPS) for one in (config, reference))
    assert leaves((ours.params, ours.optimizer)) == leaves((theirs.params, theirs.optimizer))
    for ring in ("losses", "norms", "good"):
        assert leaves(getattr(ours.guard, ring)) == leaves(getattr(theirs.guard, ring))


# 21: not a number


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are(make, monkeypatch):
    """21: one step; and a run that is interrupted before, in and after it ends in the same bits."""
    spoil(monkeypatch.setattr, among("nan", "nan:3"))
    whole, parts = make("whole"), make("parts", run={"checkpoint_every": 1, "keep_checkpoints": 99})
    display, summary = train(whole)
    assert [line for line in display.events if "skipped" in line] == [
        "warning: step 4 skipped (loss nan, gradient norm nan); nothing was learned there"
    ]
    assert (summary.skipped, summary.rewinds) == (1, 0)
    lines = read_lines(directory(whole))
    assert [line["step"] for line in lines if line["train/loss"] is None] == [4]
    assert [line.get("train/skipped") for line in lines] == [None] * 3 + [1] * 13
    assert saved_steps(whole) == [
        8,
        12,
        16,
    ]  # none of the step that was skipped, which has nothing new

    train(parts, 4)
    before, after = (read_state(parts, step) for step in (3, 4))
    assert leaves((before.params, before.optimizer)) == leaves((after.params, after.optimizer))
    train(parts)
    assert leaves(read_state(parts, STEPS)) == leaves(read_state(whole, STEPS))
    assert numbers(parts) == numbers(whole)


def test_bad_data_is_left_out_after_going_back(make, reference, monkeypatch):
    """21: three steps in a row: as if the config had left their data out from the beginning."""
    asked = spoil(monkeypatch.setattr, among("nan", "nan:5-7"))
    config = make("run")
    display, summary = train(config)
    assert asked == [*range(8), *range(4, 16)]
    warnings = [line for line in display.events if line.startswith("warning")]
    assert warnings[-1] == (
        "warning: 3 consecutive steps were skipped: going back to step 4 (1 of 3 times), "
        "and on without the "
        "data of steps 6 to 8"
    )
    assert (summary.skipped, summary.rewinds) == (0, 1)
    assert_same_weights(config, reference)
    assert numbers(config) == numbers(reference)
    lines = read_lines(directory(config))
    assert [line for line in lines if "event" in line] == [
        {
            "step": 4,
            "event": "rewound",
            "reason": "3 consecutive steps were skipped",
            "at": 8,
            "steps": "6 to 8",
            "data_steps": "5 to 7",
        }
    ]
    assert [line.get("train/rewinds") for line in lines if line["step"] > 4] == [1] * 12


def test_scattered_bad_data_is_left_out_too(make, monkeypatch):
    """21: ten of the last two hundred, never two in a row; a batch that grows and a list in the
    config stay what they are.
    """
    bad = tuple((step, step) for step in range(2, 24, 2) if step != 8)
    run, data = (
        {"steps": 26, "checkpoint_every": 2},
        {"batch_ramp": ((12, 8),), "skip_steps": ((8, 8), (25, 26))},
    )
    wrong = {first for first, _ in bad}
    spoil(monkeypatch.setattr, lambda step, data_step: "nan" if data_step in wrong else "")
    config = make("run", run=run, data=data)
    _, summary = train(config)
    assert summary.rewinds == 1
    assert json.loads((directory(config) / "rewinds.json").read_text())[0]["to"] == 2
    reference = make(
        "reference", run=run, data=data | {"skip_steps": tuple(sorted((*bad, *data["skip_steps"])))}
    )
    train(reference)
    ours, theirs = (read_state(one, 26) for one in (config, reference))
    assert leaves((ours.params, ours.optimizer)) == leaves((theirs.params, theirs.optimizer))


def test_what_does_not_end_ends_the_run_with_a_report(make, monkeypatch):
    """21: for ever: three times back, then a report; every checkpoint is from before, its weights
    finite and the same.
    """
    spoil(monkeypatch.setattr, among("nan", "nan-at:6-99"))
    config = make("run")
    display = Recorder()
    with pytest.raises(
        DivergedError,
        match=r"^step 9: 3 consecutive steps were skipped \(loss nan, gradient norm nan\) after the "
        r"run went back 3 times; .*/postmortem says more; lower optimizer.learning_rate",
    ) as caught:
        prepare(config, display).train()
    assert "\n" not in str(caught.value)
    assert sum("going back to step 4" in line for line in display.events) == 3
    assert saved_steps(config) == [4]
    assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(jax.device_get(read_state(config, 4).params))
    )

    folder = directory(config) / "postmortem"
    report = json.loads((folder / "report.json").read_text())
    assert (report["step"], report["first_array_not_finite"]) == (9, "embedding")
    assert [one["step"] for one in report["skipped"]] == [7, 8, 9]
    assert {(one["loss"], one["gradient_norm"]) for one in report["skipped"]} == {("nan", "nan")}
    assert report["usual"]["loss"]["steps"] == 6
    assert len(report["rewinds"]) == 3
    # What those steps read was left out each time, and the last three have read what follows.
    assert report["skip_steps"] == [[6, 14]]
    assert [one["data_step"] for one in report["skipped"]] == [15, 16, 17]
    rows = [line.split("\t") for line in (folder / "arrays.tsv").read_text().splitlines()]
    assert rows[0] == ["path", "norm", "not_finite", "gradient_norm", "gradient_not_finite"]
    assert {"embedding", "layers/0/attention/wq", "layers/1/attention/wq"} <= {
        row[0] for row in rows
    }
    embedding = np.asarray(read_state(config, 4).params["embedding"])
    row = next(row for row in rows if row[0] == "embedding")
    assert row[2:] == ["0", "nan", str(embedding.size)]

    # It is remembered: the same command gives up at once, and one that starts anew forgets.
    with pytest.raises(DivergedError, match="step 9: "):
        prepare(config, Recorder()).train()
    loop.clear_run(directory(config))
    assert not folder.exists()
    assert not (directory(config) / "rewinds.json").exists()


def test_from_the_first_step_on_there_is_nothing_to_go_back_to_but_the_start(make, monkeypatch):
    config = make("run", run={"steps": 4}, guard={"rewinds": 1})
    asked = spoil(monkeypatch.setattr, among("nan", "nan:0-2"))
    display, summary = train(config)
    assert any("going back to step 0 (1 of 1 times)" in line for line in display.events)
    assert asked == [0, 1, 2, 0, 1, 2, 3]
    assert (summary.skipped, summary.rewinds) == (0, 1)


def test_no_checkpoint_has_weights_that_are_not_finite(make, monkeypatch):
    """21: weights that an optimizer has made infinite out of a finite gradient: told, and not
    saved.
    """
    real = loop.sharded_step

    def broken(*given):
        program = real(*given)

        def step(state, batch):
            state, figures = program(state, batch)
            bad = state.params["embedding"].at[0, 0].set(np.where(int(state.step) == 8, np.inf, 0))
            return state._replace(params={**state.params, "embedding": bad}), figures

        return step

    monkeypatch.setattr(loop, "sharded_step", broken)
    display = Recorder()
    config = make("run", run={"steps": 8})
    summary = prepare(config, display).train()
    assert summary.saved is False
    assert "warning: checkpoint 8 was not written: its parameters are not finite" in display.events
    assert saved_steps(config) == [4]


# 22: spikes


def test_a_spike_is_skipped_once_and_what_is_usual_stays_so(make, monkeypatch):
    """22: a run that is interrupted just after the spike keeps all that it remembers, bit by
    bit.
    """
    spoil(monkeypatch.setattr, among("loud", "loud:12"))
    monkeypatch.setattr(guard, "ENOUGH", 8)  # in place of 64 steps
    whole, parts = (
        make(name, guard={"spike_skip": True}, run={"log_every": 8}) for name in ("whole", "parts")
    )
    display, summary = train(whole)
    (line,) = [line for line in display.events if "skipped" in line]
    assert line.startswith("warning: step 13 skipped (loss ")
    assert (summary.skipped, summary.rewinds) == (1, 0)
    train(parts, 13)
    train(parts)
    state, again = (read_state(config, STEPS) for config in (whole, parts))
    assert leaves(again) == leaves(state)
    # Figures of 15 good steps are in the ring, and none of the spike.
    assert int(state.guard.good) == 15
    assert 0 < state.guard.losses[:15].min() < state.guard.losses[:15].max() < 7
    assert not state.guard.losses[15:].any()


# 23: killed while it goes back


def start(config, what: str, where: str, status: int) -> subprocess.CompletedProcess:
    """`train` as a process with bad data."""
    path = write_yaml(directory(config).with_suffix(".yaml"), config)
    command = [sys.executable, str(POISON), what, where, "train", "--config", str(path)]
    environment = child_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("where", ["before-discard", "after-discard"])
def test_killed_while_it_goes_back_past_a_saved_bad_step(make, reference, monkeypatch, where):
    """23: a bad step was saved; the run goes back past it and is killed; the next goes on on the
    good branch.
    """
    config = make("run")
    spoil(monkeypatch.setattr, among("nan", "nan:5-7"))
    train(config, 7)  # in the middle of the bad steps
    assert saved_steps(config) == [4, 7]
    start(config, "nan:5-7", where, -signal.SIGKILL)
    assert saved_steps(config) == ([4, 7] if where == "before-discard" else [4])
    done = start(config, "nan:5-7", "never", 0)
    assert "resumed from step 4" in done.stdout
    assert "skipped (" not in done.stdout
    assert_same_weights(config, reference)
    assert numbers(config) == numbers(reference)
    assert saved_steps(config) == [4, 8, 12, 16]


def test_a_program_that_gives_up_says_so_in_one_line(make):
    done = start(make("run", guard={"rewinds": 0}), "nan-at:2-99", "never", 4)
    assert done.stderr.startswith(
        "error: step 5: 3 consecutive steps were skipped (loss nan, gradient norm nan) after the run "
    )
    assert done.stderr.count("\n") == 1
    assert "warning: step 3 skipped" in done.stdout


# 24: replicas


@pytest.fixture(scope="module")
def state():
    """A state on 4 devices: two copies of two halves, and four copies of the scales."""
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    shapes = state_shapes(
        setup.make_recipe(tiny_config(pathlib.Path("run"), pathlib.Path("text"))), mesh
    )
    rng = np.random.default_rng(0)
    place = lambda leaf: jax.device_put(
        rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding
    )
    return jax.tree.map(place, shapes), mesh


def perturbed(array: jax.Array, device: jax.Device) -> jax.Array:
    """The array with one bit flipped in the copy of one device."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.view(np.uint32).flat[part.size // 2] ^= 1
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_equal_replicas_are_equal(state):
    assert differing_replicas(state[0].params, state[1]) == []


@pytest.mark.parametrize("number", range(4))
def test_a_copy_that_differs_in_one_bit_is_named_with_its_device(state, number):
    """24: of four copies the odd one; of two both, as nobody can say which is wrong."""
    params, mesh = state[0].params, state[1]
    device = mesh.devices.flat[number]
    bent = {**params, "final_norm": {"scale": perturbed(params["final_norm"]["scale"], device)}}
    (found,) = differing_replicas(bent, mesh)
    assert (found.path, found.devices) == ("final_norm/scale", (device,))
    assert set(found.others) == set(mesh.devices.flat) - {device}
    attention = params["layers"]["attention"]
    layers = {
        **params["layers"],
        "attention": {**attention, "wo": perturbed(attention["wo"], device)},
    }
    (found,) = differing_replicas({**params, "layers": layers}, mesh)
    partner = mesh.devices[1 - number // 2, number % 2, 0, 0]
    assert found.path == "layers/attention/wo"
    assert {*found.devices, *found.others} == {device, partner}


def test_a_run_whose_replicas_differ_ends_in_one_line_and_saves_nothing(make, monkeypatch, capsys):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    real = loop.sharded_step

    def broken(*given):
        program = real(*given)

        def step(state, batch):
            state, figures = program(state, batch)
            if int(state.step) == 3:
                bent = perturbed(state.params["final_norm"]["scale"], jax.devices()[2])
                state = state._replace(params={**state.params, "final_norm": {"scale": bent}})
            return state, figures

        return step

    monkeypatch.setattr(loop, "sharded_step", broken)
    config = make("run", mesh={"data": 4}, guard={"check_replicas": 2}, run={"checkpoint_every": 2})
    assert run_program(lambda: prepare(config, Recorder()).train() and 0) == 4
    first, second, odd, last = jax.devices()[:4]
    assert capsys.readouterr().err == (
        f"error: step 4: params/final_norm/scale on {odd} differs from {first}, "
        f"{second}, {last}: "
        "a device or its memory is at fault; resume without it from the last checkpoint\n"
    )
    assert saved_steps(config) == [2]
