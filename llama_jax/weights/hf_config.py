"""The architecture that a Hugging Face `config.json` declares, as transformers 4 and 5 write it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax import __version__
from llama_jax.accounting import parameter_count
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.formatting import one_line
from llama_jax.weights.source import flag, quotient, real, shown, whole

# --- hugging face quantized ---
#
# Quantized directories in Hugging Face's layout: weights in 8-bit floats are dequantized, every
# other scheme is refused.
#
# A weight in 8-bit floats has a scale beside it, `weight_scale` or `weight_scale_inv` (both are
# multiplied with): one number for the tensor, one an output channel, or one a block. Scales of
# activations and of the cache are left aside, since this project quantizes neither: the logits are
# those of the weights alone.
#
# Sources: transformers (`finegrained_fp8`, `fbgemm_fp8`), compressed-tensors (format
#   `float-quantized`).


KEYS = ("quantization_config", "compression_config")
_BLOCK = (128, 128)
_SCALES = (".weight_scale", ".weight_scale_inv")
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_MARKS = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".SCB",
)
ADVICE = "fetch the model unquantized, in 8-bit floats (fp8), or as GGUF"


def quantization(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights of a directory are quantized, by its `config.json`; `None` where they are
    not.

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
            raise InputError(
                f"the model is quantized ({key}: {_named(scheme)}), which is not "
                f"supported; {ADVICE}"
            )
        return scheme
    return None


def _is_fp8(scheme: Mapping[str, Any]) -> bool:
    method = scheme.get("quant_method")
    if method == "compressed-tensors":
        return scheme.get("format") == "float-quantized"
    return method in ("fp8", "fbgemm_fp8")


def _named(scheme: Mapping[str, Any]) -> str:
    """The scheme in a few words."""
    parts = [
        f"{name} {shown(scheme[name])}"
        for name in ("quant_method", "format", "bits", "load_in_4bit")
        if scheme.get(name)
    ]
    return ", ".join(parts) or shown(scheme)


def require_unquantized(names: Mapping[str, object]) -> None:
    """Refuses tensors that only quantized files have, where `config.json` says nothing of a
    quantization.

    Raises:
      InputError: naming the first.
    """
    found = next((name for name in names if name.endswith(_MARKS)), None)
    if found is not None:
        raise InputError(
            f"the model is quantized (it has the tensor {shown(found)}), which is not "
            f"supported; {ADVICE}"
        )


def split_scales(
    tensors: Mapping[str, np.ndarray], scheme: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights of a directory in 8-bit floats, and their scales by the name of the weight.

    Returns:
      The weights as they are stored; the scales, `[1, 1]`, `[out, 1]` or `[blocks of out, blocks of
      in]`, float32.

    Raises:
      InputError: for a weight in 8-bit floats without a scale, and a scale that does not fit its
        weight.
    """
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith((*_SCALES, *_OF_ACTIVATIONS))
    }
    scales = {}
    for name, weight in weights.items():
        if weight.itemsize == 1:
            found = next(
                (tensors[name + end[7:]] for end in _SCALES if name + end[7:] in tensors), None
            )
            if found is None:
                raise InputError(
                    f"tensor {shown(name)} is {weight.dtype.name} and has no "
                    "weight_scale; fetch the model again"
                )
            scales[name] = _checked(name, weight, found, _block(scheme))
    return weights, scales


