"""LLaMA: embedding, layers, final norm, head. One forward pass; training is decoding without a
cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.axes import Array, Float, Int, Num, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.attention import Mask
from llama_jax.model.cache import Cache
from llama_jax.model.layers import (
    _INIT_STD,
    RMSNorm,
    declare,
    gather_weight,
    layer_class,
    scanned_layers,
)
from llama_jax.model.lora import Adapted
from llama_jax.model.matmul import product
from llama_jax.model.options import ModelOptions, check_options
from llama_jax.model.quantize import Quantized, Weight, dequantize, take_embeddings
from llama_jax.model.remat import layer_parts
from llama_jax.model.rope import Rotation, rotation
from llama_jax.parallel.sharding import (
    constrain,
    constrain_stream,
    enter_block,
    parts_of,
    require_divisible,
)


class Features(NamedTuple):
    """What the layers make of a batch: the final normed stream, ready for the head, and the cache
    after it.
    """

    last: Float[Array, "B T D"]
    cache: Cache | None


class Llama(nn.Module):
    """A LLaMA. `Llama(config).init(key, tokens)["params"]` is a nested dict of plain arrays.

    Inputs are token ids `[B, T]` (integers) or embeddings `[B, T, D]` (floats) everywhere.
    """

    config: LlamaConfig
    options: ModelOptions = ModelOptions()

    def setup(self) -> None:
        """Declares the parameters; see `llama_jax.accounting.parameter_shapes` for the tree."""
        config = self.config
        self._require_parameters()
        self.embedding: Any = declare(self, "embedding", _INIT_STD, (config.vocab_size, config.dim))
        if self.options.scan:
            self.layers: Any = scanned_layers(config, self._parts()[-1][1])
        else:
            each = [options for count, options in self._parts() for _ in range(count)]
            self.layers = [
                layer_class(options)(config, options, name=f"layers_{i}")
                for i, options in enumerate(each)
            ]
        self.final_norm = RMSNorm(config)
        if not config.tied_head:
            self.head = declare(self, "head", _INIT_STD, (config.dim, config.vocab_size))

    def _require_parameters(self) -> None:
        """Refuses to run without parameters, or with those of the other form."""
        held, form = self.variables.get("params", {}), "layers" if self.options.scan else "layers_0"
        if self.is_initializing() or form in held:
            return
        if not held:
            raise InputError(
                "no parameters given; apply({'params': params}, tokens) expected, or "
                "after ToNNX(...) first .lazy_init(tokens)"
            )
        own, other = ("stacked", "unrolled") if self.options.scan else ("unrolled", "stacked")
        function = "stack" if self.options.scan else "unstack"
        raise InputError(
            f"{other} parameters given to a module of {own} ones; "
            f"llama_jax.{function}(params) expected, or "
            f"Llama(config, ModelOptions(scan={not self.options.scan}))"
        )

    def embed(self, inputs: Num[Array, "B T *D"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table in the compute dtype; embeddings pass through."""
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = take_embeddings(
                gather_weight(self.embedding, "embedding", self.options), inputs
            )
        if inputs.shape[-1] != self.config.dim:
            raise InputError(
                f"inputs: {inputs.dtype} of shape {list(inputs.shape)} given; embeddings "
                f"[B, T, {self.config.dim}] expected"
            )
        return constrain_stream(inputs.astype(self.options.compute_dtype), self.options.rules)

    def features(
        self,
        inputs: Num[Array, "B T *D"],
        documents: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        positions: Int[Array, " T"] | None = None,
        fresh: bool = False,
    ) -> Features:
        """The forward pass up to the head.

        Args:
          inputs: token ids or embeddings.
          documents: document number of each token of a packed sequence; attention does not cross
            documents.
          cache: keys and values of the tokens before; the new tokens are written from
            `cache.lengths` on. The cache comes back with the new tokens in it and `lengths` as they
              were: the caller knows how many are real.
          positions: where in their sequences the tokens stand, when they come in another order; not
            with a cache.
          fresh: the cache is empty; then the tokens see themselves alone, whatever its capacity.

        Raises:
          InputError: for a length that the mesh does not divide.
        """
        rules = self.options.rules
        require_divisible("length", inputs.shape[1], parts_of("length", rules))
        x = self.embed(inputs)
        batch, length = x.shape[:2]
        start = None if cache is None or fresh else cache.lengths
        first = jnp.zeros((batch, 1), jnp.int32) if start is None else start[:, None]
        turn = rotation(
            first + (jnp.arange(length, dtype=jnp.int32) if positions is None else positions),
            self.config,
        )
        mask = Mask(start=start, documents=documents)
        if positions is not None:
            mask = mask._replace(
                positions=positions, key_positions=positions, key_documents=documents
            )
        if cache is None:
            return Features(
                enter_block(self.final_norm(self._run_layers(x, None, turn, mask)[0]), rules), None
            )
        x, layers = self._run_layers(x, cache.layers, turn, mask)
        return Features(self.final_norm(x), Cache(layers, cache.lengths))

    def _parts(self) -> list[tuple[int, ModelOptions]]:
        """Consecutive layers with the same options, as how many and which."""
        parts = layer_parts(self.options.remat, self.config.layers)
        return [(count, dataclasses.replace(self.options, remat=remat)) for count, remat in parts]

    def _run_layers(self, x: Array, caches: Any, turn: Rotation, mask: Mask) -> tuple[Array, Any]:
        if self.options.scan:
            return self._scan_layers(x, caches, turn, mask)
        new = []
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, None if caches is None else caches[i], turn, mask)
            new.append(cache)
        return x, tuple(new)

    def _scan_layers(self, x: Array, caches: Any, turn: Rotation, mask: Mask) -> tuple[Array, Any]:
        """One scan over all layers; where their backward passes keep different things, one for each
        part of the one stack.
        """
        parts = self._parts()
        if (
            len(parts) == 1
            or caches is not None
            or self.is_initializing()
            or self.is_mutable_collection("residual")
        ):
            return self.layers(x, caches, turn, mask)
        start, stacked = 0, self.layers.variables["params"]
        for count, options in parts:
            part = jax.tree.map(lambda leaf, here=slice(start, start + count): leaf[here], stacked)
            layers = scanned_layers(dataclasses.replace(self.config, layers=count), options)
            x, _ = layers.apply({"params": part}, x, None, turn, mask)
            start += count
        return x, None

    def _head(self) -> tuple[Weight, int]:
        """The output head gathered for use, and the axis of it that meets the features: a tied
        table has rows for columns.
        """
        name = "embedding" if self.config.tied_head else "head"
        return gather_weight(getattr(self, name), name, self.options), int(self.config.tied_head)

    def head_matrix(self) -> Float[Array, "D V"]:
        """The output head in the compute dtype: its own matrix, or the embedding table
        transposed.
        """
        weight, axis = self._head()
        if isinstance(weight, Quantized):
            return dequantize(weight).T.astype(self.options.compute_dtype)
        matrix = weight.astype(self.options.compute_dtype)
        return matrix.T if axis else matrix

    def unembed(self, last: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32."""
        weight, axis = self._head()
        return constrain(
            product(last, weight, axis, jnp.float32),
            ("batch", "length", "vocab"),
            self.options.rules,
        )

    def __call__(
        self, inputs: Any, documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, float32."""
        require_inputs(inputs)
        return self.unembed(self.features(inputs, documents).last)


def require_inputs(inputs: Any) -> None:
    """Refuses anything but a batch of sequences.

    Raises:
      InputError: for lists, and for arrays of other dimensions than those of token ids or
        embeddings.
    """
    if not hasattr(inputs, "shape") or not hasattr(inputs, "dtype"):
        raise InputError(
            f"inputs: a {type(inputs).__name__} given; an array of token ids [B, T] "
            "expected: jnp.asarray([ids])"
        )
    tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
    if inputs.ndim != (2 if tokens else 3):
        expected = (
            "token ids [B, T]" if tokens else "embeddings [B, T, D], or token ids as integers,"
        )
        advice = "; inputs[None] is a batch of one" if inputs.ndim == (1 if tokens else 2) else ""
        raise InputError(
            f"inputs: {inputs.dtype} of shape {list(inputs.shape)} given; {expected} "
            f"expected{advice}"
        )


def require_tokens(tokens: Any) -> None:
    """Refuses anything but a batch of token ids.

    Raises:
      InputError: as `require_inputs`, and for embeddings.
    """
    require_inputs(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"tokens: {tokens.dtype} given; token ids [B, T] expected")


def parameter_dtype(params: Parameters) -> str:
    """The dtype that parameters are in: that of the embedding table, or of the norms where the
    table is quantized.
    """
    table = params["embedding"]
    table = table.weight if isinstance(table, Adapted) else table
    dtype = params["final_norm"]["scale"].dtype if isinstance(table, Quantized) else table.dtype
    return jnp.dtype(dtype).name


def model_for(params: Parameters, config: LlamaConfig, **options: object) -> Llama:
    """The module that fits a parameter tree: its form and, unless `dtype` is among the options, its
    dtype.

    Args:
      params: parameters, stacked or unrolled.
      config: the architecture.
      **options: of `ModelOptions`, except `scan`.

    Raises:
      InputError: for a tree that is none of parameters, and for unknown options.
    """
    if "embedding" not in params:
        raise InputError(
            f"params: a tree of {', '.join(map(str, params))[:60]} given; the parameters "
            "themselves expected, load(...).params"
        )
    table, expected = params["embedding"], (config.vocab_size, config.dim)
    if getattr(table, "shape", expected) != expected:
        raise InputError(
            f"params: an embedding of shape {list(table.shape)} given with a config of "
            f"{list(expected)}; the config of the same model expected, load(...).config"
        )
    check_options(options)
    options = {"dtype": parameter_dtype(params), **options}
    return Llama(config, ModelOptions(scan="layers" in params, **options))  # type: ignore[arg-type]


def apply(
    model: Llama, params: Parameters, *args: Any, method: str | None = None, **named: Any
) -> Any:
    """`model.apply` on a plain parameter tree."""
    return model.apply({"params": params}, *args, method=method, **named)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _logits(
    params: Parameters,
    inputs: Array,
    documents: Array | None,
    config: LlamaConfig,
    options: ModelOptions,
) -> Array:
    return apply(Llama(config, options), params, inputs, documents)


def logits(
    params: Parameters,
    inputs: Any,
    config: LlamaConfig,
    documents: Int[Array, "B T"] | None = None,
    **options: object,
) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32, compiled.

    Forward-mode derivatives under `jax.vmap` (`jax.jacfwd`), and those of sequences above 512
    tokens, need `attention="reference"`.

    Args:
      params: parameters, stacked or unrolled.
      inputs: token ids `[B, T]`, or embeddings `[B, T, D]` in their place.
      config: the architecture.
      documents: document numbers of packed sequences.
      **options: `dtype` (that of the parameters by default), `attention`, `remat`, `rules` of
        `ModelOptions`.
    """
    require_inputs(inputs)
    return _logits(
        params, jnp.asarray(inputs), documents, config, model_for(params, config, **options).options
    )


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _hidden_states(
    params: Parameters, inputs: Array, config: LlamaConfig, options: ModelOptions
) -> Array:
    model = Llama(config, options)
    embedded = apply(model, params, inputs, method="embed")
    _, sown = model.apply({"params": params}, inputs, method="features", mutable=["residual"])
    streams = sown["residual"]
    if options.scan:
        after = streams["layers"]["stream"]
    else:
        after = jnp.stack([streams[f"layers_{i}"]["stream"] for i in range(config.layers)])
    return jnp.concatenate([embedded[None], after])


def hidden_states(
    params: Parameters, inputs: Any, config: LlamaConfig, **options: object
) -> Float[Array, "L1 B T D"]:
    """The residual stream before the first layer and after each layer: `L + 1` entries, none of
    them through the final norm.

    Args:
      params: parameters, stacked or unrolled.
      inputs: token ids `[B, T]`, or embeddings `[B, T, D]` in their place.
      config: the architecture.
      **options: `dtype` (that of the parameters by default), `attention`, `remat`, `rules` of
        `ModelOptions`.
    """
    require_inputs(inputs)
    return _hidden_states(
        params, jnp.asarray(inputs), config, model_for(params, config, **options).options
    )


def embed(params: Parameters, tokens: Any) -> Float[Array, "B T D"]:
    """The embeddings of token ids `[B, T]`, to be changed and passed on instead of the tokens.

    Raises:
      InputError: for anything but an array of token ids.
    """
    require_tokens(tokens)
    return take_embeddings(params["embedding"], tokens)
