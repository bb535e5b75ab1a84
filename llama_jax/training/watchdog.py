"""Ends a run that stands still: all stacks are written down, then the process exits with status 3.

A file system or a collective that never answers shows in no error. A thread of its own asks how
long ago an update was completed; the loop only reports each update that it has begun.
"""

import collections
import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, runtime_checkable

import jax

from llama_jax.storage import atomic_write
from llama_jax.training.goodput import Clock
from llama_jax.training.metrics import Metric

HUNG = 3  # exit status

# Allowance for other work, as a multiple of the time of an update: nobody knows beforehand how long
# it will be.
_ALLOWANCE: Mapping[str, float] = {"compile": 12, "eval": 12, "save": 6}
_TYPICAL = 10  # times the median time of an update that are never a hang
_WINDOW = 64  # updates whose median is used
# between two looks that lie apart more usual intervals than this, the process itself was stopped
_LOOKS = 5
_WRITING = 10  # seconds for the file of stacks, on a disk that may be what hangs


@runtime_checkable
class Figure(Protocol):
    """Something that a device computes, as a `jax.Array` is."""

    def is_ready(self) -> bool:
        """Whether it is computed; does not wait."""


class Watchdog:
    """Watches the updates of one run; a context manager: outside of it nothing is watched.

    Without an update, or a change of the loop's part, for longer than `max(seconds, 10 x the median
    time of an update)`, the run is ended. The compiler, an evaluation or a save may take some
    multiple of that, or ten times its earlier duration.

    Args:
      path: of the file that stacks are written to, see `hang_file`.
      seconds: the least time without an update that is a hang; 0 watches nothing.
      clock: of the loop; knows the part under way.
      expire: called in the end, with the line to print.
      now: seconds that never run backwards.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        clock: Clock,
        expire: Callable[[Path, str], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._seconds, self._clock, self._now = path, seconds, clock, now
        self._expire = end_process if expire is None else expire
        self._begun: collections.deque[tuple[int, Figure]] = collections.deque()
        self._spent: collections.deque[float] = collections.deque(
            maxlen=_WINDOW
        )  # seconds of updates
        self._longest: dict[str, float] = {}  # seconds by part
        self._step: int | None = None  # the last update that was completed
        self._turn, self._part = clock.turns, clock.part
        self._looked = self._completed = now()
        self._waited = 0.0
        self._every = min(1.0, seconds / 10)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = threading.get_ident()

    def begun(self, step: int, figure: Figure) -> None:
        """An update is on its way to the device.

        Args:
          step: its number.
          figure: something that it computes, such as the loss.
        """
        if self._thread is not None:
            self._begun.append((step, figure))

    def look(self) -> None:
        """Looks at progress since the last look, and ends the run if there was none for
        too long.
        """
        now, turn, part = self._now(), self._clock.turns, self._clock.part
        self._waited += min(now - self._looked, _LOOKS * self._every)
        self._looked = now
        if self._take_completed(now) or turn != self._turn:
            if self._part is not None:
                self._longest[self._part] = max(self._longest.get(self._part, 0.0), self._waited)
            self._waited = 0.0
        self._turn, self._part = turn, part
        limit = self._limit(part)
        if self._waited > limit:
            self._expire(self._path, self._told(part, limit))

    def _told(self, part: str | None, limit: float) -> str:
        """What is said of a run that stands still."""
        last = "no step was completed" if self._step is None else f"step {self._step} was the last"
        return (
            f"error: the run has stood still for {self._waited:.0f} s in "
            f"{part or 'an update'} ({last}; at most {limit:.0f} s, "
            f"run.hang_seconds {self._seconds:g}); stacks are in {self._path}"
        )

    def _take_completed(self, now: float) -> bool:
        """Drops the updates that the device has done; whether there were any."""
        done, first = 0, self._step is None
        while self._begun and self._begun[0][1].is_ready():
            self._step = self._begun.popleft()[0]
            done += 1
        if done:
            if not first:  # which was compiled before
                self._spent.append((now - self._completed) / done)
            self._completed = now
        return done > 0

    def _limit(self, part: str | None) -> float:
        """Seconds that the part under way may last without a sign of life."""
        limit = max(
            self._seconds, _TYPICAL * statistics.median(self._spent) if self._spent else 0.0
        )
        first = part is None and self._step is None  # which is traced, compiled and waited for
        if part not in _ALLOWANCE and (
            first or _compiles(sys._current_frames().get(self._watched))
        ):
            part = "compile"
        if part is None or part not in _ALLOWANCE:
            return limit
        return max(_ALLOWANCE[part] * limit, _TYPICAL * self._longest.get(part, 0.0))

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._watched = threading.get_ident()
            self._looked = self._completed = self._now()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def hang_file(directory: Path) -> Path:
    """Where the stacks of a run that stands still are written; each process has a file of its
    own.
    """
    process = jax.process_index()
    return directory / (f"hang-{process}.txt" if process else "hang.txt")


def _compiles(frame: FrameType | None) -> bool:
    """Whether a stack is inside JAX's compiler."""
    while frame is not None:
        if frame.f_code.co_filename.replace(os.sep, "/").endswith("jax/_src/compiler.py"):
            return True
        frame = frame.f_back
    return False


def end_process(path: Path, line: str) -> None:
    """Writes a line and the stacks of all threads to standard error and to a file, then ends the
    process with status 3.
    """
    os.write(2, f"{line}\n".encode())
    faulthandler.dump_traceback(2)
    # From yet another thread: this disk may be what hangs.
    writer = threading.Thread(target=_write_stacks, args=(path, line), name="stacks", daemon=True)
    writer.start()
    writer.join(_WRITING)
    os._exit(HUNG)


def _write_stacks(path: Path, line: str) -> None:
    with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {line}\n\n")
        file.flush()
        faulthandler.dump_traceback(file)


# --- heartbeat ---
#
# A small file that says how far a run is, for whoever watches from outside: `{"step": 40, "time":
# ..., "loss": 2.31}`.


RUN_HEARTBEAT = "heartbeat.json"  # in the directory of a run
_EVERY = 10.0  # seconds


class Heartbeat:
    """Writes the file, whole or not at all, at most every ten seconds; a failing disk is reported
    elsewhere.

    Args:
      path: the file; `None` to write nothing.
      now: seconds since 1970.
    """

    def __init__(self, path: Path | None, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._last: float | None = None

    def beat(self, step: int, loss: Metric, always: bool = False) -> None:
        """Says that an update is done.

        Args:
          step: updates done.
          loss: the latest known.
          always: even if the last beat was less than ten seconds ago.
        """
        if self._path is None:
            return
        now = self._now()
        if not always and self._last is not None and 0 <= now - self._last < _EVERY:
            return
        self._last = now
        with contextlib.suppress(OSError), atomic_write(self._path) as file:
            file.write(json.dumps({"step": step, "time": round(now, 3), "loss": loss}).encode())
