"""Low-rank adapters (LoRA, arXiv:2106.09685): leaves that take the place of matrices, and the trees
they come from.

A tree of adapters has the nesting of the parameters, `{"a", "b"}` at the names that are adapted and
nothing elsewhere. It is the tree that is trained, saved and sharded; `combine` puts it over frozen
parameters for a forward pass, without a sum of weights.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llama_jax.accounting import LAYER_MATRICES, parameter_shapes
from llama_jax.axes import Array, Float, Key, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.quantize import Quantized, Weight


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """What an adapter's input loses in training: each entry with probability `rate`, the others
    grow by 1 / (1 - rate).

    Attributes:
      key: of this forward pass; stacked leaves have one a layer.
      rate: from 0 to below 1.
    """

    key: Key[Array, "*L"]
    rate: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "a", "b", "dropout"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen matrix `[I, O]` and its adapter, or such pairs stacked: `x weight + (x a) b *
    scale`.

    Attributes:
      weight: plain or quantised.
      a: `[I, r]`.
      b: `[r, O]`.
      scale: of the product of the two.
      dropout: on the input of `a`; `None` outside of training.
    """

    weight: Weight
    a: Float[Array, "*L I r"]
    b: Float[Array, "*L r O"]
    scale: float
    dropout: Dropout | None = None


Matrix = Weight | Adapted


def dropped(x: Float[Array, "*B I"], dropout: Dropout | None) -> Float[Array, "*B I"]:
    """The input of an adapter as training has it."""
    if dropout is None:
        return x
    kept = jax.random.bernoulli(dropout.key, 1 - dropout.rate, x.shape)
    return jnp.where(kept, x / (1 - dropout.rate), 0).astype(x.dtype)


def check_targets(targets: tuple[str, ...]) -> None:
    """Refuses names that are not matrices of a layer.

    Raises:
      InputError: naming the first of them; for none at all, and for one that comes twice.
    """
    wrong = (
        [name for name in targets if name not in LAYER_MATRICES or targets.count(name) > 1]
        if targets
        else [""]
    )
    if wrong:
        raise InputError(
            f"adapter targets: {wrong[0]!r} given, each once of "
            f"{', '.join(LAYER_MATRICES)} expected"
        )


def init_adapters(
    key: Key[Array, ""],
    config: LlamaConfig,
    rank: int,
    targets: tuple[str, ...],
    new_tokens: int = 0,
) -> Parameters:
    """Fresh adapters that change nothing yet, stacked: `a` uniform within 1 / sqrt(I), as PEFT
    initializes it, and `b` zero.

    With new tokens the tree has `new_tokens` too: a change of the last entries of the
    embedding (`inputs`, `[n, D]`) and, unless it is tied, of the head (`outputs`, `[D, n]`).

    Args:
      key: consumed.
      config: the architecture.
      rank: `r`; at most the smaller side of each matrix.
      targets: names of the matrices, such as `wq`.
      new_tokens: last entries of the vocabulary to train, below all of them.

    Raises:
      InputError: for a rank or a number of tokens out of range, and for targets that are none.
    """
    check_targets(targets)
    if not 0 <= new_tokens < config.vocab_size:
        raise InputError(
            f"adapter new_tokens: {new_tokens} given, 0 to {config.vocab_size - 1} expected"
        )
    tree: dict[tuple[str, ...], Array] = {}
    if new_tokens:
        tree["new_tokens", "inputs"] = jnp.zeros((new_tokens, config.dim), jnp.float32)
        if not config.tied_head:
            tree["new_tokens", "outputs"] = jnp.zeros((config.dim, new_tokens), jnp.float32)
    for path, (layers, inputs, outputs) in _matrices(config, targets).items():
        if not 1 <= rank <= min(inputs, outputs):
            raise InputError(
                f"adapter rank: {rank} given, 1 to {min(inputs, outputs)} expected for {path[-1]}"
            )
        bound = inputs**-0.5
        a = jax.random.uniform(
            _folded(key, path), (layers, inputs, rank), jnp.float32, -bound, bound
        )
        tree[*path, "a"], tree[*path, "b"] = a, jnp.zeros((layers, rank, outputs), jnp.float32)
    return unflatten_dict(tree)


