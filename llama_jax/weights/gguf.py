"""LLaMA weights from a GGUF file."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.weights.gguf_blocks import DECODERS
from llama_jax.weights.gguf_read import GgufFile, GgufTensor, open_gguf
from llama_jax.weights.source import (
    blamed_on,
    file_shapes,
    oriented,
    quotient,
    real,
    require_tensors,
    shown,
    whole,
)

# --- gguf config ---
#
# The architecture that the metadata of a GGUF file declares, read and written.
#
# Source: `convert_hf_to_gguf.py` and `src/llama-model.cpp` of the llama.cpp project.


# Keys below `llama.` that are read here, or change no logit.
_KNOWN = {
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.vocab_size",
}

# Keys that are harmless with one value: the one that means a plain LLaMA.
_NEUTRAL = {
    "llama.attention.causal": True,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.sliding_window": 0,
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.use_parallel_residual": False,
}

_KEY_LENGTH = "llama.attention.key_length"
# of the inverse frequencies: how GGUF stores the scaling of Llama 3.1 and later
DIVISORS = "rope_freqs.weight"
_LOW, _HIGH, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192  # the same in all of them; only the factor differs
_CONTEXT_KEY = (
    "llama.rope.scaling.original_context_length"  # for models of other contexts than Meta's
)


def config_from_gguf(file: GgufFile) -> LlamaConfig:
    """The architecture of a LLaMA stored as GGUF.

    Numbers that the file holds in float32 become the shortest decimal of that float32: 1e-5, not
    9.99999974e-06.

    Raises:
      InputError: naming the key, for another architecture, a missing or wrong value, or a key whose
        effect is unknown.
    """
    with blamed_on(file.path):
        config = _declared(file)
    if DIVISORS not in file.tensors:
        return config
    divisors = file.read(DIVISORS)
    with blamed_on(file.path):
        context = whole(file.metadata, _CONTEXT_KEY, _ORIGINAL_CONTEXT)
        return dataclasses.replace(config, rope_scaling=_llama3_scaling(config, divisors, context))


def metadata_from_config(config: LlamaConfig) -> dict[str, object]:
    """The inverse of `config_from_gguf`, but for the scaling that `divisors_from_config` tells.

    Returns:
      Keys `llama.*` with their values, fit for `gguf_write`.
    """
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        **_scaling_keys(config.rope_scaling),
    }


def divisors_from_config(config: LlamaConfig) -> np.ndarray | None:
    """The tensor `DIVISORS` for a model with `llama3` scaling, `[H / 2]` float32; `None` for all
    others.

    Raises:
      InputError: for a scaling that readers would take for another one.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    divisors = _llama3_divisors(config, scaling).astype(np.float32)
    with blamed_on(f"{scaling} cannot be told in GGUF"):
        plain = dataclasses.replace(config, rope_scaling=None)
        if _llama3_scaling(plain, divisors, scaling.original_context or 0) != scaling:
            raise InputError("no frequency is divided by the whole factor")
    return divisors


