"""The sides of a comparison, each in a process of its own with all cores, asked in turn; and the
clock of those on a GPU.
"""

import contextlib
import multiprocessing
import time
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
    """A side: `make(*arguments)`, called in a new process, gives the function that is asked; it
    runs only while it is asked.
    """
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


def call_seconds(function: Callable, times: int, *given: Any) -> float:
    """Seconds of one call of a JAX function, the best of three.

    Args:
      function: from arrays to one that takes the place of the first of them in the next call.
      times: calls in one program, so many that its start does not count.
      given: the arrays.
    """
    import jax

    run = jax.jit(
        lambda first, *rest: jax.lax.fori_loop(0, times, lambda _, x: function(x, *rest), first)
    )
    jax.block_until_ready(run(*given))
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(run(*given))
        spent.append(time.perf_counter() - started)
    return min(spent) / times
