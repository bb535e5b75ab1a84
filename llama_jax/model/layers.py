"""The parts of a LLaMA layer: thin linen modules that declare parameters and call pure functions.

The mathematics lives in the functions (`rms_norm`, `swiglu`, `rotate`, `attend`), usable without
any module.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float
from llama_jax.config import LlamaConfig
from llama_jax.model.attention import NO_MASK, Mask, Scales
from llama_jax.model.cache import LayerCache, append
from llama_jax.model.context_parallel import attend_over_mesh
from llama_jax.model.lora import Adapted, Matrix
from llama_jax.model.matmul import product, with_adapter
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import Quantized, Weight
from llama_jax.model.rope import Rotation, rotate
from llama_jax.parallel.compiler import matrix_unit
from llama_jax.parallel.sharding import (
    PARAMETER_AXES,
    adapter_axes,
    channels_first,
    constrain,
    constrain_stream,
    enter_block,
    gathered,
    gathered_part,
    gathered_side,
)

_ROWS_A_ROUND = 8  # of the cache, where layers are unrolled; see `append`
# Standard deviation of fresh weights; those that write into the residual stream are smaller by
# sqrt(2 * layers), so that the stream's variance does not grow with depth (Radford et al. 2019,
# section 2.3).
_INIT_STD = 0.02


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """X / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in the dtype of
    `x` (arXiv:1910.07467).
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    root = checkpoint_name(jax.lax.rsqrt(mean_square + eps), "root")
    return (wide * root * scale.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def cached(cache: LayerCache, dtype: DTypeLike) -> tuple[Array, Array, Scales | None]:
    """Keys and values of a cache as `attend` takes them: floats in the compute dtype, or integers
    and their scales.
    """
    if cache.key_scales is None or cache.value_scales is None:
        return cache.keys.astype(dtype), cache.values.astype(dtype), None
    return cache.keys, cache.values, Scales(cache.key_scales, cache.value_scales)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), (self.config.dim,))
        return rms_norm(x, scale, self.config.norm_eps)


def declare(module: nn.Module, name: str, std: float, shape: tuple[int, int]) -> Matrix:
    """A matrix of the module, initialized with `std` by `init`; the parameters may hold a quantised
    or adapted one in its place.
    """
    held = module.get_variable("params", name) if module.has_variable("params", name) else None
    return (
        held
        if isinstance(held, Quantized | Adapted)
        else module.param(name, nn.initializers.normal(std), shape)
    )


def gather_weight(weight: Weight, name: str, options: ModelOptions) -> Weight:
    """The weight `name` gathered for use; a plain one in the compute dtype, or its own where that
    is smaller.
    """
    if isinstance(weight, Quantized):
        return jax.tree.map(
            lambda part: gathered_part(part, channels_first(name), options.rules), weight
        )
    return gathered(
        weight, PARAMETER_AXES[name], options.compute_dtype, options.rules, gathered_side(name)
    )


def gathered_matrix(matrix: Matrix, name: str, options: ModelOptions) -> Matrix:
    """`gather_weight` of a matrix that may be adapted: its weight and both factors."""
    if not isinstance(matrix, Adapted):
        return gather_weight(matrix, name, options)
    a, b = (
        gathered(factor, adapter_axes(name, part), options.compute_dtype, options.rules)
        for part, factor in (("a", matrix.a), ("b", matrix.b))
    )
    return dataclasses.replace(matrix, weight=gather_weight(matrix.weight, name, options), a=a, b=b)


def _weights(
    module: nn.Module,
    options: ModelOptions,
    stds: dict[str, float],
    shapes: dict[str, tuple[int, int]],
) -> list[Matrix]:
    """Declares the matrices of a module and returns them gathered for use."""
    return [
        gathered_matrix(declare(module, name, stds[name], shape), name, options)
        for name, shape in shapes.items()
    ]


def _heads_apart(head_dim: int) -> bool:
    """Whether a product may have heads as an axis of their own: not where a head fills only a part
    of the matrix unit.
    """
    return matrix_unit() <= head_dim


def split_heads(
    x: Float[Array, "B T D"], weight: Matrix, name: str, head_dim: int, options: ModelOptions
) -> Float[Array, "B n T H"]:
    """The stream times `weight [D, n*H]`, not gathered yet, as heads.

    A plain weight that is gathered is used transposed, as `[n, H, D]`: on TPUs the product then
    gives the heads of all tokens one after the other, as attention takes them, and neither heads
    nor weight are copied into another layout.
    """
    batch, length, dim = x.shape
    if (
        length > 1
        and jax.sharding.get_abstract_mesh().size > 1
        and not isinstance(weight, Quantized | Adapted)
    ):
        rows = gathered(
            weight.T, PARAMETER_AXES[name][::-1], options.compute_dtype, options.rules, side=-2
        )
        if _heads_apart(head_dim):
            return jnp.einsum("btd,nhd->bnth", x, rows.reshape(-1, head_dim, dim).astype(x.dtype))
        flat = product(x, rows, axis=1)
    else:
        flat = product(x, gathered_matrix(weight, name, options))
    # XLA for TPU would split the weight instead of one token's few channels: a second copy of it,
    # laid out by heads.
    flat = jax.lax.optimization_barrier(flat) if length == 1 else flat
    return flat.reshape(batch, length, -1, head_dim).swapaxes(1, 2)


