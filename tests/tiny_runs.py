"""Runs that take seconds: a corpus whose documents can be told apart, a tiny config, train.py as a
process.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import jax
import yaml

from llama_jax.config import LlamaConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.config import RunConfig, TrainConfig
from llama_jax.training.config_sections import DataConfig, OptimizerConfig
from llama_jax.training.loop import RUN_CHECKPOINTS
from llama_jax.training.setup import make_recipe
from llama_jax.training.step import TrainState, state_shapes
from llama_jax.weights.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
MODEL = LlamaConfig(
    vocab_size=320,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context_length=64,
    tied_head=True,
)


def write_corpus(folder: pathlib.Path, documents: int = 20) -> pathlib.Path:
    """Documents of random words, each line with the document's number in angle brackets."""
    source = random.Random(0)
    folder.mkdir()
    for number in range(documents):
        lines = [f"<{number}> {' '.join(source.choices(WORDS, k=6))}\n" for _ in range(20)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def tiny_config(directory: pathlib.Path, corpus: pathlib.Path, **changes) -> TrainConfig:
    """A run of 12 steps; `changes` are values such as `run={"steps": 3}`, by section."""
    config = TrainConfig(
        run=RunConfig(dir=str(directory), steps=12, log_every=1, eval_every=5, checkpoint_every=4),
        model=MODEL,
        data=DataConfig(
            paths=(str(corpus),), vocab_size=320, held_out_fraction=0.2, length=32, batch_size=4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )
    sections = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in changes.items()
    }
    return dataclasses.replace(config, **sections)


def write_yaml(path: pathlib.Path, config: TrainConfig) -> pathlib.Path:
    values = dataclasses.asdict(config)
    values["data"]["paths"] = list(config.data.paths)
    path.write_text(yaml.safe_dump(values))
    return path


def child_environment(devices: int = 1) -> dict[str, str]:
    """As the tests have it, compiled programs shared, but with so many virtual devices."""
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
    )
    changes = {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "100",
        # Threads of XLA's pool, by default one a core: collectives of virtual devices, which block
        # theirs, can take them all and then wait for ever for the one that has none.
        "NPROC": "16",
    }
    return {**os.environ, **changes}


def start_train(arguments: list[str], devices: int = 1, **options) -> subprocess.Popen:
    """train.py as a process of its own, its output piped."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    usual = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": child_environment(devices),
    }
    return subprocess.Popen(command, **(usual | options))


def train(
    arguments: list[str], devices: int = 1, status: int = 0, **options
) -> subprocess.CompletedProcess:
    """train.py from beginning to end, which is to exit with `status`."""
    with start_train(arguments, devices, **options) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == status, f"exit {process.returncode}\n{output}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def read_state(config: TrainConfig, step: int) -> TrainState:
    """What a run's checkpoint holds, on one device."""
    like = state_shapes(make_recipe(config), make_mesh(devices=jax.devices()[:1]))
    with Checkpoints.open(pathlib.Path(config.run.dir) / RUN_CHECKPOINTS, keep=1000) as checkpoints:
        return checkpoints.restore(step, like)


def state_bytes(state: TrainState) -> dict[str, bytes]:
    """Every bit of every array, by path."""
    return {
        jax.tree_util.keystr(path): bytes(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    }


def read_lines(directory: pathlib.Path) -> list[dict]:
    """The metrics of a run; every line is to be one JSON object. What is evaluated after a step
    belongs to the step's line.
    """
    entries: list[dict] = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entries and entries[-1]["step"] == entry["step"] and "event" not in entry | entries[-1]:
            assert all(name == "step" or name.startswith("held_out/") for name in entry)
            entries[-1] |= entry
        else:
            entries.append(entry)
    return entries


def without_speed(lines: list[dict]) -> list[dict]:
    """Metrics without what differs from run to run."""
    return [
        {name: value for name, value in line.items() if not name.startswith("speed/")}
        for line in lines
    ]


def snapshot(directory: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory: time of change and content."""
    paths = sorted(directory.rglob("*"))
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }
