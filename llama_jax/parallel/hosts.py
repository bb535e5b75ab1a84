"""The processes of a run, one a host: what each says to the others before the first update, without
a compiled program.

They speak through the key-value store of JAX's coordination service. Unlike a collective it needs
no devices, waits no longer than its limit, and names missing processes. `Hosts()` is a run
of one process: nothing waits there.
"""

import collections
import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from llama_jax.errors import InputError

# milliseconds of one wait in the store: signals and failures of others are noticed in between
_POLL = 500
_FAILED = "failed"
# seconds in which the first process, having waited for everyone, is heard to say who did not come
_GRACE = 10

T = TypeVar("T")


@runtime_checkable
class Store(Protocol):
    """What is asked of the coordination service."""

    def key_value_set(self, key: str, value: str) -> None:
        """Puts a value there, once."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value of a key once it is there; raises an error with DEADLINE_EXCEEDED in it when it
        does not come.
        """


class AgreedStop(InputError):
    """What every process of a run stops with: each knows it, and all leave together."""


class Hosts:
    """The processes of a run, as one of them sees them.

    Attributes:
      process: number of this one.
      count: of all.
      first: whether this is the one that writes and decides.
    """

    def __init__(
        self, process: int = 0, count: int = 1, store: Store | None = None, seconds: float = 1800
    ) -> None:
        """Nobody is asked yet.

        Args:
          process: number of this one, from 0.
          count: of all.
          store: that of the coordination service; not looked at where `count` is 1.
          seconds: that one waits for the others.
        """
        self.process, self.count, self.first = process, count, process == 0
        self._store, self._seconds = store, seconds
        self._met: collections.Counter[str] = (
            collections.Counter()
        )  # meetings by name: all hold them in the same order

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
        if self.first:  # asks everyone, and answers everyone: n + n requests instead of n * n
            end = time.monotonic() + seconds
            said = [self._get(f"{name}/{number}", end) for number in range(self.count)]
            missing = [number for number, words in enumerate(said) if words is None]
            if missing:
                self.fail(
                    f"{numbers(missing, self.count)} did not come to {name!r} within {seconds:g} s"
                )
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
        """Process 0 does something, the others wait until it is done; arguments and errors as for
        `gather`.
        """
        if self.first:
            action()
        self.agree(name, "done")

    def in_turn(self, name: str, action: Callable[[], T]) -> T:
        """Process 0 does something first, the others do it when it is done, all together; errors as
        for `gather`.
        """
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
            if key != _FAILED or "ALREADY_EXISTS" not in str(
                error
            ):  # two that fail at once: the first is heard
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
    shown = ", ".join(map(str, processes[:8])) + (
        f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    )
    return f"process{'es' if len(processes) > 1 else ''} {shown} of {count}"


# --- roll call ---
#
# The roll call before JAX's own start: process 0 listens where its coordinator is going to, the
# others give their numbers.
#
# JAX waits for all processes in silence, and ends the program when one has not come. Here the one
# that waits can say who is missing, and a number that is given twice is refused. A line of text
# each way, at most 200 bytes, is all that is spoken.


_LONGEST = 200  # bytes of a line
_GO, _NO = "go", "no "
_RETRY = 0.2  # seconds between two attempts to reach process 0

Say = Callable[[str], None]


def call_roll(
    address: str,
    bind: str,
    process: int,
    count: int,
    seconds: float,
    say: Say,
    patience: float = 60,
) -> None:
    """Returns when all processes have come.

    Args:
      address: `HOST:PORT` of process 0, at which the others find it.
      bind: `HOST:PORT` at which process 0 listens.
      process: number of this one.
      count: of all.
      seconds: to wait in all.
      say: takes a line about who is missing, after `patience` seconds and again whenever they have
        passed once more.
      patience: seconds.

    Raises:
      InputError: naming who is missing when the time is over, or what is wrong with this process.
    """
    if process == 0:
        _listen(bind, count, seconds, say, patience)
    else:
        _answer(address, process, count, seconds, say, patience)