def join_heads(heads: Float[Array, "B N T H"], weight: Matrix) -> Float[Array, "B T D"]:
    """The heads of each token side by side, times `weight [N*H, D]`."""
    if isinstance(weight, Adapted):
        return with_adapter(heads, weight, join_heads)
    batch, count, length, head_dim = heads.shape
    if length == 1 or isinstance(weight, Quantized) or not _heads_apart(head_dim):
        return product(heads.swapaxes(1, 2).reshape(batch, length, count * head_dim), weight)
    # Heads stay apart in the contraction: flattening them first costs a copy of `heads` on TPU.
    apart = weight.reshape(count, head_dim, -1).astype(heads.dtype)
    return jnp.einsum("bnth,nhd->btd", heads, apart)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, without the norm before and the residual
    after.
    """

    config: LlamaConfig
    options: ModelOptions = ModelOptions()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Rotation,
        mask: Mask = NO_MASK,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends over the cache with `x` appended at `mask.start`, or over `x` itself, which an
        empty cache then begins with.

        Hands the cache back.
        """
        config, rules = self.config, self.options.rules
        inner, outer = config.heads * config.head_dim, config.kv_heads * config.head_dim
        shapes = {
            "wq": (config.dim, inner),
            "wk": (config.dim, outer),
            "wv": (config.dim, outer),
            "wo": (inner, config.dim),
        }
        stds = {
            "wq": _INIT_STD,
            "wk": _INIT_STD,
            "wv": _INIT_STD,
            "wo": _INIT_STD * (2 * config.layers) ** -0.5,
        }
        wq, wk, wv, wo = (declare(self, name, stds[name], shape) for name, shape in shapes.items())
        x = enter_block(x, rules)

        def heads(name: str, matrix: Matrix) -> Array:
            """Projects the stream to heads `[B, n, T, H]`."""
            return constrain(
                split_heads(x, matrix, name, config.head_dim, self.options),
                ("batch", PARAMETER_AXES[name][1], "length", "width"),
                rules,
            )

        q = checkpoint_name(rotate(heads("wq", wq), turn, heads=1), "q")
        k = checkpoint_name(rotate(heads("wk", wk), turn, heads=1), "k")
        v = checkpoint_name(heads("wv", wv), "v")
        scales = None
        if cache is not None:
            start = jnp.zeros(x.shape[0], jnp.int32) if mask.start is None else mask.start
            cache = append(cache, k, v, start, rules, 1 if self.options.scan else _ROWS_A_ROUND)
            held = (
                cache
                if mask.start is not None
                else jax.tree.map(lambda slots: slots[:, :, : x.shape[1]], cache)
            )
            k, v, scales = cached(held, q.dtype)
        out = attend_over_mesh(q, k, v, mask, self.options, scales)
        return constrain_stream(
            join_heads(out, gathered_matrix(wo, "wo", self.options)), rules
        ), cache


class FeedForward(nn.Module):
    """down(silu(x gate) * (x up)), without the norm before and the residual after."""

    config: LlamaConfig
    options: ModelOptions = ModelOptions()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the feed-forward layer to every token."""
        dim, ffn, rules = self.config.dim, self.config.ffn_dim, self.options.rules
        shapes = {"gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)}
        stds = {
            "gate": _INIT_STD,
            "up": _INIT_STD,
            "down": _INIT_STD * (2 * self.config.layers) ** -0.5,
        }
        w_gate, w_up, w_down = _weights(self, self.options, stds, shapes)
        x = enter_block(x, rules)
        gate, up = (
            row_major(constrain(product(x, w), ("batch", "length", "ffn"), rules))
            for w in (w_gate, w_up)
        )
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return constrain_stream(product(swiglu(gate, up), w_down), rules)


class Layer(nn.Module):
    """One layer of the residual stream: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: LlamaConfig
    options: ModelOptions = ModelOptions()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: LayerCache | None, turn: Rotation, mask: Mask
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The stream after the layer, and the layer's cache with the new tokens (carry and output
        of `nn.scan`).
        """
        attention = Attention(self.config, self.options, name="attention")
        feed_forward = FeedForward(self.config, self.options, name="feed_forward")
        attended, cache = attention(
            RMSNorm(self.config, name="attention_norm")(x), turn, mask, cache
        )
        x = checkpoint_name(x + attended, "middle")
        x = row_major(x + feed_forward(RMSNorm(self.config, name="feed_forward_norm")(x)))
        self.sow("residual", "stream", x, reduce_fn=lambda _, new: new, init_fn=lambda: ())
        return x, cache


def row_major(x: Float[Array, "B T _"]) -> Float[Array, "B T _"]:
    """With its last axis innermost in memory: XLA for TPU would stack the outputs of a scan the
    other way around.

    That costs two copies a layer. Elsewhere there is no other layout.
    """
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
        x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def layer_class(options: ModelOptions) -> Callable[..., nn.Module]:
    """`Layer`, rematerialised as the options say."""
    if options.remat == "none":
        return Layer
    # Inside a scan the loop itself keeps the compiler from merging the recomputation with the first
    # pass.
    return nn.remat(Layer, policy=options.remat_policy, prevent_cse=not options.scan)


def scanned_layers(config: LlamaConfig, options: ModelOptions) -> nn.Module:
    """All layers as one body scanned over weights (and cache) stacked on a leading axis; in no
    module yet.
    """
    body = nn.scan(
        layer_class(options),
        variable_axes={"params": 0, "residual": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.layers,
    )
    return body(config, options, parent=None)
