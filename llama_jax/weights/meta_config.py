"""The architecture that Meta's `params.json` declares, together with what only the weights and the published models say.

Source of the keys: `ModelArgs` of Meta's llama, llama3 and llama-models repositories.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import PRESETS
from llama_jax.weights.source import shown
from llama_jax.weights.values import flag, quotient, real, whole

_READ = {
    "dim", "max_seq_len", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "rope_high_freq_factor", "rope_scaling_factor",
    "rope_theta", "use_scaled_rope", "vocab_size",
}  # fmt: skip

# How the width of the feed-forward layer was chosen, which the weights show, and the size of a cache.
_HARMLESS = {"ffn_dim_multiplier", "max_batch_size", "multiple_of"}

# Keys that Meta's code knows, of models that are more than a LLaMA of text in floating point.
_OTHERS = {
    "lora_args": "LoRA adapters", "moe_args": "mixtures of experts", "quantization_args": "quantised weights",
    "vision_args": "images", "vision_chunk_size": "images", "vision_max_num_chunks": "images", "vision_model": "images",
    "vision_num_cross_attention_layers": "images",
}  # fmt: skip

# Context of models that nobody published, by the base of their rotary embedding: LLaMA 1, Llama 3, Code Llama.
_CONTEXTS = {1e4: 2048, 5e5: 8192, 1e6: 16384}
_SCALED = PRESETS["llama3.1-8b"]  # all published models with scaled frequencies differ in the factor only


def config_from_meta(values: Mapping[str, Any], vocab_size: int, ffn_dim: int, tied_head: bool) -> LlamaConfig:
    """The architecture of a LLaMA by the values of its `params.json` and by its weights.

    Context length and factor of the scaling are in no file of Meta's: they are those of the published model with the
    same numbers, unless `rope_scaling_factor` and, for a model that nobody published, `max_seq_len` state them.

    Args:
      values: the content of `params.json`.
      vocab_size: rows of the embedding table.
      ffn_dim: rows of the gate.
      tied_head: whether the weights have no head of their own.

    Raises:
      InputError: naming the key, for a missing or wrong value, another kind of model, or a key whose effect is unknown.
    """
    _require_plain_llama(values)
    heads = whole(values, "n_heads")
    stated = whole(values, "vocab_size", -1)  # LLaMA 1 and 2 leave it to the tokenizer
    plain = LlamaConfig(
        vocab_size=vocab_size if stated == -1 else stated,
        dim=whole(values, "dim"),
        layers=whole(values, "n_layers"),
        heads=heads,
        kv_heads=whole(values, "n_kv_heads", heads),
        head_dim=quotient(values, "dim", "n_heads"),
        ffn_dim=ffn_dim,
        norm_eps=real(values, "norm_eps"),
        rope_theta=real(values, "rope_theta", 10000.0),
        rope_scaling=None,
        context_length=1,
        tied_head=tied_head,
    )
    scaled = flag(values, "use_scaled_rope", False)
    published = _published(plain, scaled)
    context = published.context_length if published else _context(values, plain.rope_theta, scaled)
    return dataclasses.replace(plain, rope_scaling=_scaling(values, scaled, published), context_length=context)


def _require_plain_llama(values: Mapping[str, Any]) -> None:
    for key, meaning in _OTHERS.items():
        if values.get(key) is not None:
            raise InputError(f"{key} is given: a model with {meaning}, which is not supported; only LLaMAs of text are")
    unknown = sorted(values.keys() - _READ - _HARMLESS - _OTHERS.keys())
    if unknown:
        raise InputError(f"keys {shown(unknown)} are unknown and might change the model; remove those that do not")


def _published(plain: LlamaConfig, scaled: bool) -> LlamaConfig | None:
    """The published model with these numbers; its vocabulary may have been extended, its head tied or cut loose since."""
    apart = ("vocab_size", "tied_head", "rope_scaling", "context_length")
    for known in PRESETS.values():
        alike = dataclasses.replace(plain, **{name: getattr(known, name) for name in apart}) == known
        if alike and scaled == (known.rope_scaling is not None):
            return known
    return None


def _scaling(values: Mapping[str, Any], scaled: bool, published: LlamaConfig | None) -> RopeScaling | None:
    stated = values.get("rope_scaling_factor") is not None
    if stated and not scaled:
        raise InputError("rope_scaling_factor is given, but use_scaled_rope is not true; set it to true or remove the factor")
    if scaled and not stated and published is None:
        raise InputError("use_scaled_rope is true, but these are not the numbers of a published model; "
                         "add rope_scaling_factor (8 in Llama 3.1 and 3.3, 32 in Llama 3.2)")  # fmt: skip
    known = (published or _SCALED).rope_scaling if scaled else None
    if known is None:
        return None
    factor = real(values, "rope_scaling_factor", known.factor)
    high = real(values, "rope_high_freq_factor", known.high_freq_factor)
    return dataclasses.replace(known, factor=factor, high_freq_factor=high)


def _context(values: Mapping[str, Any], theta: float, scaled: bool) -> int:
    """The context of a model that nobody published."""
    default = _SCALED.context_length if scaled else _CONTEXTS.get(theta)
    if default is None and values.get("max_seq_len") is None:
        raise InputError(f"rope_theta {theta} is that of no published model; add max_seq_len, the length of its context")
    return whole(values, "max_seq_len", default)
