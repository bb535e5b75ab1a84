"""A small file that says how far a run is, for whoever watches from outside: `{"step": 40, "time": ..., "loss": 2.31}`."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from llama_jax.data.atomic import atomic_write
from llama_jax.training.metrics import Metric

RUN_HEARTBEAT = "heartbeat.json"  # in the directory of a run
_EVERY = 10.0  # seconds


class Heartbeat:
    """Writes the file, whole or not at all, at most every ten seconds; a failing disk is told of elsewhere.

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
