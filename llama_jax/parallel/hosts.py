"""The processes of a run, one a host: what each says to the others before the first update, without a compiled program.

They speak through the key-value store of JAX's coordination service. Unlike a collective it needs no devices, waits no
longer than it is told, and knows by name who has not come. `Hosts()` is a run of one process: nothing waits there.
"""

import collections
import json
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from llama_jax.errors import InputError

_POLL = 500  # milliseconds of one wait in the store: signals and failures of others are noticed in between
_FAILED = "failed"
_GRACE = 10  # seconds in which the first process, having waited for everyone, is heard to say who did not come

T = TypeVar("T")


@runtime_checkable
class Store(Protocol):
    """What is asked of the coordination service."""

    def key_value_set(self, key: str, value: str) -> None:
        """Puts a value there, once."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value of a key once it is there; raises an error with DEADLINE_EXCEEDED in it when it does not come."""


class AgreedStop(InputError):
    """What every process of a run stops with: each knows it, and all leave together."""


class Hosts:
    """The processes of a run, as one of them sees them.

    Attributes:
      process: number of this one.
      count: of all.
      first: whether this is the one that writes and decides.
    """

    def __init__(self, process: int = 0, count: int = 1, store: Store | None = None, seconds: float = 1800) -> None:
        """Nobody is asked yet.

        Args:
          process: number of this one, from 0.
          count: of all.
          store: that of the coordination service; not looked at where `count` is 1.
          seconds: that one waits for the others.
        """
        self.process, self.count, self.first = process, count, process == 0
        self._store, self._seconds = store, seconds
        self._met: collections.Counter[str] = collections.Counter()  # meetings by name: all hold them in the same order

    def gather(self, name: str, value: str, seconds: float | None = None) -> list[str]:
        """What every process says, by its number; all get the same.

        Args:
          name: of this meeting, the same for all.
          value: what this process says.
          seconds: that one waits for the others here; what `Hosts` was given by default.

        Raises:
          AgreedStop: if another process has failed; if one does not come in time, with its number.
        """
        if self.count == 1:
            return [value]
        name, seconds = self._meeting(name), seconds or self._seconds
        self._set(f"{name}/{self.process}", value)
        if self.first:  # asks everyone, and tells everyone: n + n requests instead of n * n
            end = time.monotonic() + seconds
            said = [self._get(f"{name}/{number}", end) for number in range(self.count)]
            missing = [number for number, words in enumerate(said) if words is None]
            if missing:
                self.fail(f"{numbers(missing, self.count)} did not come to {name!r} within {seconds:g} s")
            self._set(f"{name}/all", json.dumps(said))
        return json.loads(self._hear(f"{name}/all", seconds))

    def agree(self, name: str, value: str) -> str:
        """What process 0 says; arguments and errors as for `gather`."""
        if self.count == 1:
            return value
        name = self._meeting(name)
        if self.first:
            self._set(f"{name}/0", value)
        return self._hear(f"{name}/0")

    def wait(self, name: str) -> None:
        """Waits for all; argument and errors as for `gather`."""
        self.gather(name, "")

    def first_does(self, name: str, action: Callable[[], None]) -> None:
        """Process 0 does something, the others wait until it is done; arguments and errors as for `gather`."""
        if self.first:
            action()
        self.agree(name, "done")

    def in_turn(self, name: str, action: Callable[[], T]) -> T:
        """Process 0 does something first, the others do it when it is done, all together; errors as for `gather`."""
        if not self.first:
            self.agree(name, "")
        result = action()
        if self.first:
            self.agree(name, "done")
        return result

    def fail(self, line: str) -> None:
        """Tells the others that the run cannot begin, and why.

        Raises:
          AgreedStop: always, with the line.
        """
        self.tell(line)
        raise AgreedStop(line)

    def tell(self, line: str) -> None:
        """Lets the others stop with a line, where they wait for each other."""
        if self.count > 1:
            self._set(_FAILED, line)

    def _meeting(self, name: str) -> str:
        self._met[name] += 1
        return name if self._met[name] == 1 else f"{name} {self._met[name]}"

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        try:
            self._store.key_value_set(f"llama_jax/{key}", value)
        except RuntimeError as error:
            if key != _FAILED or "ALREADY_EXISTS" not in str(error):  # two that fail at once: the first is heard
                raise

    def _hear(self, key: str, seconds: float | None = None) -> str:
        """A value, waited for; the failure of another process in its place."""
        seconds = seconds or self._seconds
        value = self._get(key, time.monotonic() + seconds + _GRACE)
        if value is None:
            raise AgreedStop(f"process 0 did not come to {key!r} within {seconds:g} s")
        return value

    def _get(self, key: str, end: float) -> str | None:
        """A value, `None` if it has not come by then."""
        while True:
            value = self._try(key, _POLL)
            if value is not None:
                return value
            failure = self._try(_FAILED, 1)
            if failure is not None:
                raise AgreedStop(failure)
            if time.monotonic() > end:
                return None

    def _try(self, key: str, milliseconds: int) -> str | None:
        assert self._store is not None
        try:
            return self._store.blocking_key_value_get(f"llama_jax/{key}", milliseconds)
        except RuntimeError as error:  # JaxRuntimeError
            if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
                return None
            raise


def numbers(processes: list[int], count: int) -> str:
    """Processes in words, at most eight by their numbers."""
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown} of {count}"
