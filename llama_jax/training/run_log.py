"""Everything that a run writes down about itself while it trains: metrics, the time split, goodput,
signs of life.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from llama_jax.accounting import training_flops_per_token
from llama_jax.parallel.chips import peak_flops
from llama_jax.training.config import TrainConfig, profiled_steps
from llama_jax.training.goodput import RUN_GOODPUT, Clock, Goodput, GoodputLog
from llama_jax.training.metrics import RUN_METRICS, Metric, MetricsFile, StepRecord, open_trackers
from llama_jax.training.recovery import Rewind, in_words
from llama_jax.training.step import StepMetrics
from llama_jax.training.watchdog import RUN_HEARTBEAT, Heartbeat, Watchdog, hang_file

# --- step log ---
#
# From the figures of single updates to records, without waiting for the device in between.


class StepLog:
    """Figures of the updates since the last record, left on the device until a record is made.

    The time of an update is the time that the ledger gives neither to evaluation nor to the
    compilation in
      the first update: data and
    saving count, as they do for whoever waits for the run.

    Args:
      config: of the run.
      tokens_before: counts the tokens of the steps before a step.
      device_kinds: `device_kind` of each device that trains, for MFU; none is reported where its
        peak is not known.
      clock: the ledger that the loop books its parts in: `with clock("data"):`.
      goodput: of the run, over restarts; none is reported if `None`.
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
        self._flops_per_token = flops_per_token(config)
        self._peak = total_peak(device_kinds)
        self._pending: list[StepMetrics] = []
        self._fetched: list[StepMetrics] = []
        self._timed = 0  # updates since the clock was started
        self._first_seconds: float | None = None
        self._since = time.perf_counter()
        self._clock = Clock() if clock is None else clock
        self._goodput = goodput

    def start_clock(self) -> None:
        """Leaves the time since the last record out of the speed of the next one."""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside of a `with` out of the speed of the next record."""
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
        """Forgets the updates since the last record, `step` in all, and books their time as lost:
        `to` are kept.
        """
        if self._goodput is not None:
            self._goodput.add(step, self._clock.take())
            self._goodput.go_back(to)
        self._pending, self._fetched, self._timed = [], [], 0
        self.start_clock()

    def record(self, step: int) -> StepRecord:
        """The mean loss of the good updates since the last record, the latest of everything else,
        and the speed.

        A record of the first update alone has no better time to show than one with the compilation
        in it.
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
            mfu=None
            if self._peak is None
            else self._flops_per_token * tokens_per_step / seconds / self._peak,
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
    each, rank = flops_per_token(config), config.adapter.rank
    more = 2 if config.preference.beta else 0  # the model without adapters, forward
    products = (
        f"{4 + more} matmul parameters + 6 of the adapters" if rank else "6 matmul parameters"
    )
    formula = (
        f"{products} + {6 + more} layers heads head_dim length FLOPs a token (causal), no "
        "recomputation"
    )
    return (
        f"{formula}: {each:.3g}; peak {peak / len(device_kinds) / 1e12:g} TFLOP/s a device, "
        "dense bfloat16"
    )


def flops_per_token(config: TrainConfig) -> int:
    """FLOPs of a run for one token, as plans count them."""
    adapter = config.adapter
    return training_flops_per_token(
        config.model,
        config.data.length,
        adapter.rank,
        adapter.targets,
        reference=config.preference.beta > 0,
    )


# --- profile ---
#
# A trace of some updates: what host and devices do in them, for whoever looks for time that is
# lost.


RUN_PROFILE = "profile"  # in the directory of a run
_PERFETTO = "perfetto_trace.json.gz"


