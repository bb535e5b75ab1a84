"""`train`: a run described by a YAML file and overrides; the same command again goes on where it stopped."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import sys
import time
from types import FrameType

from llama_jax.cli.arguments import parse_train, to_yaml
from llama_jax.cli.compilation import keep_compiled_programs, make_room_for_virtual_devices
from llama_jax.cli.program import DAMAGED
from llama_jax.config import LlamaConfig
from llama_jax.data.atomic import atomic_write
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
        line = f"{signal.Signals(number).name}: saving after this step; once more to end at once\n"
        with contextlib.suppress(OSError):  # nobody may be listening any more; the state is to be saved all the same
            os.write(2, line.encode())  # print is not safe in a handler: the signal may have come inside another print

    def __call__(self, step: int) -> bool:
        """Asked by the loop after every step."""
        return self._asked


def quiet_libraries() -> None:
    """Leaves it to the loop to tell, in a line, of a checkpoint that failed: Orbax logs hundreds, one traceback a thread."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def write_config(config: TrainConfig, path: pathlib.Path) -> None:
    """Writes the resolved config, from which the run can be gone on with: so without the wish to start anew."""
    lasting = dataclasses.replace(config, run=dataclasses.replace(config.run, overwrite=False))
    with atomic_write(path) as file:
        file.write(to_yaml(lasting).encode())


def finished_line(config: TrainConfig, step: int) -> str:
    """What is said where there is nothing left to do."""
    return (
        f"{config.run.dir} has {step} of {config.run.steps} steps: nothing left to do. Generate with: python infer.py --model "
        f"{config.run.dir} --prompt TEXT; train on with --run.steps N, or anew with --run.overwrite true"
    )


def architecture(path: str) -> LlamaConfig:
    """The architecture of a model on disk."""
    from llama_jax.weights.open import open_model

    return open_model(path).source.config


def main(arguments: list[str], default: pathlib.Path = _DEFAULT) -> int:
    """Runs `train` and returns its exit status: 0 when done or cleanly stopped, 5 when the last state could not be saved."""
    config = parse_train(arguments, default, architecture)
    make_room_for_virtual_devices()
    from llama_jax.training.display import open_display
    from llama_jax.training.identity import require_same_model
    from llama_jax.training.loop import RUN_CONFIG, Run, newest_step, summary_lines

    directory = pathlib.Path(config.run.dir)
    step = 0 if config.run.overwrite else newest_step(directory)
    if step >= config.run.steps:
        require_same_model(config)
        print(finished_line(config, step))
        return 0
    keep_compiled_programs()
    quiet_libraries()
    stop = StopRequest()
    started = time.perf_counter()
    display = open_display(sys.stdout, interactive=sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb")
    rows: dict[str, str] = {}
    try:
        run = Run(config, display)
        write_config(run.config, directory / RUN_CONFIG)
        summary = run.train(stop)
        rows = summary_lines(summary, time.perf_counter() - started)
    finally:
        display.finish(rows)
    return 0 if summary.saved else DAMAGED