def _matrices(
    config: LlamaConfig, targets: tuple[str, ...]
) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Paths and shapes of the targets in the stacked tree."""
    return {
        path: shape
        for path, shape in flatten_dict(parameter_shapes(config)).items()
        if path[-1] in targets
    }


def _folded(key: Key[Array, ""], path: tuple[str, ...]) -> Key[Array, ""]:
    """A key of its own for each name, whatever other targets there are."""
    return jax.random.fold_in(key, zlib.crc32(path[-1].encode()))


def _pairs(adapters: Parameters) -> dict[tuple[str, ...], tuple[Array, Array]]:
    """`a` and `b` by the path of their matrix."""
    flat = flatten_dict(adapters)
    return {
        path[:-1]: (flat[(*path[:-1], "a")], flat[(*path[:-1], "b")])
        for path in flat
        if path[-1] == "a"
    }


def combine(
    params: Parameters, adapters: Parameters, scale: float, dropout: Dropout | None = None
) -> Parameters:
    """Parameters with adapters over them, in the form (stacked or unrolled) that both have.

    Args:
      params: frozen, plain or quantised.
      adapters: from `init_adapters`, or trained.
      scale: alpha / rank.
      dropout: with one key, from which every matrix of every layer gets its own; `None` outside of
        training.
    """
    tree = flatten_dict(params)
    for path, (a, b) in _pairs(adapters).items():
        _require_matrix(tree, path)
        tree[path] = Adapted(tree[path], a, b, scale, _dropout_at(dropout, path, a))
    return unflatten_dict(_with_new_tokens(tree, adapters))


def _with_new_tokens(tree: dict, adapters: Parameters) -> dict:
    """The flat tree with the trained changes of new tokens added to embedding and head."""
    for name, part, axis in (("embedding", "inputs", 0), ("head", "outputs", 1)):
        change = adapters.get("new_tokens", {}).get(part)
        if change is None:
            continue
        table = tree.get((name,))
        if not isinstance(table, jax.Array | np.ndarray):
            raise InputError(f"new tokens given for {name}, which is quantized or tied")
        old, new = jnp.split(table, [table.shape[axis] - change.shape[axis]], axis)
        new = (new.astype(jnp.float32) + change).astype(table.dtype)
        tree[name,] = jnp.concatenate([old, new], axis)
    return tree


def _require_matrix(tree: Mapping, path: tuple[str, ...]) -> None:
    """Refuses an adapter of a matrix that the parameters do not have.

    Raises:
      InputError: with what to do where the two have different forms.
    """
    if path not in tree:
        other_form = (path[0] == "layers") != any(known[0] == "layers" for known in tree)
        forms = "both stacked or both unrolled (llama_jax.stack, llama_jax.unstack)"
        expected = forms if other_form else "adapters of this model"
        raise InputError(
            f"adapters of {'/'.join(path)} given for parameters that do not have it; "
            f"{expected} expected"
        )


def _dropout_at(dropout: Dropout | None, path: tuple[str, ...], a: Array) -> Dropout | None:
    """The dropout of one matrix; a stacked one has the keys that its layers have in the unrolled
    form.
    """
    if dropout is None or dropout.rate == 0:
        return None
    key = _folded(dropout.key, path)
    if a.ndim == 3:
        return Dropout(
            jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(a.shape[0])),
            dropout.rate,
        )
    return Dropout(jax.random.fold_in(key, int(path[0].removeprefix("layers_"))), dropout.rate)


def without_adapters(params: Parameters) -> Parameters:
    """What `combine` was given: the model before it was adapted, the same arrays."""
    bare = {
        path: leaf.weight if isinstance(leaf, Adapted) else leaf
        for path, leaf in flatten_dict(params).items()
    }
    return unflatten_dict(bare)


def merge(params: Parameters, adapters: Parameters, scale: float) -> Parameters:
    """Plain parameters that compute what `combine` computes: `weight + a b * scale`, added in
    float32, in the type they had.

    Args:
      params: plain, stacked or unrolled.
      adapters: in the same form.
      scale: alpha / rank.

    Raises:
      InputError: for quantised parameters: their rounding would be made part of the result.
    """
    tree = flatten_dict(params)
    for path, (a, b) in _pairs(adapters).items():
        _require_matrix(tree, path)
        if isinstance(tree[path], Quantized):
            raise InputError(
                f"{'/'.join(path)} is quantised; merge into the parameters it was made from"
            )
        tree[path] = _merged(tree[path], a, b, scale)
    return unflatten_dict(_with_new_tokens(tree, adapters))


@functools.partial(jax.jit, static_argnames="scale")
def _merged(
    weight: Float[Array, "*L I O"],
    a: Float[Array, "*L I r"],
    b: Float[Array, "*L r O"],
    scale: float,
) -> Array:
    low = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (weight.astype(jnp.float32) + low * scale).astype(weight.dtype)