def _declared(file: GgufFile) -> LlamaConfig:
    """The architecture by the metadata alone."""
    values = _plain_llama(file.metadata)
    heads = whole(values, "llama.attention.head_count")
    return LlamaConfig(
        vocab_size=whole(values, "llama.vocab_size", _embedding_rows(file)),
        dim=whole(values, "llama.embedding_length"),
        layers=whole(values, "llama.block_count"),
        heads=heads,
        kv_heads=whole(values, "llama.attention.head_count_kv", heads),
        head_dim=_head_dim(values),
        ffn_dim=whole(values, "llama.feed_forward_length"),
        norm_eps=_decimal(values, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_decimal(values, "llama.rope.freq_base", 10000.0),
        rope_scaling=_linear_scaling(values),
        context_length=whole(values, "llama.context_length"),
        tied_head="output.weight" not in file.tensors,
    )


def _plain_llama(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values below `llama.`, refused where one of them is not of a plain LLaMA."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"general.architecture is {shown(architecture)}; only 'llama' is supported"
        )
    values = {key: value for key, value in metadata.items() if key.startswith("llama.")}
    for key, value in values.items():
        if key not in _KNOWN and (key not in _NEUTRAL or value != _NEUTRAL[key]):
            raise InputError(
                f"{shown(key)} is {shown(value)}, which is not supported; only the plain LLaMA is"
            )
    return values


def _decimal(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number stored in float32, as its shortest decimal."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(real(values, key, default))))


def _embedding_rows(file: GgufFile) -> int | None:
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else None


def _head_dim(values: Mapping[str, Any]) -> int:
    """Width of a head, which up to three keys state and all of them alike."""
    if _KEY_LENGTH in values:
        width = whole(values, _KEY_LENGTH)
    else:
        width = quotient(values, "llama.embedding_length", "llama.attention.head_count")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if values.get(key, width) != width:
            raise InputError(
                f"{key} is {shown(values[key])} but heads are {width} wide; they have to be equal"
            )
    return width


def _linear_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    """Scaling by the keys `rope.scaling.*`; a factor without a type means linear, as in
    llama.cpp.
    """
    kind = values.get(
        "llama.rope.scaling.type", "linear" if "llama.rope.scaling.factor" in values else "none"
    )
    if kind not in ("none", "linear"):
        raise InputError(
            f"llama.rope.scaling.type {shown(kind)} is not supported; none and linear are"
        )
    return (
        None
        if kind == "none"
        else RopeScaling("linear", _decimal(values, "llama.rope.scaling.factor"))
    )


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, object]:
    """The keys `rope.scaling.*` of a scaling."""
    if scaling is None:
        return {}
    if scaling.rope_type == "linear":
        return {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": float(scaling.factor),
        }
    return (
        {}
        if scaling.original_context == _ORIGINAL_CONTEXT
        else {_CONTEXT_KEY: scaling.original_context}
    )


def _llama3_scaling(config: LlamaConfig, divisors: np.ndarray, context: int) -> RopeScaling:
    """The scaling that a tensor of divisors stands for, recomputed to be sure.

    Args:
      config: the architecture without it.
      divisors: `[H / 2]`.
      context: original context by the metadata; one that does not fit gives way to Meta's, since
        llama.cpp ignores it.
    """
    if (
        config.rope_scaling is None
        and divisors.shape == (config.head_dim // 2,)
        and divisors.max() >= 1
    ):
        factor = float(str(np.float32(divisors.max())))
        for original_context in (context, _ORIGINAL_CONTEXT):
            scaling = RopeScaling("llama3", factor, _LOW, _HIGH, original_context)
            if np.allclose(divisors, _llama3_divisors(config, scaling), rtol=1e-3, atol=0):
                return scaling
    raise InputError(
        f"{DIVISORS} is not the scaling of Llama 3.1 (low 1, high 4, original context "
        f"{_ORIGINAL_CONTEXT})"
    )


def _llama3_divisors(config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    """What `llama3` scaling divides each inverse frequency by, `[H / 2]`: 1 up to `factor`.

    Source: Meta's llama-models, `models/llama3/model.py`.
    """
    low, high, context = (
        float(x or 0)
        for x in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
    )
    wavelengths = (
        2 * math.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    )
    kept = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling.factor + kept)


# --- gguf ---


__all__ = [
    "NAMES",
    "GgufFile",
    "GgufSource",
    "GgufTensor",
    "adjacent_layout",
    "config_from_gguf",
    "half_layout",
]

NAMES = {
    "embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/wq": "blk.{}.attn_q.weight",
    "layers/attention/wk": "blk.{}.attn_k.weight",
    "layers/attention/wv": "blk.{}.attn_v.weight",
    "layers/attention/wo": "blk.{}.attn_output.weight",
    "layers/feed_forward_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/feed_forward/gate": "blk.{}.ffn_gate.weight",
    "layers/feed_forward/up": "blk.{}.ffn_up.weight",
    "layers/feed_forward/down": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head": "output.weight",
}

ROTATED = ("layers/attention/wq", "layers/attention/wk")  # rows in the order of the rotary layout


@dataclasses.dataclass(frozen=True, eq=False)
class GgufSource:
    """A GGUF file, or the parts of a split one, as a `Source`.

    Attributes:
      file: the open file; its metadata hold the tokenizer.
      config: the architecture that it declares.
    """

    file: GgufFile
    config: LlamaConfig

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GgufSource":
        """Opens a file, or all parts of a model by one of them, and checks names, shapes and types
        of all tensors.

        No tensor is read.

        Raises:
          InputError: for a damaged or missing file, another architecture, tensors or element types
            that do not fit.
        """
        file = open_gguf(path)
        config = config_from_gguf(file)
        with blamed_on(path):
            tensors = {name: tensor for name, tensor in file.tensors.items() if name != DIVISORS}
            require_tensors(
                file_shapes(config, NAMES), {name: tensor.shape for name, tensor in tensors.items()}
            )
            _require_decoders(tensors)
        return cls(file, config)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation and rotary layout; see `Source.read`."""
        tensor = self.file.read(NAMES[name].format(layer))
        if name in ROTATED:
            tensor = half_layout(tensor, self.config.head_dim)
        return oriented(name, tensor)


def half_layout(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection, from adjacent rotary pairs to pairs half a head apart.

    Args:
      rows: `[heads * H, D]`, where rows `2i` and `2i + 1` of a head turn together (Meta's files and
        GGUF).
      head_dim: `H`.

    Returns:
      The rows, reordered so that `i` and `i + H / 2` of a head turn together (Hugging Face, and
      this project).
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def adjacent_layout(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_layout`: rows of a query or key projection as GGUF has them."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _require_decoders(tensors: dict[str, GgufTensor]) -> None:
    unsupported = {
        tensor.type: name for name, tensor in tensors.items() if tensor.type not in DECODERS
    }
    if unsupported:
        named = ", ".join(f"{kind} ({shown(name)})" for kind, name in unsupported.items())
        raise InputError(
            f"element types not supported: {named}; take a file of, or requantize this "
            f"one to, one of {', '.join(DECODERS)}"
        )
