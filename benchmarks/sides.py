"""The sides of a comparison, each in a process of its own with all cores, asked in turn."""

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple


class Side(NamedTuple):
    """A process that measures.

    Attributes:
      ask: from a case to what the side's function answers.
      stop: ends the process.
      ready: waits until the side is made.
    """

    ask: Callable[..., Any]
    stop: Callable[[], None]
    ready: Callable[[], None]


def _serve(make: Callable, arguments: tuple, link: Any) -> None:
    run = make(*arguments)
    link.send(None)
    for case in iter(link.recv, None):
        link.send(run(*case))


def start(make: Callable[..., Callable], *arguments: object) -> Side:
    """A side: `make(*arguments)`, called in a new process, gives the function that is asked; it runs only while it is asked."""
    context = multiprocessing.get_context("spawn")
    link, other = context.Pipe()
    process = context.Process(target=_serve, args=(make, arguments, other), daemon=True)
    process.start()
    other.close()  # a side that dies ends the benchmark

    waiting = [True]

    def ready() -> None:
        """Takes the word that the side is made, which comes once."""
        if waiting:
            link.recv()
            waiting.clear()

    def ask(*case: object) -> Any:
        """What the side answers to a case."""
        ready()
        link.send(case)
        return link.recv()

    def stop() -> None:
        """Ends the process, whatever it is doing."""
        with contextlib.suppress(OSError):
            link.send(None)
            process.join(timeout=10)
        process.terminate()
        process.join()

    return Side(ask, stop, ready)
