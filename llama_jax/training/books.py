"""Everything that a run writes down about itself while it trains: metrics, the time split, goodput, signs of life."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llama_jax.training.clock import Clock
from llama_jax.training.config import TrainConfig
from llama_jax.training.goodput import RUN_GOODPUT, Goodput, GoodputLog
from llama_jax.training.heartbeat import RUN_HEARTBEAT, Heartbeat
from llama_jax.training.metrics import RUN_METRICS, Metric, MetricsFile
from llama_jax.training.profile import RUN_PROFILE, Trace
from llama_jax.training.rewind import Rewind
from llama_jax.training.step import StepMetrics
from llama_jax.training.step_log import StepLog
from llama_jax.training.trackers import open_trackers
from llama_jax.training.watch import in_words
from llama_jax.training.watchdog import Watchdog, hang_file


class Books:
    """The books of a run, open for this program.

    Attributes:
      clock: the ledger of the wall time: `with books.clock("data"):`.
      log: figures of updates, made into records.
      trace: of the steps of `run.profile`.
      watchdog: ends the program when the run stands still: `with books.watchdog:`.
    """

    def __init__(
        self, config: TrainConfig, tokens_before: Callable[[int], int], device_kinds: Sequence[str], step: int,
        warn: Callable[[str], None], writing: bool = True,
    ) -> None:  # fmt: skip
        """Opens them.

        Args:
          config: of the run.
          tokens_before: counts the tokens of the steps before a step.
          device_kinds: `device_kind` of each device that trains.
          step: updates that the state to go on with has.
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
        self.log = StepLog(config, tokens_before, device_kinds, self.clock, self._goodput)

    def add(self, step: int, figures: StepMetrics) -> None:
        """Takes the figures of an update that is on its way."""
        self.watchdog.begun(step, figures.loss)  # type: ignore[arg-type]  # the stubs of JAX leave `is_ready` out
        self.log.add(figures)

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Keeps figures of a step: those of its update, or of the evaluation after it."""
        self._metrics.write(step, metrics)
        self._trackers.log(step, metrics)
        self._loss = metrics.get("train/loss", self._loss)
        self._heartbeat.beat(step, self._loss)

    def go_back(self, step: int, to: int, rewind: Rewind) -> None:
        """Forgets updates that the run, at `step`, has gone back from; the metrics after `to` are dropped, as at a restart."""
        self.log.go_back(step, to)
        self._metrics.close()
        self._metrics = MetricsFile(self._path, to, self._warn)
        left_out = {"steps": in_words(rewind.steps, 1), "data_steps": in_words(rewind.data)}
        self._metrics.event(to, "rewound", reason=rewind.reason, at=step, **left_out)

    def close(self, step: int) -> Goodput:
        """Closes them; where the wall time of the run went."""
        self.trace.close()
        self.log.close(step)
        self._heartbeat.beat(step, self._loss, always=True)
        self._metrics.close()
        self._goodput.close()
        self._trackers.close()
        return self._goodput.goodput
