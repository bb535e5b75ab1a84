"""Quantized directories in Hugging Face's layout: weights in 8-bit floats are dequantized, every other scheme is refused.

A weight in 8-bit floats has a scale beside it, `weight_scale` or `weight_scale_inv` (both are multiplied with): one number
for the tensor, one an output channel, or one a block. Scales of activations and of the cache are left aside, since this
project quantizes neither: the logits are those of the weights alone.

Sources: transformers (`finegrained_fp8`, `fbgemm_fp8`), compressed-tensors (format `float-quantized`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

KEYS = ("quantization_config", "compression_config")
_BLOCK = (128, 128)
_SCALES = (".weight_scale", ".weight_scale_inv")
_OF_ACTIVATIONS = (".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_MARKS = (".qweight", ".qzeros", ".weight_packed", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB")
ADVICE = "fetch the model unquantized, in 8-bit floats (fp8), or as GGUF"


def quantization(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights of a directory are quantized, by its `config.json`; `None` where they are not.

    Raises:
      InputError: naming the scheme, for any but 8-bit floats.
    """
    for key in KEYS:
        scheme = values.get(key)
        if not scheme:
            continue
        if not isinstance(scheme, dict):
            raise InputError(f"{key} is {shown(scheme)}; an object expected")
        if not _is_fp8(scheme):
            raise InputError(f"the model is quantized ({key}: {_named(scheme)}), which is not supported; {ADVICE}")
        return scheme
    return None


def _is_fp8(scheme: Mapping[str, Any]) -> bool:
    method = scheme.get("quant_method")
    if method == "compressed-tensors":
        return scheme.get("format") == "float-quantized"
    return method in ("fp8", "fbgemm_fp8")


def _named(scheme: Mapping[str, Any]) -> str:
    """The scheme in a few words."""
    parts = [f"{name} {shown(scheme[name])}" for name in ("quant_method", "format", "bits", "load_in_4bit") if scheme.get(name)]
    return ", ".join(parts) or shown(scheme)


def require_unquantized(names: Mapping[str, object]) -> None:
    """Refuses tensors that only quantized files have, where `config.json` says nothing of a quantization.

    Raises:
      InputError: naming the first.
    """
    found = next((name for name in names if name.endswith(_MARKS)), None)
    if found is not None:
        raise InputError(f"the model is quantized (it has the tensor {shown(found)}), which is not supported; {ADVICE}")


def split_scales(
    tensors: Mapping[str, np.ndarray], scheme: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights of a directory in 8-bit floats, and their scales by the name of the weight.

    Returns:
      The weights as they are stored; the scales, `[1, 1]`, `[out, 1]` or `[blocks of out, blocks of in]`, float32.

    Raises:
      InputError: for a weight in 8-bit floats without a scale, and a scale that does not fit its weight.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_SCALES, *_OF_ACTIVATIONS))}
    scales = {}
    for name, weight in weights.items():
        if weight.itemsize == 1:
            found = next((tensors[name + end[7:]] for end in _SCALES if name + end[7:] in tensors), None)
            if found is None:
                raise InputError(f"tensor {shown(name)} is {weight.dtype.name} and has no weight_scale; fetch the model again")
            scales[name] = _checked(name, weight, found, _block(scheme))
    return weights, scales


def _checked(name: str, weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    numbers = scale.astype(np.float32).reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    fits = [(1, 1), (len(weight), 1), tuple(-(-size // part) for size, part in zip(weight.shape, block))]
    if weight.ndim != 2 or numbers.shape not in fits:
        raise InputError(f"the scale of {shown(name)} has shape {scale.shape}; one of {', '.join(map(str, fits))} expected")
    return numbers


def _block(scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, where a scheme has blocks."""
    groups = scheme.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if block is not None:
            return _pair("block_structure", block)
    return _pair("weight_block_size", scheme.get("weight_block_size") or _BLOCK)


def _pair(key: str, block: Any) -> tuple[int, int]:
    pair = tuple(block) if isinstance(block, list | tuple) else ()
    if len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
        raise InputError(f"{key} is {shown(block)}; two whole numbers above 0 expected")
    return pair


def dequantized(weight: np.ndarray, scale: np.ndarray, scheme: Mapping[str, Any]) -> np.ndarray:
    """A weight `[out, in]` times its scale, float32."""
    wide = weight.astype(np.float32)
    if scale.shape[1] == 1 and len(scale) in (1, len(weight)):
        return wide * scale
    rows, columns = _block(scheme)
    for row, factors in enumerate(scale):
        strip = wide[row * rows : (row + 1) * rows]
        strip *= np.repeat(factors, columns)[: strip.shape[1]]
    return wide
