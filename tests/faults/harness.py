"""Processes that are to fail: started with a fault, watched, hit by signals; and whether two runs
are the same bit by bit.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tiny_runs import ROOT, child_environment, read_lines, tiny_config, without_speed, write_yaml

from llama_jax.training.config import TrainConfig
from llama_jax.weights.checkpoint import Checkpoints, list_steps
from llama_jax.weights.integrity import by_path
from llama_jax.weights.run import RUN_CHECKPOINTS

CHILD = pathlib.Path(__file__).with_name("child.py")
STEPS = 12  # of a run; checkpoints at 4, 8 and 12
HEARTBEAT = 5  # seconds


class Child:
    """A process in a group of its own, its output and errors in files."""

    def __init__(self, process: subprocess.Popen, out: pathlib.Path, err: pathlib.Path) -> None:
        self.process, self._out, self._err = process, out, err

    @property
    def output(self) -> str:
        return self._out.read_text()

    @property
    def errors(self) -> str:
        return self._err.read_text()

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match:
        """Waits until a line of output or errors matches; a process that ends without one is a
        failure.
        """
        end = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.output, re.MULTILINE) or re.search(
                pattern, self.errors, re.MULTILINE
            )
            if found:
                return found
            if ended or time.monotonic() > end:
                raise AssertionError(
                    f"{pattern!r} did not come (exit {self.process.poll()})\n{self}"
                )
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process (not to its children)."""
        self.process.send_signal(number)

    def signal_at_step(self, number: signal.Signals, step: int) -> None:
        """Sends a signal as soon as the line of a step is shown; in the step itself is
        `LLAMA_JAX_FAULT=in_data:N:term`.
        """
        self.wait_for(rf"^ *{step}/")
        self.send(number)

    def end(self, seconds: float = 300) -> int:
        """Waits for the end; the exit status, negative for a signal."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {seconds} s\n{self}") from None

    def expect(self, status: int, seconds: float = 300) -> "Child":
        """Waits for the end, which is to be with this status."""
        found = self.end(seconds)
        assert found == status, f"exit {found}, {status} expected\n{self}"
        return self

    def kill(self) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __str__(self) -> str:
        return f"--- output\n{self.output[-4000:]}\n--- errors\n{self.errors[-8000:]}"


class Spawner:
    """Starts children and ends those that are left.

    Args:
      logs: directory for their output.
    """

    def __init__(self, logs: pathlib.Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def __call__(
        self, arguments: Sequence[object], fault: str = "", devices: int = 1, **environment: str
    ) -> Child:
        """Starts `python -m llama_jax ARGUMENTS` with faults; `environment` changes that of the
        tests.
        """
        name = f"{len(self._children)}-{arguments[0]}"
        out, err = self._logs / f"{name}.out", self._logs / f"{name}.err"
        command = [sys.executable, str(CHILD), *map(str, arguments)]
        variables = (
            child_environment(devices)
            | {"LLAMA_JAX_FAULT": fault, "PYTHONPATH": str(ROOT)}
            | environment
        )
        with out.open("w") as output, err.open("w") as errors:
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                text=True,
            )
        self._children.append(Child(process, out, err))
        return self._children[-1]

    def train(
        self,
        config: TrainConfig,
        fault: str = "",
        devices: int = 1,
        more: Sequence[str] = (),
        **environment: str,
    ) -> Child:
        """Starts `train` on a run's config (see `make_run`)."""
        return self(
            ["train", "--config", config_file(config), *more], fault, devices, **environment
        )

    def close(self) -> None:
        """Ends what is left."""
        for child in self._children:
            child.kill()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_knocks(port: int, words: set[str], seconds: float = 300) -> None:
    """Waits in the place of process 0 until others have said who they are, and leaves them: they
    come again.
    """
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(seconds)
        while words:
            with server.accept()[0] as connection:
                words = words - {connection.recv(200).decode().strip()}


