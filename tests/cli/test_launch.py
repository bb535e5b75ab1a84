"""`train.py` as two and as four processes over loopback: the same training as one, or one line that
says who is to blame.

Short runs without faults, with time for machines that are busy; what is ended, killed and frozen is
in `tests/faults`.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
import pytest
from faults import harness
from faults.harness import (
    Child,
    Spawner,
    config_file,
    free_port,
    host_words,
    make_run,
    spawner,
    wait_for_knocks,
)
from tiny_runs import read_lines, write_corpus

from llama_jax.cli.train import main
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup
from llama_jax.training.config import TrainConfig

STEPS, SECONDS = 3, 300  # of a run; until it has to be over


@pytest.fixture
def spawn(tmp_path, monkeypatch):
    """Children that can be one of several hosts."""
    monkeypatch.setattr(harness, "CHILD", pathlib.Path(harness.__file__).with_name("host_child.py"))
    (tmp_path / "logs").mkdir()
    with spawner(tmp_path / "logs") as children:
        yield children


def short_run(
    directory: pathlib.Path, corpus: pathlib.Path, like: TrainConfig | None = None, **mesh: int
) -> TrainConfig:
    """A run of a few steps; Adam's eps is large, as its division by small numbers is
    ill-conditioned.
    """
    changes = {
        "run": {"steps": STEPS, "checkpoint_every": 1000},
        "optimizer": {"eps": 1e-3},
        "mesh": mesh,
    }
    return make_run(directory, corpus, like, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> TrainConfig:
    """The run of one process, this one, which the others are compared with."""
    directory = tmp_path_factory.mktemp("alone")
    config = short_run(directory / "run", write_corpus(directory / "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        assert main(["--config", str(config_file(config))]) == 0
    return config


def start(
    spawn: Spawner,
    config: TrainConfig,
    count: int,
    more: Sequence[Sequence[str]] = (),
    environments: Sequence[dict] = (),
) -> list[Child]:
    """All processes of a run, each with more words and variables of its own, where they are
    given.
    """
    port = free_port()
    return [
        spawn.train(
            config,
            more=[
                *host_words(port, process, count, 100, SECONDS),
                *(more[process] if more else []),
            ],
            **(environments[process] if environments else {}),
        )
        for process in range(count)
    ]


def of_same_data(directory: pathlib.Path, alone: TrainConfig, **mesh: int) -> TrainConfig:
    return short_run(directory, pathlib.Path(alone.data.paths[0]), alone, **mesh)


def assert_one_line(children: Sequence[Child], config: TrainConfig, *words: str) -> None:
    """All have ended with status 2 and one and the same line, before the first update."""
    for child in children:
        child.expect(2, SECONDS)
        (line,) = [line for line in child.errors.splitlines() if line.startswith("error:")]
        assert all(word in line for word in words), line
        assert "Traceback" not in child.errors
    assert not (pathlib.Path(config.run.dir) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {"fsdp": 2}),  # each holds half of the parameters, and trains on half of the rows
        pytest.param(2, {"data": 2, "fsdp": 1}, marks=pytest.mark.slow),
        pytest.param(4, {"data": 2, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one(tmp_path, spawn, alone, count, mesh):
    run = of_same_data(tmp_path / "run", alone, **{"data": 1} | mesh)
    first, *others = [child.expect(0, SECONDS) for child in start(spawn, run, count)]
    ours, theirs = (read_lines(pathlib.Path(config.run.dir)) for config in (run, alone))
    for name in ("step", "train/loss", "train/gradient_norm", "train/tokens"):
        expected = [line[name] for line in theirs if name in line]
        assert [line[name] for line in ours if name in line] == pytest.approx(expected, rel=1e-5)
        assert len(expected) >= STEPS
    assert f"{count} x cpu" in first.output
    assert all("steps" not in child.output for child in others)


@pytest.mark.slow
def test_four_that_are_not_alike_are_told_apart(tmp_path, spawn, alone):
    run = of_same_data(tmp_path / "run", alone, data=4, fsdp=1)
    more = [[], ["--optimizer.learning_rate", "0.5"], [], []]
    children = start(spawn, run, 4, more, [{}, {}, {}, {"HOST_VERSION": "0.0.9"}])
    assert_one_line(
        children,
        run,
        "process 1 of 4 has config optimizer.learning_rate 0.5, the others 0.01",
        "process 3 of 4 has llama_jax 0.0.9, the others ",
    )


def test_one_that_is_not_like_the_other_is_told(tmp_path, spawn, alone):
    run = of_same_data(tmp_path / "run", alone, data=2, fsdp=1)
    children = start(
        spawn, run, 2, [[], ["--optimizer.learning_rate", "0.5"]], [{}, {"HOST_VERSION": "0.0.9"}]
    )
    assert_one_line(
        children,
        run,
        "process 1 of 2 has config optimizer.learning_rate 0.5, the others 0.01",
        "process 1 of 2 has llama_jax 0.0.9, the others ",
    )


def test_other_text_under_the_same_name_is_told(tmp_path, spawn):
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_corpus(folder / "text", documents=20 + number)
    run = short_run(tmp_path / "run", pathlib.Path("text"))
    children = start(
        spawn, run, 2, environments=[{"HOST_DIRECTORY": str(folder)} for folder in folders]
    )
    assert_one_line(children, run, "process 1 of 2 has ", " text (hash) ", ", the others ")


def test_one_that_does_not_come_is_named_in_time(tmp_path, spawn, alone):
    """Three of four come, two of them before the first, whose time is short."""
    run = of_same_data(tmp_path / "run", alone, data=4, fsdp=1)
    port = free_port()
    others = [
        spawn.train(run, more=host_words(port, process, 4, startup=SECONDS)) for process in (1, 3)
    ]
    wait_for_knocks(port, {"llama_jax 1 4", "llama_jax 3 4"})
    first = spawn.train(run, more=host_words(port, 0, 4, startup=10))
    line = "process 2 of 4 did not come within 10 s; start all of them\n"
    assert first.expect(2, SECONDS).errors == f"error: {line}"
    assert [child.expect(2, SECONDS).errors for child in others] == [
        f"error: refused by process 0: {line}"
    ] * 2
