"""Where the time of a run goes: a ledger of named parts of the wall time."""

import contextlib
import time
from collections.abc import Callable, Iterator

# What the loop does besides updating; the rest of the wall time is `step`.
PARTS = ("data", "step", "save", "eval", "compile")


class Clock:
    """Seconds of wall time by part; what no part claims is `step`.

    The device works while the host does other things, so `data` is time in which the host made or fetched a batch, whether
    or not the device waited for it: at most so much was lost.

    Args:
      now: gives seconds that never run backwards.

    Attributes:
      part: the one under way, `None` for none.
      turns: times that a part has begun or ended, or given a sign of life: what does not grow stands still.
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
        """A sign of life from inside a part that takes long, such as after each batch of an evaluation."""
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
