"""Goodput: the share of a run's wall time, restarts included, that went into updates that the run
kept.

Beside the metrics lies an append-only file, one JSON object a line: `start` when a program begins
or resumes the run, `rewind` when the run goes back, and the seconds by part at every record.
Nothing in it is ever dropped, so that lost work stays visible.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from llama_jax.formatting import duration
from llama_jax.training.metrics import LineFile

RUN_GOODPUT = "goodput.jsonl"


class Goodput(NamedTuple):
    """Where the wall time of a run went, from its first start to the last line written.

    Attributes:
      wall: seconds in all, those between two programs included.
      useful: seconds in updates that the run kept.
      redone: seconds in updates lost because the run resumed from an earlier checkpoint.
      parts: seconds by other part: `data`, `save`, `eval`, `compile`.
      down: the rest: start-up, and no program running.
      starts: times that a program began or resumed the run.
    """

    wall: float = 0.0
    useful: float = 0.0
    redone: float = 0.0
    parts: Mapping[str, float] = {}
    down: float = 0.0
    starts: int = 0

    @property
    def share(self) -> float | None:
        """`useful / wall`; `None` before anything was measured."""
        return self.useful / self.wall if self.wall > 0 else None

    def lines(self) -> dict[str, str]:
        """The rows of a table."""
        if self.share is None:
            return {}
        rows = {
            "goodput": f"{self.share:.1%}: {duration(self.useful)} in updates that were kept, of "
            f"{duration(self.wall)} "
            f"since the start of the run ({self.starts} start{'s' if self.starts != 1 else ''})"
        }
        spent = {**self.parts, "redone": self.redone, "start-up and down": self.down}
        told = [
            f"{name} {seconds / self.wall:.1%}"
            for name, seconds in spent.items()
            if seconds / self.wall >= 0.0005
        ]
        return rows | ({"other time": ", ".join(told)} if told else {})


class Ledger:
    """The lines of a goodput file, added up as they come."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = 0.0
        self._kept: list[tuple[int, float]] = []  # step of a record, seconds in its updates
        self._useful = self._redone = 0.0
        self._parts: dict[str, float] = {}
        self._starts = 0

    def add(self, entry: Mapping) -> None:
        """Takes in a line; one that makes no sense is passed over."""
        moment, step = entry.get("time"), entry.get("step")
        if not isinstance(moment, (int, float)) or not isinstance(step, int):
            return
        self._first = moment if self._first is None else min(self._first, moment)
        self._last = max(self._last, moment)
        if entry.get("event") in ("start", "rewind"):
            self._starts += entry["event"] == "start"
            self._drop(step)
        elif isinstance(entry.get("seconds"), Mapping):
            self._book(
                step,
                {
                    str(k): float(v)
                    for k, v in entry["seconds"].items()
                    if isinstance(v, (int, float))
                },
            )

    def _drop(self, step: int) -> None:
        """Updates after a step are to be done again."""
        while self._kept and self._kept[-1][0] > step:
            lost = self._kept.pop()[1]
            self._useful -= lost
            self._redone += lost

    def _book(self, step: int, seconds: dict[str, float]) -> None:
        useful = seconds.pop("step", 0.0)
        self._kept.append((step, useful))
        self._useful += useful
        for part, spent in seconds.items():
            self._parts[part] = self._parts.get(part, 0.0) + spent

    def goodput(self) -> Goodput:
        """Where the time went so far."""
        if self._first is None:
            return Goodput()
        told = self._useful + self._redone + sum(self._parts.values())
        wall = max(
            self._last - self._first, told
        )  # a clock set back must not make more than all of it useful
        return Goodput(
            wall, self._useful, self._redone, dict(self._parts), wall - told, self._starts
        )


class GoodputLog:
    """The goodput file of a run, open for this program.

    Args:
      path: the file, `RUN/goodput.jsonl`; `None` to write nothing.
      step: updates of the state to resume from; 0 at the start of a run.
      warn: takes one line of text, once, when the file cannot be written.
      now: seconds since 1970.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        warn: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = Ledger()
        for entry in () if path is None else read_lines(path):
            self._ledger.add(entry)
        self._now = now
        self._file = LineFile(path, "goodput", warn)
        self._add({"event": "start", "step": step})

    def add(self, step: int, seconds: Mapping[str, float]) -> float | None:
        """Books the seconds by part since the last call, see `Clock.take`; the run's goodput so
        far.
        """
        self._add(
            {"step": step, "seconds": {part: round(spent, 6) for part, spent in seconds.items()}}
        )
        return self.goodput.share

    def go_back(self, step: int) -> None:
        """Updates after a step are lost: the run resumes from there."""
        self._add({"event": "rewind", "step": step})

    @property
    def goodput(self) -> Goodput:
        """Where the time of the run went so far."""
        return self._ledger.goodput()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, entry: dict) -> None:
        entry = {"time": round(self._now(), 3), **entry}
        self._ledger.add(entry)
        self._file.write(json.dumps(entry))


def read_lines(path: Path) -> Iterable[Mapping]:
    """The objects of a file of JSON lines; lines that are torn, and a file that is not there, give
    nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def read_goodput(path: Path) -> Goodput:
    """Where the time of a run went, from its file; nothing where there is none."""
    ledger = Ledger()
    for entry in read_lines(path):
        ledger.add(entry)
    return ledger.goodput()


# --- clock ---
#
# Where the time of a run goes: a ledger of named parts of the wall time.


# What the loop does besides updating; the rest of the wall time is `step`.
PARTS = ("data", "step", "save", "eval", "compile")


class Clock:
    """Seconds of wall time by part; what no part claims is `step`.

    The device works while the host does other things, so `data` is time in which the host made or
    fetched a batch, whether or not the device waited for it: this is the most that was lost.

    Args:
      now: gives seconds that never run backwards.

    Attributes:
      part: the one under way, `None` for none.
      turns: times that a part has begun or ended, or given a sign of life: a count that does not
        grow stands still.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.part: str | None = None
        self.turns = 0
        self._now = now
        self._since = now()
        self._seconds: dict[str, float] = {}
        self._open: list[float] = []  # per open part, the seconds of the parts inside it

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time inside a `with` to a part; a part within another is not counted twice."""
        begin, outer = self._now(), self.part
        self._open.append(0.0)
        self.part = part
        self.turns += 1
        try:
            yield
        finally:
            self.part = outer
            self.turns += 1
            spent = self._now() - begin
            inner = self._open.pop()
            self._seconds[part] = self._seconds.get(part, 0.0) + spent - inner
            if self._open:
                self._open[-1] += spent

    def alive(self) -> None:
        """A sign of life from inside a part that takes long, such as after each batch of an
        evaluation.
        """
        self.turns += 1

    def claim(self, part: str) -> None:
        """Gives a part all the time since the last `take` that no part has claimed yet."""
        rest = self._now() - self._since - sum(self._seconds.values())
        self._seconds[part] = self._seconds.get(part, 0.0) + max(0.0, rest)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call, those of `step` included; then begins anew."""
        now = self._now()
        total, self._since = now - self._since, now
        seconds, self._seconds = self._seconds, {}
        rest = max(0.0, total - sum(seconds.values()))
        return {**seconds, "step": seconds.get("step", 0.0) + rest}