def split_address(address: str) -> tuple[str, int]:
    """Host and port; an IPv6 host may stand in brackets.

    Raises:
      InputError: for anything else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"distributed.coordinator: {address!r} given, HOST:PORT expected, as in 10.0.0.1:8476"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Roll:
    """Who has come, at process 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.lines: dict[socket.socket, bytes] = {}  # what each connection has said so far
        self.present: dict[int, socket.socket] = {}

    @property
    def missing(self) -> list[int]:
        return [number for number in range(1, self.count) if number not in self.present]

    def take(self, connection: socket.socket) -> bool:
        """Reads the message of a connection; returns whether to keep it."""
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(_LONGEST)
        line = self.lines[connection] = self.lines[connection] + said
        if not said or len(line) > _LONGEST:
            return False
        if line.endswith(b"\n"):
            problem = self._problem(connection, line.decode("ascii", "replace").split())
            if problem:
                tell(connection, _NO + problem)
            return not problem
        return True

    def _problem(self, connection: socket.socket, words: list[str]) -> str:
        if (
            len(words) != 3
            or words[0] != "llama_jax"
            or not all(word.isdecimal() for word in words[1:])
        ):
            return "this is a training of llama_jax"
        number, count = int(words[1]), int(words[2])
        if count != self.count:
            return f"distributed.processes: {count} given, process 0 has {self.count}"
        if not 0 < number < count or self.present.get(number, connection) is not connection:
            return f"distributed.process: another process has the number {number}"
        self.present[number] = connection
        return ""

    def forget(self, connection: socket.socket) -> None:
        """One that went away may come again."""
        self.lines.pop(connection, None)
        self.present = {
            number: other for number, other in self.present.items() if other is not connection
        }
        connection.close()


def tell(connection: socket.socket, line: str) -> None:
    """Says a line; one who has gone is noticed when read from."""
    with contextlib.suppress(OSError):
        connection.sendall(line.encode()[: _LONGEST - 1] + b"\n")


def _listen(bind: str, count: int, seconds: float, say: Say, patience: float) -> None:
    roll, started = _Roll(count), time.monotonic()
    reported = 0
    with _server(bind) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while roll.missing:
                for key, _ in selector.select(timeout=0.2):
                    _serve(key.fileobj, server, selector, roll)  # type: ignore[arg-type]
                waited = time.monotonic() - started
                if roll.missing and waited > seconds:
                    line = (
                        f"{numbers(roll.missing, count)} did not come within {seconds:g} s; "
                        "start all of them"
                    )
                    for connection in roll.present.values():
                        tell(connection, _NO + line)
                    raise InputError(line)
                if roll.missing and waited > patience * (reported + 1):
                    reported += 1
                    say(
                        f"waited {waited:.0f} s for {numbers(roll.missing, count)}; "
                        f"going on for {seconds - waited:.0f} s"
                    )
            for connection in roll.present.values():
                tell(connection, _GO)
        finally:
            for connection in list(roll.lines):
                connection.close()


def _server(bind: str) -> socket.socket:
    host, port = split_address(bind)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        server = socket.socket(family, kind, protocol)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(1024)
        server.setblocking(False)
    except OSError as error:
        raise InputError(
            f"distributed.coordinator: process 0 cannot listen at {bind} "
            f"({error.strerror}); an address of its machine and a "
            "free port expected"
        ) from None
    return server


def _serve(
    given: socket.socket, server: socket.socket, selector: selectors.BaseSelector, roll: _Roll
) -> None:
    """Lets in who knocks, hears who speaks."""
    if given is server:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.setblocking(False)
            roll.lines[connection] = b""
            selector.register(connection, selectors.EVENT_READ)
    elif not roll.take(given):
        selector.unregister(given)
        roll.forget(given)


def _answer(
    address: str, process: int, count: int, seconds: float, say: Say, patience: float
) -> None:
    host, port = split_address(address)
    started, reported = time.monotonic(), 0

    def report() -> None:
        """Says that one waits, when it is time; ends the waiting, when the time is over."""
        nonlocal reported
        waited = time.monotonic() - started
        if waited > seconds:
            raise InputError(
                f"process {process} waited {seconds:g} s for process 0 at {address} and "
                "the others; start all"
            )
        if waited > patience * (reported + 1):
            reported += 1
            say(
                f"process {process} waited {waited:.0f} s for process 0 at {address} and the others"
            )

    while True:
        report()
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port), timeout=5) as connection,
        ):
            connection.sendall(f"llama_jax {process} {count}\n".encode())
            if _told_to_go(connection, report):
                return
        time.sleep(_RETRY)


def _told_to_go(connection: socket.socket, report: Callable[[], None]) -> bool:
    """Waits for the word of process 0; false when it went away."""
    connection.settimeout(1)
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        report()
        try:
            more = connection.recv(_LONGEST)
        except TimeoutError:
            continue
        if not more:
            return False
        line += more
    text = line.decode("utf8", "replace").strip()
    if text.startswith(_NO):
        raise InputError(f"refused by process 0: {text.removeprefix(_NO)}")
    return text == _GO