def _checked(
    name: str, weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    numbers = scale.astype(np.float32).reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    fits = [
        (1, 1),
        (len(weight), 1),
        tuple(-(-size // part) for size, part in zip(weight.shape, block)),
    ]
    if weight.ndim != 2 or numbers.shape not in fits:
        raise InputError(
            f"the scale of {shown(name)} has shape {scale.shape}; one of "
            f"{', '.join(map(str, fits))} expected"
        )
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


# --- hugging face describe ---
#
# What a Hugging Face directory says about a model beside its weights: configuration, generation,
# model card.
#
# `config.json` is written for transformers 4 and 5 alike: version 4 reads `rope_theta`,
# `rope_scaling` and `torch_dtype`, version 5 `rope_parameters` and `dtype`. Both spellings are
# there and say the same.


# transformers' only use of it is to initialize new weights; this is the standard deviation that it
# takes for a LLaMA.
_INITIALIZER_RANGE = 0.02


class TokenIds(NamedTuple):
    """Special tokens as a model's files name them.

    Attributes:
      begin: begins a text, or `None`.
      stops: each of them ends an answer.
      pad: fills rows of a batch, or `None`.
    """

    begin: int | None
    stops: tuple[int, ...]
    pad: int | None


def config_values(config: LlamaConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
    """The values of `config.json`.

    Args:
      config: the architecture.
      dtype: name of the dtype that (most of) the weights have.
      tokens: special tokens; several stops become a list.
    """
    scaling = _describe_rope_scaling(config)
    rope = {"rope_theta": float(config.rope_theta), **(scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.begin,
        "dtype": dtype,
        "eos_token_id": _one_or_several(tokens.stops),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": _INITIALIZER_RANGE,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": tokens.pad,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def generation_values(tokens: TokenIds, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `generation_config.json`: every token that ends an answer.

    Args:
      tokens: special tokens.
      declared: earlier values of the model's files, such as a temperature; kept.
    """
    ids = {
        "bos_token_id": tokens.begin,
        "eos_token_id": _one_or_several(tokens.stops),
        "pad_token_id": tokens.pad,
    }
    return {**declared, **{name: value for name, value in ids.items() if value is not None}}


def model_card(name: str, origin: str, config: LlamaConfig, dtype: str, chat: bool) -> str:
    """The text of `README.md`, with the front matter that hubs read.

    Args:
      name: of the model.
      origin: one line that names its source.
      config: the architecture.
      dtype: name of the dtype of the weights.
      chat: whether it has a chat template.
    """
    rows = "\n".join(f"| {key} | {value} |" for key, value in _facts(config, dtype, chat).items())
    return _CARD.format(
        name=one_line(name), origin=one_line(origin), version=__version__, rows=rows
    )


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
---

# {name}

A language model of the LLaMA architecture, made from {origin} and written by llama_jax {version}.
The terms of the weights it was made from apply to it.

| | |
|---|---|
{rows}

With transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", dtype="auto")
```

With llama_jax:

```python
import llama_jax

model = llama_jax.load("path/to/this/directory")
print(llama_jax.generate(model, ["Once upon a time"])[0].text)
```
"""


def _facts(config: LlamaConfig, dtype: str, chat: bool) -> dict[str, object]:
    """Rows of the card's table."""
    return {
        "parameters": f"{parameter_count(config):,}",
        "dtype": dtype,
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "layers, width": f"{config.layers}, {config.dim}",
        "query heads, key/value heads, head width": f"{config.heads}, {config.kv_heads}, "
        f"{config.head_dim}",
        "feed-forward width": config.ffn_dim,
        "output head": "the embedding table (tied)" if config.tied_head else "of its own",
        "rotary embedding": _rope_text(config),
        "chat template": "yes" if chat else "none",
    }


def _describe_rope_scaling(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values = {
        "factor": float(scaling.factor),
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
        "rope_type": scaling.rope_type,
    }
    return {name: value for name, value in values.items() if value is not None}


def _rope_text(config: LlamaConfig) -> str:
    scaling = config.rope_scaling
    if scaling is None:
        return f"base {config.rope_theta:g}"
    origin = f" from {scaling.original_context:,} tokens" if scaling.original_context else ""
    return f"base {config.rope_theta:g}, {scaling.rope_type} scaling by {scaling.factor:g}{origin}"


def _one_or_several(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


# --- hugging face config ---


_READ = {
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}

# Keys with which LLaMA's mathematics vary, each with the one value that is supported (or null, or
# no key).
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}

# Keys of other models and tools, each with the value at which they change nothing (as do null,
# false and empty values).
_NEUTRAL: dict[str, object] = {
    "embedding_multiplier": 1.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "n_shared_experts": 0,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "num_nextn_predict_layers": 0,
    "qkv_bias": False,
    "residual_multiplier": 1.0,
    "rotary_pct": 1.0,
    "router_aux_loss_coef": 0.0,
    "scale_emb": 1.0,
}

# Known keys that change no logit: tokens, generation, training, book-keeping of transformers and of
# other tools.
_HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}

# Keys of each kind of rotary embedding, beside the base.
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def config_from_hugging_face(values: Mapping[str, Any]) -> LlamaConfig:
    """The architecture of a LLaMA by the values of its `config.json`.

    Keys that a file may leave out have the defaults of transformers' `LlamaConfig`.

    Raises:
      InputError: naming the key, for another kind of model, a missing or wrong value, a quantized
        model, or a key whose effect is unknown and whose value is not one that means nothing (see
        `unknown_keys`).
    """
    _require_plain_llama(values)
    heads = whole(values, "num_attention_heads")
    stated = values.get("head_dim") is not None
    head_dim = (
        whole(values, "head_dim")
        if stated
        else quotient(values, "hidden_size", "num_attention_heads")
    )
    rope = _rope(values)
    return LlamaConfig(
        vocab_size=whole(values, "vocab_size"),
        dim=whole(values, "hidden_size"),
        layers=whole(values, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(values, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_dim=whole(values, "intermediate_size"),
        norm_eps=real(values, "rms_norm_eps", 1e-6),
        rope_theta=real(rope, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope),
        context_length=whole(values, "max_position_embeddings", 2048),
        tied_head=flag(values, "tie_word_embeddings", False),
    )


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of a `config.json` that are not understood here, sorted: those that a model is loaded
    without.
    """
    return sorted(values.keys() - _READ - _FIXED.keys() - _HARMLESS - {*KEYS})


def _require_plain_llama(values: Mapping[str, Any]) -> None:
    if values.get("model_type") != "llama":
        raise InputError(
            f"model_type is {shown(values.get('model_type'))}; only 'llama' is supported"
        )
    for key, plain in _FIXED.items():
        if values.get(key) not in (None, plain):
            raise InputError(f"{key} is {shown(values[key])}; only {plain!r} is supported")
    quantization(values)
    unknown = [key for key in unknown_keys(values) if not _is_neutral(key, values)]
    if unknown:
        raise InputError(
            f"keys {shown(unknown)} are unknown and might change the model; remove those "
            "that do not"
        )


def _is_neutral(key: str, values: Mapping[str, Any]) -> bool:
    """Whether an unknown key has a value that switches nothing on."""
    value = values[key]
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if key in ("sliding_window", "max_window_layers") and values.get("use_sliding_window") is False:
        return True
    return (
        value is None
        or value is False
        or value in ("", [], {})
        or (key in _NEUTRAL and value == _NEUTRAL[key])
    )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters in the spelling of transformers 5, from either version or from both if
    they agree.
    """
    old = {"rope_theta": values.get("rope_theta"), **_section(values, "rope_scaling")}
    new = _section(values, "rope_parameters")
    old, new = (
        {key: value for key, value in part.items() if value is not None} for part in (old, new)
    )
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise InputError(
                f"{key} is {shown(new[key])} in rope_parameters but {shown(old[key])} elsewhere"
            )
    rope = {"rope_type": "default", **old, **new}
    _require_known_rope(rope)
    return rope


def _require_known_rope(rope: Mapping[str, Any]) -> None:
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise InputError(f"rope_type {shown(kind)} is not supported; {', '.join(_ROPE_KEYS)} are")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"partial_rotary_factor is {shown(rope['partial_rotary_factor'])}; only 1.0 "
            "is supported"
        )
    known = {"rope_type", "rope_theta", "partial_rotary_factor"} | _ROPE_KEYS[kind]
    unknown = sorted(key for key in rope.keys() - known if rope[key] is not False)
    if unknown:
        raise InputError(f"rotary parameters {shown(unknown)} are unknown with rope_type {kind}")


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key) or {}
    if not isinstance(section, dict):
        raise InputError(f"{key} is {shown(section)}; an object expected")
    # Before transformers 4.43 the kind was called `type`; later versions write both.
    renamed = {"rope_type": section["type"]} if "type" in section else {}
    return {**renamed, **{name: value for name, value in section.items() if name != "type"}}


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    """Scaling by the rotary parameters, all of which have to be there."""
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling("linear", real(rope, "factor"))
    return RopeScaling(
        rope_type="llama3",
        factor=real(rope, "factor"),
        low_freq_factor=real(rope, "low_freq_factor"),
        high_freq_factor=real(rope, "high_freq_factor"),
        original_context=whole(rope, "original_max_position_embeddings"),
    )
