"""What the backward pass keeps of each layer: one ladder of named rungs, for the model, its configs and its plans; without JAX.

What a rung takes in bytes and what it computes again are in `llama_jax.planning.remat`, and in a table in
`docs/performance.md`.
"""

from collections.abc import Mapping

from llama_jax.errors import InputError

# Activations of a layer that can be kept, in the order in which they arise. `context` is what attention gives, with the
# logarithms of its sums; `middle` is the stream between attention and feed-forward.
NAMES = ("q", "k", "v", "context", "middle", "gate", "up")
# Rungs by what is kept beside a layer's input, from the least computed again to the least kept.
RUNGS: Mapping[str, tuple[str, ...]] = {
    "all": NAMES,
    "no_up": ("q", "k", "v", "context", "middle", "gate"),
    "attention": ("q", "k", "v", "context", "middle"),
    "outputs": ("context", "middle"),
    "context": ("context",),
    "full": (),
}
LADDER = ("none", *RUNGS)  # `none`: no rematerialisation, so that all is kept that differentiation asks for
EXPECTED = f"{', '.join(LADDER)}, or some of {'+'.join(NAMES)}"


def saved_names(remat: str) -> frozenset[str]:
    """The activations of a layer that are kept beside its input; all of them for `none`, which keeps more than these.

    Args:
      remat: a rung of the ladder, or names joined by `+`.

    Raises:
      InputError: for what is neither.
    """
    if remat in LADDER:
        return frozenset(RUNGS.get(remat, NAMES))
    names = remat.split("+")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"remat {remat!r:.80}: {unknown[0]!r:.40} is unknown; {EXPECTED} expected")
    return frozenset(names)
