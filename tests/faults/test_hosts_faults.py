"""Several processes over loopback: the same training as one, ended, killed, frozen, unlike each
other, not all there.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
from collections.abc import Sequence

import numpy as np
import pytest
from faults import harness
from faults.child import flip_bit
from faults.harness import (
    STEPS,
    Child,
    Spawner,
    checkpoint_steps,
    config_file,
    copy_run,
    free_port,
    host_words,
    make_run,
    metrics,
    wait_for_knocks,
)
from tiny_runs import read_lines, read_state, write_corpus

from llama_jax.training.config import TrainConfig

pytestmark = pytest.mark.faults

HEARTBEAT = harness.HEARTBEAT
NOTICED = (
    40 * HEARTBEAT
)  # until the others have ended: time for busy machines, but less than children take to give up
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _hosts(monkeypatch):
    """Children that can be one of several hosts."""
    monkeypatch.setattr(harness, "CHILD", pathlib.Path(__file__).with_name("host_child.py"))


def start(
    spawn: Spawner,
    config: TrainConfig,
    faults: Sequence[str] = ("", ""),
    more: Sequence[Sequence[str]] = (),
    environments: Sequence[dict[str, str]] = (),
) -> list[Child]:
    """As many processes as there are faults; each with more words and variables of its own, where
    they are given.
    """
    port, count = free_port(), len(faults)
    return [
        spawn.train(
            config,
            fault,
            more=[*host_words(port, process, count), *(more[process] if more else [])],
            HOST_ROWS=f"{config.run.dir}.sequences.{process}",
            **(environments[process] if environments else {}),
        )
        for process, fault in enumerate(faults)
    ]


def sequences(config: TrainConfig) -> dict[tuple[int, int], str]:
    """The hash of each sequence of each step, of all processes; those who have the same sequence
    have it alike.
    """
    found: dict[tuple[int, int], str] = {}
    for path in pathlib.Path(config.run.dir).parent.glob(
        f"{pathlib.Path(config.run.dir).name}.sequences.*"
    ):
        for line in path.read_text().splitlines():
            step, sequence, content = line.split()
            assert found.setdefault((int(step), int(sequence)), content) == content
    return found


def assert_same_training(config: TrainConfig, reference: TrainConfig) -> None:
    """Losses and parameters agree but for the order of sums; the sequences of all batches are the
    same.
    """
    ours, theirs = metrics(config), metrics(reference)
    assert (
        [line["step"] for line in ours]
        == [line["step"] for line in theirs]
        == list(range(1, STEPS + 1))
    )
    for name in ("train/loss", "train/learning_rate", "train/tokens"):
        assert [line[name] for line in ours] == pytest.approx(
            [line[name] for line in theirs], abs=CLOSE, rel=CLOSE
        )
    a, b = (read_state(c, STEPS) for c in (config, reference))
    for left, right in zip(*(jax_leaves(state.params) for state in (a, b))):
        np.testing.assert_allclose(left, right, atol=CLOSE, rtol=CLOSE)


def jax_leaves(tree) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus, reference) -> TrainConfig:
    """One process from beginning to end, with its sequences."""
    directory = tmp_path_factory.mktemp("alone")
    config = host_run(directory / "run", corpus, reference)
    with pytest.MonkeyPatch.context() as patch, harness.spawner(directory) as children:
        patch.setattr(harness, "CHILD", pathlib.Path(__file__).with_name("host_child.py"))
        children.train(config, HOST_ROWS=f"{config.run.dir}.sequences.0").expect(0)
    return config


def host_run(
    directory: pathlib.Path, corpus: pathlib.Path, like: TrainConfig | None
) -> TrainConfig:
    """A run of 12 steps of two micro-batches; Adam's eps is large, as its division by small numbers
    is ill-conditioned.
    """
    changes = {"data": {"accumulation": 2}, "optimizer": {"eps": 1e-3}, "run": {"eval_every": 6}}
    return make_run(directory, corpus, like, **changes)


@pytest.fixture
def run(tmp_path, corpus, reference):
    return host_run(tmp_path / "run", corpus, reference)


# The same training


def test_two_processes_train_as_one_and_only_the_first_writes(run, alone, spawn):
    shutil.rmtree(
        pathlib.Path(run.run.dir) / "data"
    )  # so that the text is encoded with two processes there
    first, second = [child.expect(0) for child in start(spawn, run)]
    assert_same_training(run, alone)
    assert sequences(run) == sequences(alone)
    assert len(sequences(run)) == STEPS * run.data.batch_size
    of_each = [
        pathlib.Path(f"{run.run.dir}.sequences.{process}").read_text().splitlines()
        for process in range(2)
    ]
    assert [len(lines) for lines in of_each] == [STEPS * run.data.batch_size // 2] * 2
    held_out = [
        [
            line["held_out/loss"]
            for line in read_lines(pathlib.Path(c.run.dir))
            if "held_out/loss" in line
        ]
        for c in (run, alone)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=CLOSE)
    assert len(held_out[0]) == 2
    assert "2 x cpu (data 2 x" in first.output
    assert [line for line in second.output.splitlines() if not line.startswith("[Gloo]")] == []
    names = {path.name for path in pathlib.Path(run.run.dir).iterdir()}
    assert names == {path.name for path in pathlib.Path(alone.run.dir).iterdir()} | {"hosts.json"}
    assert len(json.loads((pathlib.Path(run.run.dir) / "hosts.json").read_text())["processes"]) == 2
    assert (
        "distributed:\n  mode: auto\n  coordinator: null"
        in (pathlib.Path(run.run.dir) / "config.yaml").read_text()
    )
    assert [
        int(path.name) for path in sorted((pathlib.Path(run.run.dir) / "checkpoints").iterdir())
    ] == [12, 4, 8]


# Ended


@pytest.mark.parametrize(("which", "fault"), [(0, "term"), (1, "usr1")])
def test_a_signal_to_one_saves_one_step_of_both_and_one_process_goes_on(
    run, alone, spawn, which, fault
):
    """6, 19: one step is saved on both; one process or two go on with the same batches."""
    faults = ["", ""]
    # JAX needs a moment to agree on the last step, and the steps of this model take milliseconds.
    faults[which] = f"in_data:6:{fault},in_data:7-11:slow=0.4"
    for child in start(spawn, run, faults):
        child.expect(0)
    stopped = checkpoint_steps(run)[-1]
    assert 6 <= stopped < STEPS
    assert read_lines(pathlib.Path(run.run.dir))[-1]["step"] == stopped
    if fault == "usr1":
        for child in start(spawn, run):
            child.expect(0)
    else:
        assert (
            f"resumed from step {stopped}"
            in spawn.train(run, HOST_ROWS=f"{run.run.dir}.sequences.0").expect(0).output
        )
    assert_same_training(run, alone)
    assert sequences(run) == sequences(alone)


@pytest.mark.parametrize("fault", ["usr1", "int"])
def test_a_signal_to_a_single_process_saves_and_two_go_on(run, alone, spawn, fault):
    """7, 19: SIGUSR1 and Ctrl-C are wishes to stop; two processes go on."""
    child = spawn.train(run, f"in_data:5:{fault}", HOST_ROWS=f"{run.run.dir}.sequences.0").expect(0)
    assert re.search(
        r"^SIG(USR1|INT): saving after this step; Ctrl-C within 5 s ends at once$",
        child.errors,
        re.MULTILINE,
    )
    assert checkpoint_steps(run) == [4, 5]
    if fault == "int":
        return
    for child in start(spawn, run):
        child.expect(0)
    assert_same_training(run, alone)
    assert sequences(run) == sequences(alone)


def test_a_second_ctrl_c_ends_at_once(run, spawn):
    """7: the second Ctrl-C."""
    child = spawn.train(run, "in_data:5:int,before_save:5:int")
    child.expect(130)
    assert "Traceback" not in child.errors
    assert checkpoint_steps(run) == [4]


def test_a_stop_file_and_a_time_limit_end_a_run(run, alone, spawn):
    stop = pathlib.Path(run.run.dir) / "STOP"
    child = spawn.train(run, "in_data:*:slow=0.3")
    child.wait_for(r"^ *2/")
    stop.touch()
    child.expect(0)
    assert not stop.exists()
    reached = checkpoint_steps(run)[-1]
    assert 2 <= reached < STEPS
    child = spawn.train(run, "in_data:*:slow=0.3", more=["--run.max_time", "00:00:01"]).expect(0)
    assert "run.max_time: saving" in child.errors
    assert checkpoint_steps(run)[-1] == reached + 1


# Left alone


@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_one_ends_when_one_is_killed_and_both_go_on(run, alone, spawn, killed):
    """8: the worker or the coordinator is killed."""
    faults = ["", ""]
    faults[killed] = "in_data:6:kill9"
    children = start(spawn, run, faults)
    children[killed].expect(-signal.SIGKILL)
    status = children[1 - killed].end(NOTICED)
    assert status in (1, -signal.SIGABRT)
    if status == 1:
        lines = [
            line for line in children[1 - killed].errors.splitlines() if line.startswith("error:")
        ]
        assert len(lines) == 1
        assert f"error: process {1 - killed} of 2 lost the others (" in lines[0]
        assert "Traceback" not in children[1 - killed].errors
    assert checkpoint_steps(run) in ([], [4])
    if killed:
        for child in start(spawn, run):
            child.expect(0)
        assert_same_training(run, alone)


def test_the_other_one_ends_when_one_is_frozen(run, spawn):
    """9: a process that is stopped."""
    children = start(spawn, run, ["", "in_data:6:stop"])
    children[1].wait_for("^fault: in_data 6 stop")
    assert children[0].end(NOTICED) != 0
    assert "Traceback" not in children[0].errors


# Unlike each other


def assert_all_stop(children: Sequence[Child], config: TrainConfig, *words: str) -> None:
    """All have stopped with one and the same line, before anything was compiled."""
    for child in children:
        child.expect(2)
        (line,) = [line for line in child.errors.splitlines() if line.startswith("error:")]
        assert all(word in line for word in words), line
        assert "Traceback" not in child.errors
        assert "steps" not in child.output
    directory = pathlib.Path(config.run.dir)
    assert not (directory / "metrics.jsonl").exists()
    assert not (directory / "checkpoints").exists()


def test_four_processes_of_other_config_and_code_are_told_apart(run, spawn):
    more = [["--data.seed", "0"], [], ["--data.seed", "7"], []]
    environments = [{}, {}, {}, {"HOST_VERSION": "0.0.9"}]
    children = start(spawn, run, [""] * 4, more, environments)
    assert_all_stop(
        children,
        run,
        "process 2 of 4 has config data.seed 7, the others 0",
        "process 3 of 4 has llama_jax 0.0.9, the others 0.1.0",
    )


@pytest.mark.parametrize("what", ["text", "tokenizer"])
def test_processes_with_other_files_under_the_same_names_are_told_apart(
    tmp_path, run, reference, spawn, what
):
    (made,) = (pathlib.Path(reference.run.dir) / "data").glob("[!.]*")
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_corpus(folder / "text", documents=20 + number * (what == "text"))
        shutil.copy(made / "tokenizer.model", folder)
        if number and what == "tokenizer":
            (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    data = dataclasses.replace(run.data, paths=("text",), tokenizer="tokenizer.model")
    config = dataclasses.replace(run, data=data)
    harness.write_yaml(config_file(config), config)
    shutil.rmtree(pathlib.Path(run.run.dir) / "data")
    children = start(
        spawn, config, environments=[{"HOST_DIRECTORY": str(folder)} for folder in folders]
    )
    # The document that is one too many is held out: what is trained on is the same.
    item = {"text": "held-out text (hash)", "tokenizer": "data.tokenizer (hash)"}[what]
    assert_all_stop(children, config, "process 1 of 2 has", f"{item} ", ", the others ")
    assert not (pathlib.Path(config.run.dir) / "data").exists()


def test_what_one_process_cannot_find_stops_all(tmp_path, corpus, run, spawn):
    config = dataclasses.replace(run, data=dataclasses.replace(run.data, paths=(corpus.name,)))
    harness.write_yaml(config_file(config), config)
    environments = [{"HOST_DIRECTORY": str(corpus.parent)}, {"HOST_DIRECTORY": str(tmp_path)}]
    children = start(spawn, config, environments=environments)
    assert_all_stop(children, config, f"{corpus.name}: ")
    assert "error: process 1: " in children[0].errors


# Not all there


def test_who_is_missing_is_named(run, spawn):
    port = free_port()
    second = spawn.train(run, more=host_words(port, 2, 4, startup=300))
    wait_for_knocks(port, {"llama_jax 2 4"})
    first = spawn.train(run, more=[*host_words(port, 0, 4), "--distributed.startup_seconds", "8"])
    line = "processes 1, 3 of 4 did not come within 8 s; start all of them\n"
    assert first.expect(2).errors == f"error: {line}"
    assert second.expect(2).errors == f"error: refused by process 0: {line}"


def test_a_damaged_checkpoint_is_passed_over_by_all(alone, tmp_path, spawn):
    config = copy_run(alone, tmp_path / "run")
    checkpoints = pathlib.Path(config.run.dir) / "checkpoints"
    flip_bit(checkpoints / "12")
    (checkpoints / "8" / "meta" / "metadata").unlink()
    first, _ = [child.expect(0) for child in start(spawn, config, more=[["--run.steps", "13"]] * 2)]
    assert "resumed from step 4" in first.output
    assert {path.name for path in checkpoints.iterdir()} == {
        "12.corrupt",
        "8.corrupt",
        "4",
        "12",
        "8",
        "13",
    } - {"4"}
