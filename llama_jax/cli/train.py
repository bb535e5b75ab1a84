"""`train`: a run described by a YAML file and overrides; the same command again goes on where it stopped."""

import os
import pathlib
import signal
import sys
import time
from types import FrameType

from llama_jax.cli.arguments import parse_train, to_yaml
from llama_jax.cli.compilation import keep_compiled_programs
from llama_jax.errors import InputError
from llama_jax.training.config import TrainConfig

_DEFAULT = pathlib.Path("configs/debug.yaml")


class StopRequest:
    """Whether someone asked the run to end: the first SIGINT or SIGTERM saves and ends it, the second interrupts."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print(f"{signal.Signals(number).name}: saving after this step; once more to end at once", file=sys.stderr, flush=True)

    def __call__(self, step: int) -> bool:
        """Asked by the loop after every step."""
        return self._asked


def make_directory(directory: pathlib.Path) -> None:
    """Makes the directory of a run.

    Raises:
      InputError: if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir: {directory} cannot be made ({error.strerror}); name a writable directory") from None
    if not os.access(directory, os.W_OK):
        raise InputError(f"run.dir: {directory} cannot be written; name a writable directory")


def finished_line(config: TrainConfig, step: int) -> str:
    """What is said where there is nothing left to do."""
    return (
        f"{config.run.dir} has {step} of {config.run.steps} steps: nothing left to do. Generate with: python infer.py --model "
        f"{config.run.dir} --prompt TEXT; train on with --run.steps N, or anew with --run.overwrite true"
    )


def main(arguments: list[str], default: pathlib.Path = _DEFAULT) -> int:
    """Runs `train` and returns its exit status: 0 when done or cleanly stopped, 5 when the last state could not be saved."""
    config = parse_train(arguments, default)
    directory = pathlib.Path(config.run.dir)
    make_directory(directory)
    from llama_jax.training.display import open_display
    from llama_jax.training.loop import RUN_CONFIG, Run, clear_run, newest_step, summary_lines

    keep_compiled_programs()
    stop = StopRequest()
    if config.run.overwrite:
        clear_run(directory)
    step = newest_step(directory)
    if step >= config.run.steps:
        print(finished_line(config, step))
        return 0
    started = time.perf_counter()
    display = open_display(sys.stdout, interactive=sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb")
    rows: dict[str, str] = {}
    try:
        run = Run(config, display)
        (directory / RUN_CONFIG).write_text(to_yaml(config), encoding="utf-8")
        summary = run.train(stop)
        rows = summary_lines(summary, time.perf_counter() - started)
    finally:
        display.finish(rows)
    return 0 if summary.saved else 5
