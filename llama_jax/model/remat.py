"""Rematerialization: named policies, ordered by memory, for the model, its configs
and its plans; without JAX.

The bytes of a policy and the FLOPs that it computes again are in `llama_jax.planning.memory`, and
in a table in `docs/performance.md`. Memory that is enough for one policy in some layers and for
another in the rest is used by a split: `20*all+attention`. Names with `@host` behind them are kept
in the memory of the host.
"""

import re
from collections.abc import Mapping

from llama_jax.errors import InputError

# Activations of a layer that can be kept, in the order in which they arise. `context` is what
# attention gives, with the logarithms of its sums; `middle` is the stream between attention and
# feed-forward.
# How attention sees tokens on other devices, see `model.context_parallel`; here because configs are
# read without JAX.
CONTEXT_ATTENTION = ("all_gather", "ring")

NAMES = ("q", "k", "v", "context", "middle", "gate", "up")
# Policies by the activations kept beside a layer's input, from the least recomputed to the least
# kept.
REMAT_NAMES: Mapping[str, tuple[str, ...]] = {
    "all": NAMES,
    "no_up": ("q", "k", "v", "context", "middle", "gate"),
    "attention": ("q", "k", "v", "context", "middle"),
    "outputs": ("context", "middle"),
    "context": ("context",),
    "full": (),
}
REMAT_POLICIES = (
    "none",
    *REMAT_NAMES,
)  # `none`: no rematerialisation, so that all is kept that differentiation asks for
_HOST = "@host"
EXPECTED = (
    f"{', '.join(REMAT_POLICIES)}, or some of {'+'.join(NAMES)}, {_HOST} behind those to "
    "be kept by the host, "
    "or a split such as 20*all+attention"
)
_SPLIT = re.compile(r"([1-9][0-9]{0,3})\*(\w+)\+(.+)")


def saved_names(remat: str) -> frozenset[str]:
    """The activations of a layer that are kept beside its input; all of them for `none`, which
    keeps more than these.

    Args:
      remat: a policy, or names joined by `+`; no split.

    Raises:
      InputError: for anything else.
    """
    if remat in REMAT_POLICIES:
        return frozenset(REMAT_NAMES.get(remat, NAMES))
    names = [name.removesuffix(_HOST) for name in remat.split("+")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"remat {remat!r:.80}: {unknown[0]!r:.40} is unknown; {EXPECTED} expected")
    return frozenset(names)


def hosted_names(remat: str) -> frozenset[str]:
    """Those of `saved_names` that are kept in the memory of the host."""
    return frozenset(name.removesuffix(_HOST) for name in remat.split("+") if name.endswith(_HOST))


def parse_remat(remat: str) -> tuple[int, str, str]:
    """The number of first layers with a setting of their own, theirs, and that of the others; 0 and
    one twice for no split.

    Args:
      remat: a policy, names joined by `+`, or a split: `20*all+attention`, where the part before
        the `+` is a policy.

    Raises:
      InputError: for anything else.
    """
    split = _SPLIT.fullmatch(remat)
    count, first, rest = (int(split[1]), split[2], split[3]) if split else (0, remat, remat)
    if split and (
        first not in REMAT_NAMES or rest == "none"
    ):  # what `none` keeps is not a layer's alone
        wrong = rest if first in REMAT_NAMES else first
        raise InputError(
            f"remat {remat!r:.80}: {wrong!r:.40} in a split; {', '.join(REMAT_NAMES)} expected"
        )
    saved_names(rest)
    return count, first, rest


def layer_parts(remat: str, layers: int) -> tuple[tuple[int, str], ...]:
    """Consecutive layers of one setting each, as how many and which: two for a split, else one.

    Raises:
      InputError: for a split that leaves no layers for its second setting, and as `parse_remat`.
    """
    count, first, rest = parse_remat(remat)
    if count >= layers:
        raise InputError(
            f"remat {remat!r:.80}: {count} of {layers} layers given; fewer than all of "
            "them expected"
        )
    return ((count, first), (layers - count, rest)) if count else ((layers, rest),)
