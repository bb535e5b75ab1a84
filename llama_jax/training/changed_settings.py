"""A run resumed with other settings: what has changed, what that does to the learning rate, and the configs before it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.data.atomic import atomic_write
from llama_jax.training.config import TrainConfig
from llama_jax.training.run_directory import RUN_CONFIG, RUN_CONFIG_HISTORY
from llama_jax.training.schedule import learning_rate_schedule

_OWN = ("distributed.", "run.dir", "run.overwrite")  # of the program, not of the run
_JUMP = 0.05  # relative change of the learning rate that is told; a step of a short decay may change it by some percent


def changed_settings(before: TrainConfig, now: TrainConfig) -> dict[str, str]:
    """Every setting that differs, by its dotted key, as `BEFORE -> NOW`."""
    ours, theirs = _flat(dataclasses.asdict(now)), _flat(dataclasses.asdict(before))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if not key.startswith(_OWN)]
    return {key: f"{theirs.get(key)} -> {ours.get(key)}" for key in keys if theirs.get(key) != ours.get(key)}


def learning_rate_jump(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """What the changes do to the learning rate of the next update, and what to do about it; `None` where it does not jump.

    Args:
      before: the settings so far.
      now: those from here on.
      step: updates done.
    """
    old, new = (float(learning_rate_schedule(c.optimizer, c.run.steps)(step)) for c in (before, now))
    if abs(new - old) <= _JUMP * old:
        return None
    times = f", {new / old:.3g} times as much" if old else ""
    line = f"the learning rate jumps at step {step + 1}: {old:.4g} by the settings so far, {new:.4g} now{times}"
    lengths = [c.optimizer.schedule_steps or c.run.steps for c in (before, now)]
    return line if lengths[0] == lengths[1] else f"{line}; {schedule_choices(before, step)}"


def schedule_choices(before: TrainConfig, step: int) -> str:
    """The two things that are meant by training on, as options.

    Args:
      before: the settings so far.
      step: updates done.
    """
    rate = float(learning_rate_schedule(before.optimizer, before.run.steps)(step))
    length = before.optimizer.schedule_steps or before.run.steps
    return (
        f"--optimizer.schedule_steps {length} keeps the schedule so far, --optimizer.decay_from {step} "
        f"--optimizer.learning_rate {rate:.4g} decays anew from here"
    )


def keep_config(directory: Path, step: int) -> None:
    """Copies the config of a run's directory into its history, before another takes its place.

    The copy is `config_history/until_step_STEP.yaml`, with a number behind it from the second of a step on.

    Args:
      directory: of the run.
      step: updates done with it.
    """
    source, history = directory / RUN_CONFIG, directory / RUN_CONFIG_HISTORY
    if not source.is_file():
        return
    content, number = source.read_bytes(), 1
    while True:
        copy = history / f"until_step_{step}{'' if number == 1 else f'_{number}'}.yaml"
        if not copy.exists():
            history.mkdir(exist_ok=True)
            with atomic_write(copy) as file:
                file.write(content)
        if copy.read_bytes() == content:  # also where a program was killed after it had made the copy
            return
        number += 1


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
