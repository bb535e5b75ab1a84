"""Work done by several processes, its results in the order of the work; one that dies is noticed, whatever it was doing.

Each process has a pipe of its own, which is closed when it dies. (The pool of the standard library shares one pipe: a process
that is killed while it hands over a result leaves the others waiting for ever.)
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 3  # items a process may be ahead of the one that is waited for


class WorkerDied(RuntimeError):
    """A process that ended without a word."""


class Workers(Generic[Item, Result]):
    """Processes that all do the same; a context manager.

    Args:
      make: called once in each process; gives what is then called with each item. It can be pickled.
      count: of the processes.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], count: int) -> None:
        context = multiprocessing.get_context("spawn")  # forked threads of the libraries would hang
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the pipe is closed when the process has gone
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def results(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with what comes of it, in order; few are held at a time.

        Raises:
          WorkerDied: if a process ended without a word.
          Exception: what the work raised, at its turn.
        """
        source = iter(items)
        held: collections.deque[Item] = collections.deque()  # given out, and not yet handed back
        done: dict[int, tuple[Result, Exception | None]] = {}
        working: dict[Connection, int] = {}  # number of the item
        free, given = list(self._pipes), 0
        while True:
            room = min(len(free), _AHEAD * len(self._pipes) - len(held))
            for item in itertools.islice(source, room):
                pipe = free.pop()  # of one that waits: two that send to each other would wait for ever
                _send(pipe, item)
                working[pipe], given = given, given + 1
                held.append(item)
            if not held:
                return
            first = given - len(held)
            if first in done:
                result, error = done.pop(first)
                if error is not None:
                    raise error
                yield held.popleft(), result
                continue
            ready = wait(list(working))
            for pipe in [pipe for pipe in working if pipe in ready]:
                done[working.pop(pipe)] = _receive(pipe)
                free.append(pipe)


def _send(pipe: Connection, item: object) -> None:
    try:
        pipe.send(item)
    except OSError:
        raise WorkerDied from None


def _receive(pipe: Connection) -> tuple:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise WorkerDied from None


def _serve(make: Callable[[], Callable], pipe: Connection) -> None:
    """The life of a process: an item in, its result or the error out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = make()
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            pipe.send(_outcome(work, item))


def _outcome(work: Callable, item: object) -> tuple[object, Exception | None]:
    """What comes of an item, and the error if it was one."""
    try:
        return work(item), None
    except Exception as error:
        return None, error


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: after a kill -9 nobody else does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
