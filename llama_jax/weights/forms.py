"""The two forms of the one parameter tree: layers stacked on a leading axis, or one subtree a layer.

Stacked is canonical, on disk and in training; unrolled is what decoding runs fastest on. Both hold the same numbers.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llama_jax.axes import Array, Parameters


def stack(params: Parameters) -> Parameters:
    """The stacked form of an unrolled parameter tree (layers on a leading axis); a stacked tree comes back as it is."""
    if "layers" in params:
        return params
    names = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name.split("_")[1]))
    rest = {name: value for name, value in params.items() if name not in names}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params[name] for name in names])}


def unstack(params: Parameters) -> Parameters:
    """The unrolled form (`layers_0`, `layers_1`, ...) of a stacked parameter tree; an unrolled tree comes back as it is."""
    if "layers" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}


def unrolled(path: str, leaf: Array) -> Iterator[tuple[str, Array]]:
    """One leaf of the stacked form as it is in the unrolled one, with its paths: `layers_0/a`, ... for `layers/a`."""
    if not path.startswith("layers/"):
        yield path, leaf
        return
    for layer in range(leaf.shape[0]):
        yield path.replace("layers", f"layers_{layer}", 1), leaf[layer]
