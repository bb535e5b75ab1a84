"""From the figures of single updates to records, without waiting for the device in between."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from llama_jax.accounting import training_flops_per_token
from llama_jax.parallel.peak import peak_flops
from llama_jax.training.clock import Clock
from llama_jax.training.config import TrainConfig
from llama_jax.training.goodput import GoodputLog
from llama_jax.training.metrics import StepRecord
from llama_jax.training.step import StepMetrics


class StepLog:
    """Figures of the updates since the last record, left on the device until a record is made.

    The time of an update is what the ledger does not give to evaluation and to the compilation in the first update: data and
    saving count, as they do for whoever waits for the run.

    Args:
      config: of the run.
      tokens_before: counts the tokens of the steps before a step.
      device_kinds: `device_kind` of each device that trains, for MFU; none is told where its peak is not known.
      clock: the ledger that the loop books its parts in: `with clock("data"):`.
      goodput: of the run, over restarts; none is told where `None`.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokens_before: Callable[[int], int],
        device_kinds: Sequence[str] = (),
        clock: Clock | None = None,
        goodput: GoodputLog | None = None,
    ) -> None:
        self._tokens_before = tokens_before
        self._flops_per_token = training_flops_per_token(config.model, config.data.length)
        self._peak = total_peak(device_kinds)
        self._pending: list[StepMetrics] = []
        self._fetched: list[StepMetrics] = []
        self._timed = 0  # updates since the clock was started
        self._first_seconds: float | None = None
        self._since = time.perf_counter()
        self._clock = Clock() if clock is None else clock
        self._goodput = goodput

    def start_clock(self) -> None:
        """Leaves the time since the last record out of the speed that the next one tells."""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside of a `with` out of the speed that the next record tells."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin

    def add(self, figures: StepMetrics) -> None:
        """Takes the figures of one update; the first, which is compiled, is waited for."""
        self._pending.append(figures)
        if self._first_seconds is not None:
            self._timed += 1
            return
        jax.block_until_ready(figures)
        self._clock.claim("compile")
        self._first_seconds = time.perf_counter() - self._since
        self.start_clock()

    def fetch(self) -> list[StepMetrics]:
        """The figures of the updates since the last call, on the host; waits for them."""
        figures = jax.device_get(self._pending)
        self._fetched += figures
        self._pending = []
        return figures

    def go_back(self, step: int, to: int) -> None:
        """Forgets the updates since the last record, `step` in all, and books their time as lost: `to` are kept."""
        if self._goodput is not None:
            self._goodput.add(step, self._clock.take())
            self._goodput.go_back(to)
        self._pending, self._fetched, self._timed = [], [], 0
        self.start_clock()

    def record(self, step: int) -> StepRecord:
        """The mean loss of the good updates since the last record, the latest of everything else, and the speed.

        A record of the first update alone has no better time to show than one with the compilation in it.
        """
        self.fetch()
        figures = self._fetched
        elapsed = time.perf_counter() - self._since
        timed = max(1, self._timed)
        seconds = elapsed / timed if self._timed else self._first_seconds or elapsed
        tokens = self._tokens_before(step)
        tokens_per_step = (tokens - self._tokens_before(step - timed)) / timed
        self._fetched, self._timed = [], 0
        last = figures[-1]
        losses = [f.loss for f in figures if not f.skipped] or [last.loss]
        parts = self._clock.take()
        return StepRecord(
            step=step,
            loss=float(np.mean(losses)),
            learning_rate=float(last.learning_rate),
            gradient_norm=float(last.grad_norm),
            tokens=tokens,
            tokens_per_second=tokens_per_step / seconds,
            step_seconds=seconds,
            mfu=None if self._peak is None else self._flops_per_token * tokens_per_step / seconds / self._peak,
            time=parts,
            goodput=None if self._goodput is None else self._goodput.add(step, parts),
            more={name: float(value) for name, value in last.more.items()},
        )

    def close(self, step: int) -> None:
        """Books the time after the last record, which went into evaluation and saving."""
        seconds = self._clock.take()
        seconds["save"] = seconds.get("save", 0.0) + seconds.pop("step")
        if self._goodput is not None:
            self._goodput.add(step, seconds)


def total_peak(device_kinds: Sequence[str]) -> float | None:
    """Peak FLOP/s of devices together; `None` where that of one is not known."""
    peaks = [peak_flops(kind) for kind in device_kinds]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def mfu_line(config: TrainConfig, device_kinds: Sequence[str]) -> str:
    """How MFU is reckoned in a run, or why it is not; for its heading."""
    peak = total_peak(device_kinds)
    if peak is None:
        return f"n/a: the peak of {', '.join(sorted(set(device_kinds)))} is not known"
    each = training_flops_per_token(config.model, config.data.length)
    formula = "6 matmul parameters + 6 layers heads head_dim length FLOPs a token (causal), no recomputation"
    return f"{formula}: {each:.3g}; peak {peak / len(device_kinds) / 1e12:g} TFLOP/s a device, dense bfloat16"
