"""The directory of a run: who may write there, how far it is, and what goes when it starts anew."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.training.goodput import RUN_GOODPUT
from llama_jax.training.heartbeat import RUN_HEARTBEAT
from llama_jax.training.metrics import RUN_METRICS
from llama_jax.training.postmortem import RUN_POSTMORTEM
from llama_jax.training.profile import RUN_PROFILE
from llama_jax.training.rewind import RUN_REWINDS
from llama_jax.training.samples import RUN_SAMPLES
from llama_jax.weights.checkpoint_files import list_steps
from llama_jax.weights.load import RUN_CHECKPOINTS

RUN_CONFIG = "config.yaml"
RUN_CONFIG_HISTORY = "config_history"  # a folder: the configs before it


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds a run's directory against a second run; the hold ends with the process, however that ends.

    Raises:
      InputError: if another process trains there.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run.dir: another process trains in {directory}; wait for it, or name another") from None
        yield
    finally:
        os.close(handle)


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a run's directory, 0 if there is none."""
    checkpoints = directory / RUN_CHECKPOINTS
    return max(list_steps(checkpoints), default=0)


def clear_run(directory: Path) -> None:
    """Removes what a run wrote while it trained, so that the next one starts anew; prepared data stays."""
    for name in (RUN_CHECKPOINTS, RUN_PROFILE, RUN_POSTMORTEM, RUN_CONFIG_HISTORY):
        if (directory / name).exists():
            shutil.rmtree(directory / name)
    for name in (RUN_METRICS, RUN_GOODPUT, RUN_SAMPLES, RUN_REWINDS, RUN_HEARTBEAT):
        (directory / name).unlink(missing_ok=True)
    for stacks in directory.glob("hang*.txt"):
        stacks.unlink()
