"""`train`: a run described by a YAML file and overrides; the same command again goes on where it stopped."""

import dataclasses
import logging
import os
import pathlib
import sys
import threading
import time

from llama_jax.cli.arguments import parse_train, to_yaml
from llama_jax.cli.automatic import candidates, first_that_fits, job_here, recorded_config, with_remat
from llama_jax.cli.compilation import keep_compiled_programs, make_room_for_virtual_devices
from llama_jax.cli.distributed import several_processes
from llama_jax.cli.program import DAMAGED
from llama_jax.cli.stopping import StopRequest
from llama_jax.config import LlamaConfig
from llama_jax.data.atomic import atomic_write
from llama_jax.errors import DeviceMemoryError, InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_distributed import DistributedConfig
from llama_jax.training.wall_time import wall_seconds

_DEFAULT = pathlib.Path("configs/debug.yaml")
_EXIT_SECONDS = 60  # after a run with saves that have failed


def quiet_libraries() -> None:
    """Leaves it to the loop to tell, in a line, of a checkpoint that failed: Orbax logs hundreds, one traceback a thread."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shown = sys.unraisablehook
    # What TensorStore's threads say when a save has failed and its event loop is gone.
    sys.unraisablehook = lambda given: None if str(given.exc_value) == "Event loop is closed" else shown(given)


def end_within(seconds: float, status: int) -> None:
    """Ends the program if it has not ended by itself by then: a thread of a save that has failed may wait for ever."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()


def write_config(config: TrainConfig, path: pathlib.Path) -> None:
    """Writes the resolved config, from which the run can be gone on with: without the wish to start anew, on any processes."""
    lasting = dataclasses.replace(config, run=dataclasses.replace(config.run, overwrite=False), distributed=DistributedConfig())
    with atomic_write(path) as file:
        file.write(to_yaml(lasting).encode())


def finished_line(config: TrainConfig, step: int) -> str:
    """What is said where there is nothing left to do."""
    from llama_jax.training.changed_settings import schedule_choices

    return (
        f"{config.run.dir} has {step} of {config.run.steps} steps: nothing left to do. Generate with: python infer.py --model "
        f"{config.run.dir} --prompt TEXT; train on with --run.steps N (and say what the learning rate is to do: "
        f"{schedule_choices(recorded_config(config.run.dir) or config, step)}), or anew with --run.overwrite true"
    )


def architecture(path: str) -> LlamaConfig:
    """The architecture of a model on disk."""
    from llama_jax.weights.open import open_model

    return open_model(path).source.config


def memory_lines(config: TrainConfig, error: Exception) -> list[str]:
    """What is said of a run that a device has too little memory for, and what may help; nothing for another error."""
    from llama_jax.planning.advice import advice, is_out_of_memory, wanted_bytes

    if not is_out_of_memory(str(error)):
        return []
    import jax

    kind = jax.local_devices()[0].device_kind
    wanted = wanted_bytes(str(error))
    asked = "" if wanted is None else f" ({wanted / 1e9:.3g} GB more were asked for)"
    first = f"a device ({kind}) has run out of memory{asked}; checkpoints of {config.run.dir} are untouched"
    try:
        job, memory = job_here(config)
    except InputError:
        return [first]
    return [first, *advice(job, memory)]


def main(arguments: list[str], default: pathlib.Path = _DEFAULT) -> int:
    """Runs `train` and returns its exit status: 0 when done or cleanly stopped, 5 when the last state could not be saved.

    Raises:
      DeviceMemoryError: when a device has run out of memory.
    """
    started = time.monotonic()
    config = parse_train(arguments, default, architecture)
    make_room_for_virtual_devices()
    quiet_libraries()
    with several_processes(config.distributed, os.environ) as hosts:
        return _go_on(config, hosts, started)


def _go_on(config: TrainConfig, hosts: Hosts, started: float) -> int:
    """Trains where there is something left to do."""
    from llama_jax.training.identity import require_same_model
    from llama_jax.training.preflight import describe_program, require_same
    from llama_jax.training.run_directory import newest_step

    directory = pathlib.Path(config.run.dir)
    require_same(hosts, "program", describe_program(config) if hosts.count > 1 else {})
    step = int(hosts.agree("newest step", str(0 if config.run.overwrite else newest_step(directory))))
    if step >= config.run.steps:
        require_same_model(config)
        if hosts.first:
            print(finished_line(config, step))
        return 0
    keep_compiled_programs()
    before = recorded_config(config.run.dir) if step else None
    return _train(config, before, candidates(config, hosts, going_on=step > 0), hosts, started)


def _train(config: TrainConfig, before: TrainConfig | None, remats: tuple[str, ...], hosts: Hosts, started: float) -> int:
    from llama_jax.training.aside import Aside
    from llama_jax.training.display import Display, open_display
    from llama_jax.training.hosts import preempted
    from llama_jax.training.loop import Run
    from llama_jax.training.run_directory import RUN_CONFIG
    from llama_jax.training.summary import summary_lines

    directory = pathlib.Path(config.run.dir)
    stop = StopRequest(
        directory, started + wall_seconds(config.run.max_time), preempted if hosts.count > 1 else None, hosts.first
    )
    interactive = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    aside = Aside(sys.stderr, f"process {hosts.process}: ")
    display: Display = open_display(sys.stdout, interactive) if hosts.first else aside
    rows: dict[str, str] = {}
    run: Run | None = None

    def settle(config: TrainConfig) -> TrainConfig:
        """The config with the setting of remat that fits."""
        return with_remat(config, first_that_fits(config, remats, hosts, display.event))

    try:
        run = Run(with_remat(config, remats[0]), display, hosts, before)
        summary = run.train(stop, settle, lambda config: write_config(config, directory / RUN_CONFIG))
        rows = summary_lines(summary, time.monotonic() - started)
        stop.close()
    except RuntimeError as error:  # the runtime's own errors are of this kind
        lines = memory_lines(run.config if run else with_remat(config, remats[0]), error)
        if not lines:
            raise
        raise DeviceMemoryError(*lines) from None
    finally:
        display.finish(rows)
    status = 0 if summary.saved else DAMAGED
    if summary.failed_saves:
        end_within(_EXIT_SECONDS, status)
    return status
