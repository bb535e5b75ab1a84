"""How a model is run: choices that never change its results, only where, how fast and in how
much memory.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from llama_jax.errors import InputError
from llama_jax.model.remat import CONTEXT_ATTENTION, hosted_names, parse_remat, saved_names
from llama_jax.parallel.sharding import TRAINING, Rules

_FLOATS = ("float32", "bfloat16", "float16")
_CACHE_DTYPES = ("auto", *_FLOATS, "int8")


def check_options(names: Iterable[str]) -> None:
    """Refuses options that `ModelOptions` does not have, and `scan`, which the form of the
    parameters says.

    Raises:
      InputError: naming the first and the nearest that there is.
    """
    known = [field.name for field in dataclasses.fields(ModelOptions) if field.name != "scan"]
    for name in names:
        if name == "scan":
            raise InputError(
                "option scan given; stacked or unrolled parameters say it (`stack`, "
                "`unstack`): leave it out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"option {name!r} is unknown; the nearest is {near[0]}")


def resolve_dtype(name: str, platform: str | None = None) -> str:
    """The compute dtype that `auto` stands for: float32 on CPUs, bfloat16 elsewhere.

    Args:
      name: of a dtype, or `auto`.
      platform: `cpu`, `gpu` or `tpu`; that of the devices at hand by default.
    """
    if name != "auto":
        return name
    platform = platform or jax.devices()[0].platform
    return "float32" if platform == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Static choices of one compiled program.

    Attributes:
      dtype: dtype of activations and of weights in use; norms, rotary embedding, softmax and loss
        are always float32. (Products of float32 have XLA's default precision: on TPUs and TF32 GPUs
        set `jax_default_matmul_precision`.)
      scan: run the layers as one scanned body over stacked weights (compile time does not grow with
        depth), or unrolled over per-layer weights (faster decoding). The parameter tree has the
        matching form; see `llama_jax.weights.assemble`.
      remat: the activations that are kept for the backward pass: a policy of
        `llama_jax.model.remat.REMAT_POLICIES`, from `none` (everything, nothing is recomputed) to
        `full` (only the layer's input), or names joined by `+`, of `q k v context middle gate up`;
        or a split of the layers, `20*all+attention`. `context@host` is kept by the host.
      attention: attention backend, see `llama_jax.model.attention`.
      context_attention: where the mesh cuts sequences over `context`, whether a device gathers
        their keys and values (`all_gather`) or they travel around the devices (`ring`); see
        `llama_jax.model.context_parallel`.
      rules: axis name -> mesh axes, see `llama_jax.parallel.sharding`.
      cache_dtype: dtype of keys and values in the cache: `auto` (that of the activations), a float
        type, or `int8` (half the bytes of bfloat16; see `llama_jax.model.cache`).

    Raises:
      InputError: naming the option that is wrong.
    """

    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"
    context_attention: str = "all_gather"
    rules: Rules = TRAINING
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _FLOATS:
            raise InputError(f"dtype {self.dtype!r} given; float32, bfloat16 or float16 expected")
        if self.cache_dtype not in _CACHE_DTYPES:
            raise InputError(
                f"cache_dtype {self.cache_dtype!r} given; one of "
                f"{', '.join(_CACHE_DTYPES)} expected"
            )
        if self.context_attention not in CONTEXT_ATTENTION:
            raise InputError(
                f"context_attention {self.context_attention!r} given; "
                f"{' or '.join(CONTEXT_ATTENTION)} expected"
            )
        parse_remat(self.remat)

    @property
    def remat_policy(self) -> Callable[..., bool]:
        """The policy for `jax.checkpoint` of a layer, whose backward pass recomputes activations
        that are not kept; not of a split.
        """
        hosted = sorted(hosted_names(self.remat))
        here = [*sorted(saved_names(self.remat) - set(hosted)), "root"]
        if not hosted:
            return checkpoint_policies.save_only_these_names(*here)
        return checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=here,
            names_which_can_be_offloaded=hosted,
            offload_src="device",
            offload_dst="pinned_host",
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""
        return jnp.dtype(self.dtype)

    @property
    def resolved_cache_dtype(self) -> jnp.dtype:
        """`cache_dtype` as a dtype, for `llama_jax.model.cache.init_cache`."""
        return self.compute_dtype if self.cache_dtype == "auto" else jnp.dtype(self.cache_dtype)
