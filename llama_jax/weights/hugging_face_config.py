"""The architecture that a Hugging Face `config.json` declares, as transformers 4 and 5 write it."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.weights.hugging_face_quantized import KEYS, quantization
from llama_jax.weights.source import shown
from llama_jax.weights.values import flag, quotient, real, whole

_READ = {
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip

# Keys with which LLaMA's mathematics vary, each with the one value that is supported (or null, or no key).
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}

# Keys of other models and tools, each with the value at which they change nothing (as do null, false and empty values).
_NEUTRAL: dict[str, object] = {
    "embedding_multiplier": 1.0, "logit_scale": 1.0, "logits_scaling": 1.0,
    "n_shared_experts": 0, "num_experts": 0, "num_experts_per_tok": 0, "num_local_experts": 0, "num_nextn_predict_layers": 0,
    "qkv_bias": False, "residual_multiplier": 1.0, "rotary_pct": 1.0, "router_aux_loss_coef": 0.0, "scale_emb": 1.0,
}  # fmt: skip

# Known keys that change no logit: tokens, generation, training, book-keeping of transformers and of other tools.
_HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip

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
      InputError: naming the key, for another kind of model, a missing or wrong value, a quantized model, or a key whose
        effect is unknown and whose value is not one that means nothing (see `unknown_keys`).
    """
    _require_plain_llama(values)
    heads = whole(values, "num_attention_heads")
    stated = values.get("head_dim") is not None
    head_dim = whole(values, "head_dim") if stated else quotient(values, "hidden_size", "num_attention_heads")
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
    """Keys of a `config.json` that are not understood here, sorted: those that a model is loaded without."""
    return sorted(values.keys() - _READ - _FIXED.keys() - _HARMLESS - {*KEYS})


def _require_plain_llama(values: Mapping[str, Any]) -> None:
    if values.get("model_type") != "llama":
        raise InputError(f"model_type is {shown(values.get('model_type'))}; only 'llama' is supported")
    for key, plain in _FIXED.items():
        if values.get(key) not in (None, plain):
            raise InputError(f"{key} is {shown(values[key])}; only {plain!r} is supported")
    quantization(values)
    unknown = [key for key in unknown_keys(values) if not _is_neutral(key, values)]
    if unknown:
        raise InputError(f"keys {shown(unknown)} are unknown and might change the model; remove those that do not")


def _is_neutral(key: str, values: Mapping[str, Any]) -> bool:
    """Whether an unknown key has a value that switches nothing on."""
    value = values[key]
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if key in ("sliding_window", "max_window_layers") and values.get("use_sliding_window") is False:
        return True
    return value is None or value is False or value in ("", [], {}) or (key in _NEUTRAL and value == _NEUTRAL[key])


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters in the spelling of transformers 5, from either version or from both if they agree."""
    old = {"rope_theta": values.get("rope_theta"), **_section(values, "rope_scaling")}
    new = _section(values, "rope_parameters")
    old, new = ({key: value for key, value in part.items() if value is not None} for part in (old, new))
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise InputError(f"{key} is {shown(new[key])} in rope_parameters but {shown(old[key])} elsewhere")
    rope = {"rope_type": "default", **old, **new}
    _require_known_rope(rope)
    return rope


def _require_known_rope(rope: Mapping[str, Any]) -> None:
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise InputError(f"rope_type {shown(kind)} is not supported; {', '.join(_ROPE_KEYS)} are")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"partial_rotary_factor is {shown(rope['partial_rotary_factor'])}; only 1.0 is supported")
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
