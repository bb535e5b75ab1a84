"""`infer.py` as a process of its own: on pipes, and in a terminal."""

import contextlib
import os
import pathlib
import pty
import select
import subprocess
import sys
import time

INFER = pathlib.Path(__file__).parents[2] / "infer.py"

# Programs compiled by one child are there for the next.
KEEP = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# The terminal becomes the controlling one, as a shell does it, so that Ctrl-C typed there is a
# signal.
_IN_TERMINAL = (
    "import os, runpy, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def infer(*arguments, stdin: bytes = b"", **environment) -> subprocess.CompletedProcess:
    """`python infer.py ARGUMENTS` as a user runs it, on pipes."""
    return subprocess.run(
        [sys.executable, INFER, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=300,
        env=os.environ | KEEP | environment,
    )


class Terminal:
    """A program in a terminal: what is typed goes to it, what it writes there is read."""

    def __init__(self, *arguments, stdout=None) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", _IN_TERMINAL, INFER, *map(str, arguments)]
        environment = os.environ | KEEP | {"TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            env=environment,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        """Types a text; `\\x03` is Ctrl-C, `\\x04` Ctrl-D."""
        os.write(self._master, text.encode())

    def read_until(self, words: str, seconds: float = 300) -> str:
        """What is written up to and including some words, from where the last call ended."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            with contextlib.suppress(OSError):  # of a terminal whose program has gone
                more = os.read(self._master, 1 << 16).decode(errors="replace") if ready else ""
                if more:
                    self.seen += more.replace("\r\n", "\n")
                    continue
            raise AssertionError(f"{words!r} did not come: {self.seen!r}")
        found, self.seen = (
            self.seen[: self.seen.index(words) + len(words)],
            self.seen[self.seen.index(words) + len(words) :],
        )
        return found

    def press_until(self, key: str, words: str) -> None:
        """Presses a key until some words are written: readline overlooks a signal that comes just
        before it waits.
        """
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.read_until(words, seconds=3)
                return
        raise AssertionError(f"{words!r} did not come: {self.seen!r}")

    def close(self) -> int:
        """Waits for the end of the program; its exit status."""
        try:
            return self.process.wait(timeout=300)
        finally:
            self.process.kill()
            os.close(self._master)
