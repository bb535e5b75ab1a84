"""Bad data, put in from outside: batches whose loss is not a number, or a hundred times too high;
and the program with them.

`python poison.py WHAT WHERE train ...` is the command line with faults: WHAT is `nan:3-5` (data
steps) or `nan-at:3-5` (steps of the run, whatever they read), WHERE the moment to be killed at:
`before-discard`, `after-discard` or `never`.
"""

import os
import signal
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.training import loop
from llama_jax.weights.checkpoint import Checkpoints

# added to the numbers of documents of a batch that is to have a loss a hundred times too high
LOUD = 1000

Patch = Callable[[object, str, object], None]  # as pytest's monkeypatch.setattr


def spoil(patch: Patch, chosen: Callable[[int, int], str]) -> list[int]:
    """Spoils batches of runs that are begun from now on.

    Args:
      patch: sets an attribute.
      chosen: from step and data step (from 0) to `nan`, `loud` or nothing.

    Returns:
      The steps whose batches were asked for, in that order; it grows.
    """
    made, make_recipe, asked = loop.global_batch, loop.make_recipe, []

    def spoilt(batches, step, *more):
        asked.append(step)
        batch = made(batches, step, *more)
        how = chosen(step, batches.steps.data_step(step))
        if how == "nan":
            return batch._replace(weights=batch.weights * jnp.nan)
        return batch._replace(documents=batch.documents + LOUD) if how == "loud" else batch

    def recipe(config):
        plain = make_recipe(config)

        def loss(model, params, batch, chunk):
            nats, more = plain.objective.loss(model, params, batch, chunk)
            return nats * jnp.where(jnp.max(batch.documents) >= LOUD, 100, 1), more

        return plain._replace(objective=plain.objective._replace(loss=loss))

    patch(loop, "global_batch", spoilt)
    patch(loop, "make_recipe", recipe)
    return asked


def among(what: str, text: str) -> Callable[[int, int], str]:
    """`nan:3-5` or `nan-at:3-5` as a choice of batches."""
    kind, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    wanted = range(int(first), int(last or first) + 1)
    return lambda step, data_step: (
        what if (step if kind.endswith("-at") else data_step) in wanted else ""
    )


def kill_at(where: str) -> None:
    """Has this process killed around the removal of the checkpoints that it goes back from."""
    discard = Checkpoints.discard

    def killed(self, steps):
        if not steps:  # as at every start
            return
        if where == "after-discard":
            discard(self, steps)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.discard = killed  # type: ignore[method-assign]


if __name__ == "__main__":
    from llama_jax.cli.main import run_program, run_verb

    what, where, *arguments = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    spoil(setattr, among("nan", what))
    if where != "never":
        kill_at(where)
    sys.exit(run_program(lambda: run_verb(arguments)))