class Trace:
    """Traces the steps of `run.profile`; training never fails for its sake.

    Args:
      profile: `FIRST:LAST`, or `None` for none; of these steps, those that this program does.
      directory: to write to.
      say: takes one line of text: where the trace is, or why there is none.
    """

    def __init__(self, profile: str | None, directory: Path, say: Callable[[str], None]) -> None:
        self._wanted = profiled_steps(profile)
        self._directory, self._say = directory, say
        self._traced: list[int] = []

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Traces the block if the step is wanted; after the last wanted one the trace is written.

        Args:
          step: number of the update that is dispatched in the block, from 1.
        """
        if step not in self._wanted:
            yield
            return
        if not self._traced:
            self._attempt(self._start)
        self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._wanted and step == self._wanted[-1]:
            jax.block_until_ready(jax.live_arrays())  # the update is still under way
            self.close()

    def close(self) -> None:
        """Writes a trace that is still under way, where the run ends before the last step that is
        wanted.
        """
        if self._traced and self._wanted:
            self._attempt(self._stop)
        self._wanted = range(0)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the frames of Python would be most of the trace
        alone = (
            jax.process_count() == 1
        )  # the file for Perfetto is not made where several hosts write into one folder
        jax.profiler.start_trace(
            self._directory, create_perfetto_trace=alone, profiler_options=options
        )

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        files = sorted(
            self._directory.glob(f"plugins/profile/*/{_PERFETTO}"),
            key=lambda path: path.stat().st_mtime_ns,
        )
        opened = f"open {files[-1]} at https://ui.perfetto.dev, or " if files else ""
        self._say(
            f"trace     steps {self._traced[0]} to {self._traced[-1]}: {opened}xprof "
            f"--logdir {self._directory}"
        )

    def _attempt(self, action: Callable[[], None]) -> None:
        """Does something with the profiler; after a failure nothing more is traced."""
        try:
            action()
        except Exception as error:  # whatever the profilers of the platforms raise
            self._wanted = range(0)
            self._say(
                f"warning: run.profile: no trace ({type(error).__name__}: "
                f"{' '.join(str(error).split()):.160})"
            )


# --- books ---


class RunLog:
    """The books of a run, open for this program.

    Attributes:
      clock: the ledger of the wall time: `with books.clock("data"):`.
      log: figures of updates, made into records.
      trace: of the steps of `run.profile`.
      watchdog: ends the program when the run stands still: `with books.watchdog:`.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokens_before: Callable[[int], int],
        device_kinds: Sequence[str],
        step: int,
        warn: Callable[[str], None],
        writing: bool = True,
    ) -> None:
        """Opens them.

        Args:
          config: of the run.
          tokens_before: counts the tokens of the steps before a step.
          device_kinds: `device_kind` of each device that trains.
          step: updates of the state to resume from.
          warn: takes one line of text where something cannot be written.
          writing: false in the processes of a run that leave the writing to the first.
        """
        directory = Path(config.run.dir)
        trackers = config.run.trackers if writing else ()
        self._path, self._warn = directory / RUN_METRICS if writing else None, warn
        self.clock = Clock()
        self._metrics = MetricsFile(self._path, step, warn)
        self._goodput = GoodputLog(directory / RUN_GOODPUT if writing else None, step, warn)
        self._trackers = open_trackers(trackers, directory, dataclasses.asdict(config), step, warn)
        self.trace = Trace(config.run.profile, directory / RUN_PROFILE, warn)
        self._heartbeat = Heartbeat(directory / RUN_HEARTBEAT if writing else None)
        self._loss: Metric = None
        self.watchdog = Watchdog(hang_file(directory), config.run.hang_seconds, self.clock)
        self.step_log = StepLog(config, tokens_before, device_kinds, self.clock, self._goodput)

    def add(self, step: int, figures: StepMetrics) -> None:
        """Takes the figures of an update that is on its way."""
        self.watchdog.begun(step, figures.loss)  # type: ignore[arg-type]  # the stubs of JAX leave `is_ready` out
        self.step_log.add(figures)

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Keeps figures of a step: those of its update, or of the evaluation after it."""
        self._metrics.write(step, metrics)
        self._trackers.log(step, metrics)
        self._loss = metrics.get("train/loss", self._loss)
        self._heartbeat.beat(step, self._loss)

    def event(self, step: int, event: str, **facts: Metric | str) -> None:
        """Keeps something that happened at a step, among the metrics."""
        self._metrics.event(step, event, **facts)

    def go_back(self, step: int, to: int, rewind: Rewind) -> None:
        """Forgets updates that the run, at `step`, has gone back from; the metrics after `to` are
        dropped, as at a restart.
        """
        self.step_log.go_back(step, to)
        self._metrics.close()
        self._metrics = MetricsFile(self._path, to, self._warn)
        left_out = {"steps": in_words(rewind.steps, 1), "data_steps": in_words(rewind.data)}
        self._metrics.event(to, "rewound", reason=rewind.reason, at=step, **left_out)

    def close(self, step: int) -> Goodput:
        """Closes them; where the wall time of the run went."""
        self.trace.close()
        self.step_log.close(step)
        self._heartbeat.beat(step, self._loss, always=True)
        self._metrics.close()
        self._goodput.close()
        self._trackers.close()
        return self._goodput.goodput