def host_words(
    port: int, process: int, count: int, heartbeat: int = HEARTBEAT, startup: int = 60
) -> list[str]:
    """What tells a process that it is one of several."""
    values = {
        "coordinator": f"127.0.0.1:{port}",
        "processes": count,
        "process": process,
        "heartbeat_seconds": heartbeat,
        "startup_seconds": startup,
    }
    return [word for key, value in values.items() for word in (f"--distributed.{key}", str(value))]


def config_file(config: TrainConfig) -> pathlib.Path:
    """Where `make_run` puts the config of a run: beside its directory."""
    return pathlib.Path(f"{config.run.dir}.yaml")


def make_run(
    directory: pathlib.Path, corpus: pathlib.Path, like: TrainConfig | None = None, **changes: dict
) -> TrainConfig:
    """A run of 12 steps with its YAML file beside it; its data are copied from a run that has them.

    Args:
      directory: of the run; not there yet.
      corpus: text.
      like: a run on the same data.
      changes: values such as `run={"steps": 3}`, by section.
    """
    basics = {"steps": STEPS, "eval_every": 0, "checkpoint_every": 4}
    config = tiny_config(
        directory, corpus, **({"run": basics} | changes | {"run": basics | changes.get("run", {})})
    )
    if like is not None:
        shutil.copytree(pathlib.Path(like.run.dir) / "data", directory / "data")
    directory.parent.mkdir(parents=True, exist_ok=True)
    write_yaml(config_file(config), config)
    return config


def copy_run(config: TrainConfig, directory: pathlib.Path) -> TrainConfig:
    """A copy of a run in another directory, to be spoilt."""
    shutil.copytree(config.run.dir, directory)
    copied = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)))
    write_yaml(config_file(copied), copied)
    return copied


def checkpoint_steps(config: TrainConfig) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    return list_steps(pathlib.Path(config.run.dir) / RUN_CHECKPOINTS)


def leaf_hashes(config: TrainConfig, step: int) -> dict[str, str]:
    """SHA-256 of the bytes of every array of a checkpoint, by path, read anew and verified."""
    from llama_jax.parallel.mesh import make_mesh
    from llama_jax.training.setup import make_recipe
    from llama_jax.training.step import state_shapes

    mesh = make_mesh(devices=jax.devices()[:1])
    like = state_shapes(make_recipe(config), mesh)
    with Checkpoints.open(pathlib.Path(config.run.dir) / RUN_CHECKPOINTS, keep=1000) as checkpoints:
        leaves = by_path(checkpoints.restore(step, like))
    return {
        path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves.items()
    }


def assert_bitwise(run: TrainConfig, reference: TrainConfig, losses: bool = True) -> None:
    """Both runs ended in the same state, bit by bit, by way of the same losses, learning rates and
    tokens.

    Args:
      run: the one that was disturbed.
      reference: the one that was not.
      losses: compare the metrics too (not where a disk could not take them).
    """
    steps = reference.run.steps
    assert checkpoint_steps(run)[-1] == checkpoint_steps(reference)[-1] == steps
    ours, theirs = leaf_hashes(run, steps), leaf_hashes(reference, steps)
    assert len(ours) > 30
    assert ours.keys() == theirs.keys()
    assert [path for path in ours if ours[path] != theirs[path]] == []
    if losses:
        assert metrics(run) == metrics(reference)


def metrics(config: TrainConfig) -> list[dict]:
    """Losses, learning rates, gradient norms and tokens of a run, step by step; what was evaluated
    may differ.
    """
    lines = without_speed(
        line for line in read_lines(pathlib.Path(config.run.dir)) if "event" not in line
    )
    return [
        {name: value for name, value in line.items() if not name.startswith("held_out/")}
        for line in lines
    ]


@contextlib.contextmanager
def spawner(logs: pathlib.Path) -> Iterator[Spawner]:
    """A `Spawner` whose children do not outlive the `with`."""
    children = Spawner(logs)
    try:
        yield children
    finally:
        children.close()
