"""From the figures of single updates to records, without waiting for the device in between."""

import time
from collections.abc import Callable

import jax
import numpy as np

from llama_jax.training.metrics import StepRecord
from llama_jax.training.step import StepMetrics


class StepLog:
    """Figures of the updates since the last record, left on the device until a record is made.

    Saving counts as time of the updates, evaluation and the compilation in the first update do not.
    """

    def __init__(self, tokens_before: Callable[[int], int]) -> None:
        """Takes a function that counts the tokens of the steps before a step."""
        self._tokens_before = tokens_before
        self._pending: list[StepMetrics] = []
        self._timed = 0  # updates since the clock was started
        self._first_seconds: float | None = None
        self._since = time.perf_counter()

    def start_clock(self) -> None:
        """Leaves the time since the last record out of the next one."""
        self._since = time.perf_counter()

    def add(self, figures: StepMetrics) -> None:
        """Takes the figures of one update; the first is waited for."""
        self._pending.append(figures)
        if self._first_seconds is not None:
            self._timed += 1
            return
        jax.block_until_ready(figures)
        self._first_seconds = time.perf_counter() - self._since
        self.start_clock()

    def record(self, step: int) -> StepRecord:
        """The mean loss since the last record, the latest of everything else, and the speed.

        A record of the first update alone has no better time to show than one with the compilation in it.
        """
        figures = jax.device_get(self._pending)
        elapsed = time.perf_counter() - self._since
        timed = max(1, self._timed)
        seconds = elapsed / timed if self._timed else self._first_seconds or elapsed
        tokens = self._tokens_before(step)
        tokens_per_step = (tokens - self._tokens_before(step - timed)) / timed
        self._pending, self._timed = [], 0
        last = figures[-1]
        return StepRecord(
            step=step,
            loss=float(np.mean([f.loss for f in figures])),
            learning_rate=float(last.learning_rate),
            gradient_norm=float(last.grad_norm),
            tokens=tokens,
            tokens_per_second=tokens_per_step / seconds,
            step_seconds=seconds,
        )
