"""The guard inside an update: where loss or gradient are not finite, or a spike, nothing changes but the count of steps.

It is a part of the training state, so what it remembers is saved and restored with everything else, bit by bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.axes import Array, Bool, Float, Int, PyTree

RING = 128  # good updates whose loss and gradient norm say what is usual
ENOUGH = RING // 2  # of them before anything is called a spike
WINDOW = 200  # updates of which is remembered whether they were skipped


class Guard(NamedTuple):
    """What is remembered of the updates so far.

    Attributes:
      losses: of the last `RING` good updates; the next one's place is `good % RING`.
      norms: of their gradients.
      good: updates that were made.
      skipped: updates that were skipped.
      streak: of these, the latest in a row; 0 after a good update.
      recent: whether each of the last `WINDOW` updates was skipped; that of step `k` is at `k % WINDOW`.
    """

    losses: Float[Array, " ring"]
    norms: Float[Array, " ring"]
    good: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    recent: Bool[Array, " window"]


def fresh_guard() -> Guard:
    """That of a run without updates."""
    losses, norms = (jnp.zeros(RING, jnp.float32) for _ in range(2))
    good, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Guard(losses, norms, good, skipped, streak, jnp.zeros(WINDOW, jnp.bool_))


def acceptable(guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""], sigma: float | None) -> Bool[Array, ""]:
    """Whether an update is to be made.

    Args:
      guard: of the updates before.
      loss: of this update.
      norm: of its gradient, before clipping.
      sigma: loss and norm may be so many standard deviations above the mean of the last good ones; any if `None`.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if sigma is None:
        return finite
    spike = _above(guard.losses, guard.good, loss, sigma) | _above(guard.norms, guard.good, norm, sigma)
    return finite & ~(spike & (guard.good >= ENOUGH))


def _above(ring: Float[Array, " ring"], count: Int[Array, ""], value: Float[Array, ""], sigma: float) -> Bool[Array, ""]:
    """Whether a value lies so many standard deviations above the mean of the filled part of a ring."""
    filled = jnp.arange(RING) < count
    number = jnp.clip(count, 1, RING)
    mean = jnp.sum(jnp.where(filled, ring, 0)) / number
    deviation = jnp.sqrt(jnp.sum(jnp.where(filled, (ring - mean) ** 2, 0)) / number)
    return value > mean + sigma * deviation


def kept_unless(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new arrays if all is well, else the old ones, bit by bit; the choice is made where the new ones are written."""
    return jax.tree.map(lambda fresh, stale: jnp.where(ok, fresh, stale), new, old)


def noted(guard: Guard, step: Int[Array, ""], ok: Bool[Array, ""], loss: Float[Array, ""], norm: Float[Array, ""]) -> Guard:
    """The guard after an update; one that was skipped leaves no trace in what is usual."""
    place = guard.good % RING

    def put(ring: Float[Array, " ring"], value: Float[Array, ""]) -> Float[Array, " ring"]:
        """A ring with the value of a good update."""
        return ring.at[place].set(jnp.where(ok, value, ring[place]))

    return Guard(
        losses=put(guard.losses, loss),
        norms=put(guard.norms, norm),
        good=guard.good + ok,
        skipped=guard.skipped + ~ok,
        streak=jnp.where(ok, 0, guard.streak + 1),
        recent=guard.recent.at[step % WINDOW].set(~ok),
    )


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
