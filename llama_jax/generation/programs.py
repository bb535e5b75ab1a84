"""The compiled programs of generation: few, counted, and shared by all who run the same model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from llama_jax.axes import Array, Bool, Float, Int, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.generation.decode import (
    Progress,
    SampledTokens,
    advance,
    begin,
    prefill,
    prefill_more,
)
from llama_jax.generation.speculative import speculate
from llama_jax.model.attention import KERNELS
from llama_jax.model.cache import Cache, LayerCache, grow, init_cache, take_sequences
from llama_jax.model.cudnn import fits_cudnn
from llama_jax.model.llama import Llama, apply
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.sharding import Rules, constrain, whole_sequences

# --- logprobs ---
#
# Log-probabilities of given tokens, as a pure function.


_BLOCK = 128  # tokens a sequence whose logits are in memory at a time


def given_logprobs(
    model: Llama,
    params: Parameters,
    tokens: Int[Array, "B T"],
    first: Int[Array, " B"],
    following: Int[Array, "B W"],
) -> tuple[Float[Array, "B W"], Bool[Array, "B W"]]:
    """Log-probability of tokens in a text, and whether each is the most probable one.

    Logits are formed for these tokens alone, a block of them at a time.

    Args:
      model: the module.
      params: parameters in the form that `model.options.scan` says.
      tokens: the texts, padded on the right with anything.
      first: position in each sequence whose next token is the first of `following`.
      following: the tokens that follow positions `first`, `first + 1`, ...; padded with anything.
    """
    features = apply(model, params, tokens, None, None, method="features").last
    width = following.shape[1]
    places = jnp.minimum(first[:, None] + jnp.arange(width), tokens.shape[1] - 1)
    features = jnp.take_along_axis(features, places[..., None], axis=1)
    size = min(_BLOCK, width)

    def blocks(x: Array) -> Array:
        """The columns cut into blocks, those in front."""
        padded = jnp.pad(x, [(0, 0), (0, -width % size), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def measure(block: tuple[Array, Array]) -> tuple[Array, Array]:
        """One block."""
        logits = apply(model, params, block[0], method="unembed")
        chosen = jnp.take_along_axis(logits, block[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == block[1]

    logprobs, greedy = lax.map(measure, (blocks(features), blocks(following)))
    return tuple(
        x.swapaxes(0, 1).reshape(following.shape[0], -1)[:, :width] for x in (logprobs, greedy)
    )


# --- programs ---


ROOM = 32  # tokens a sequence that one call of the decoding loop can return at most
_SMALLEST_BUCKET = 16
_PIECE, _LARGE_PIECE, _MOST_TOKENS = 1024, 8192, 65536
_HEADROOM = 192  # slots reserved at first beyond a short prompt


def bucket_size(count: int) -> int:
    """The smallest size of the series 16, 24, 32, 48, 64, 96, ... that holds `count`: at most a
    third is padding.
    """
    size = _SMALLEST_BUCKET
    while size < count:
        size *= 2
    return size * 3 // 4 if size > _SMALLEST_BUCKET and count <= size * 3 // 4 else size


def bucket_sequences(count: int, multiple: int = 1) -> int:
    """The smallest power of two that holds `count` sequences, times the number of devices that a
    mesh divides sequences by.
    """
    return multiple * (1 << (-(-count // multiple) - 1).bit_length())


def bucket_slots(needed: int, most: int) -> int:
    """Slots to reserve when `needed` are and at most `most` ever will be: twice the needed number,
    so that growing is rare.
    """
    return bucket_size(max(needed, min(most, max(2 * needed, needed + _HEADROOM))))


def pin(cache: Cache, rules: Rules) -> Cache:
    """The cache with sequences and heads laid over the mesh as the rules say; as it is without a
    mesh.
    """
    leading = ("layers",) if isinstance(cache.layers, LayerCache) else ()
    axes = (*leading, "batch", "kv_heads", "length", "width")
    return cache._replace(
        layers=jax.tree.map(lambda array: constrain(array, axes[: array.ndim], rules), cache.layers)
    )


class Programs:
    """The compiled programs of one model, kept for the life of the process and shared by all its
    generators.

    Every program is compiled once for each combination of shapes that it meets: sequences are
    powers of two, lengths and slots of the series of `bucket_size`, so their number grows with the
    logarithm of the longest text.

    Attributes:
      model: the module that is run.
      mesh: the devices it runs on; `None` for the default device.
      compilations: programs compiled so far, by name.
    """

    def __init__(self, model: Llama, mesh: Mesh | None) -> None:
        self.model = model
        self.mesh = mesh
        self.compilations: dict[str, int] = {}
        self.prefill = self._program(
            "prefill",
            functools.partial(prefill, model),
            donate_argnums=(3,),
            static_argnames=("fresh",),
        )
        self.prefill_more = self._program(
            "prefill", functools.partial(prefill_more, model), donate_argnums=(3, 4)
        )
        self._begin = self._program("begin", begin, static_argnames=("logprobs",))
        decoding = functools.partial(advance, model, room=ROOM)
        self.advance = self._program(
            "decode", decoding, donate_argnums=(1,), static_argnames=("logprobs",)
        )
        drafting = functools.partial(speculate, model, room=ROOM)
        named = ("count", "draft_model", "logprobs")
        self.speculate = self._program(
            "speculate", drafting, donate_argnums=(1, 2), static_argnames=named
        )
        self.score = self._program("score", functools.partial(given_logprobs, model))
        self.init_cache = self._program("cache", self._init_cache, static_argnums=(0, 1))
        self.grow = self._program("cache", grow, static_argnums=(1,))
        self.take_sequences = self._program("cache", self._take_sequences, static_argnums=(2,))

    def begin(
        self, logits: Array, cache: Cache, *args: Any, logprobs: int | None
    ) -> tuple[Progress, SampledTokens]:
        """`llama_jax.generation.decode.begin`, compiled once for all numbers of slots: it looks at
        the lengths alone.
        """
        progress, drawn = self._begin(logits, Cache((), cache.lengths), *args, logprobs=logprobs)
        return progress._replace(cache=cache), drawn

    def piece(self, sequences: int) -> int:
        """Tokens of a prompt to be prefilled at a time; many where a kernel takes the first piece,
        as it takes no other.
        """
        few = self.model.options.attention not in KERNELS
        return _PIECE if few else max(_PIECE, min(_LARGE_PIECE, _MOST_TOKENS // sequences))

    @property
    def sequence_multiple(self) -> int:
        """What the number of sequences has to be divisible by: the devices that share the batch."""
        if self.mesh is None:
            return 1
        axes: Sequence[str] = dict(self.model.options.rules)["batch"]
        sizes = [self.mesh.shape[axis] for axis in axes]
        return functools.reduce(int.__mul__, sizes, 1)

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    def _program(self, name: str, function: Callable, **how: Any) -> Callable:
        """The function compiled, on the mesh, counting its traces: JAX traces once for each program
        that it compiles.
        """

        @functools.wraps(function)
        def traced(*args: Any, **settings: Any) -> Any:
            """Runs in Python only while JAX traces."""
            self.compilations[name] = self.compilations.get(name, 0) + 1
            return function(*args, **settings)

        compiled = jax.jit(traced, **how)

        @functools.wraps(compiled)
        def run(*args: Any, **settings: Any) -> Any:
            """Runs the program for these shapes."""
            with self._on_mesh():
                return compiled(*args, **settings)

        return run

    def _init_cache(self, sequences: int, slots: int) -> Cache:
        options = self.model.options
        cache = init_cache(
            self.model.config, sequences, slots, options.resolved_cache_dtype, options.scan
        )
        return pin(cache, options.rules)

    def _take_sequences(self, cache: Cache, sequences: Int[Array, " R"], slots: int) -> Cache:
        """Rows of a cache, copied, with capacity for at least `slots` tokens."""
        return pin(
            grow(take_sequences(cache, sequences), max(slots, cache.slots)),
            self.model.options.rules,
        )


def platform_of(params: Parameters, mesh: Mesh | None) -> str:
    """Of the devices that run a model: the mesh's, else where its parameters are, else where JAX
    puts arrays that have no device yet.
    """
    if mesh is not None:
        return mesh.devices.flat[0].platform
    first = next(iter(jax.tree.leaves(params)), None)
    if isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer):
        return next(iter(first.devices())).platform
    return jax.default_backend()


def with_kernel(options: ModelOptions, config: LlamaConfig, platform: str) -> ModelOptions:
    """The options with `auto` attention resolved where a platform has a kernel for prompts; else it
    goes by their lengths.
    """
    if (
        options.attention != "auto"
        or platform != "gpu"
        or not fits_cudnn(config.head_dim, options.dtype)
    ):
        return options
    return dataclasses.replace(options, attention="cudnn")


@functools.cache
def programs_of(config: LlamaConfig, options: ModelOptions, mesh: Mesh | None = None) -> Programs:
    """The programs of a model run in one way."""
    return Programs(
        Llama(config, dataclasses.replace(options, rules=whole_sequences(options.rules))), mesh
    )
