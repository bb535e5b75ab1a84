"""When a training is to end before its last step: signals, a time limit, a file; on one host or on several."""

import contextlib
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable
from types import FrameType

RUN_STOP = "STOP"  # `touch RUN/STOP` saves and ends a run

_AT_ONCE_SECONDS = 5  # a Ctrl-C so soon after the first request interrupts
_LOOK_SECONDS = 1  # between two looks for the file: shared file systems are slow


class StopRequest:
    """Whether the run is to be saved and ended: SIGTERM, the first Ctrl-C, SIGUSR1, `RUN/STOP`, or the time is over.

    A Ctrl-C within 5 seconds of the first request interrupts at once. Other signals never do: schedulers send several.

    With several processes every request becomes a SIGTERM to the process itself, which belongs to JAX there: its
    preemption service tells the others and finds the step that all of them reach, without waiting for the device.
    """

    def __init__(
        self, run: pathlib.Path, deadline: float = math.inf, reached: Callable[[int], bool] | None = None, looks: bool = True
    ) -> None:
        """Takes over the signals.

        Args:
          run: directory of the run.
          deadline: by `time.monotonic`.
          reached: asks JAX whether a step is the one to end at; `None` for a single process.
          looks: whether this process looks at the clock and for the file.
        """
        self._file, self._deadline, self._reached, self._looks = run / RUN_STOP, deadline, reached, looks
        self._asked_at: float | None = None
        self._looked = 0.0
        own = (signal.SIGINT, signal.SIGUSR1, *([] if reached else [signal.SIGTERM]))
        for number in own:
            signal.signal(number, self._on_signal)

    def __call__(self, step: int) -> bool:
        """Asked by the loop after every step."""
        if self._looks and self._asked_at is None:
            self._look()
        return self._reached(step) if self._reached else self._asked_at is not None

    def close(self) -> None:
        """Removes the file, once it has been obeyed."""
        if self._looks:
            self._file.unlink(missing_ok=True)

    def _look(self) -> None:
        now = time.monotonic()
        if now > self._deadline:
            self._ask("run.max_time")
        elif now > self._looked + _LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._ask(str(self._file))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        soon = self._asked_at is not None and time.monotonic() < self._asked_at + _AT_ONCE_SECONDS
        if number == signal.SIGINT and soon:
            raise KeyboardInterrupt
        self._ask(signal.Signals(number).name)

    def _ask(self, who: str) -> None:
        self._asked_at = time.monotonic()
        line = f"{who}: saving after this step; Ctrl-C within {_AT_ONCE_SECONDS} s ends at once\n"
        with contextlib.suppress(OSError):  # nobody may be listening any more; the state is to be saved all the same
            os.write(2, line.encode())  # print is not safe in a handler: the signal may have come inside another print
        if self._reached:
            os.kill(os.getpid(), signal.SIGTERM)
