"""The model of a command line: loaded, and changed as its options say."""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_jax.cli.distributed import keep_compiled_programs
from llama_jax.cli.writing import note
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.generation.checks import MOST_DRAFT_TOKENS, MOST_LOGPROBS
from llama_jax.text.chat import ChatTemplate
from llama_jax.text.files import read_text
from llama_jax.text.formats import FORMATS, named_format
from llama_jax.text.sandbox import LARGEST_SOURCE
from llama_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_jax.generation.generate import Generator, Speculation
    from llama_jax.weights.assemble import Finish
    from llama_jax.weights.load import Pretrained


_SCALINGS = "linear:FACTOR, llama3:FACTOR:LOW:HIGH:ORIGINAL_CONTEXT or none"
_LARGEST_GROUP = 32  # weights that share a multiplier in 4 bits


def load_model(options: argparse.Namespace) -> tuple["Pretrained", "Generator"]:
    """The model of `--model`, with everything that other options change, and what decodes with it.

    Raises:
      InputError: for options that say nothing sensible, before anything is loaded; for a model that
        cannot be loaded.
    """
    changes, source = _changes(options), template_source(options.chat_template)
    import numpy as np

    from llama_jax.accounting import parameter_count
    from llama_jax.generation.generate import Generator
    from llama_jax.model.quantize import parameter_bytes
    from llama_jax.weights.load import load

    _check_draft(options)
    from llama_jax.model.options import resolve_dtype

    keep_compiled_programs()
    started = time.perf_counter()
    dtype = resolve_dtype(options.dtype)
    model = load(options.model, dtype, finish=_finish(options))
    brief, *odd = model.report.brief()
    for line in (f"{brief}; loaded in {time.perf_counter() - started:.1f} s, {dtype}", *odd):
        note(line)
    if options.quantize is not None:
        wide = parameter_count(model.config) * np.dtype(dtype).itemsize
        note(
            f"weights in {options.quantize}: {wide / 1e6:.1f} -> "
            f"{parameter_bytes(model.params) / 1e6:.1f} MB"
        )
    model = _changed(model, changes)
    if options.chat_template is not None:
        model = model._replace(template=_template(options.chat_template, source, model))
    elif options.chat and model.template is None:
        raise InputError(
            f"{model.origin} has no chat template; name one with --chat-template, or ask "
            "without --chat"
        )
    drafting = _speculation(options, dtype)
    return model, Generator(
        model.params,
        model.config,
        speculation=drafting,
        dtype=dtype,
        cache_dtype=options.cache_dtype,
    )


def _check_draft(options: argparse.Namespace) -> None:
    """Refuses a draft model of another vocabulary; only headers are read."""
    from llama_jax.weights.open import open_model

    if options.draft is None:
        return
    own, other = (
        open_model(path).source.config.vocab_size for path in (options.model, options.draft)
    )
    if own != other:
        raise InputError(
            f"--draft {options.draft} has {other} tokens and the model {own}; the same "
            "vocabulary expected"
        )


def _speculation(options: argparse.Namespace, dtype: str) -> "Speculation | None":
    """How tokens are guessed ahead, with the draft model loaded if there is one."""
    from llama_jax.generation.generate import Generator, Speculation
    from llama_jax.weights.load import load

    if options.speculate == 0:
        return None
    if options.draft is None:
        return Speculation(options.speculate)
    draft = load(options.draft, dtype)
    brief, *odd = draft.report.brief()
    for line in (f"{brief}; guesses {options.speculate} tokens ahead", *odd):
        note(line)
    return Speculation(options.speculate, Generator(draft.params, draft.config, dtype=dtype))


def _changes(options: argparse.Namespace) -> dict:
    """Fields of the architecture that options replace."""
    changes = {"context_length": options.context, "rope_theta": options.rope_theta}
    changes = {name: value for name, value in changes.items() if value is not None}
    return (
        changes
        if options.rope_scaling is None
        else changes | {"rope_scaling": rope_scaling(options.rope_scaling)}
    )


def rope_scaling(text: str) -> RopeScaling | None:
    """The scaling that a text such as `linear:2` stands for.

    Raises:
      InputError: for anything else than `linear:FACTOR`, `llama3:FACTOR:LOW:HIGH:ORIGINAL_CONTEXT`
        and `none`.
    """
    kind, *words = text.split(":")
    if (kind, len(words)) not in (("none", 0), ("linear", 1), ("llama3", 4)):
        raise InputError(f"--rope-scaling: {text!r:.60} given; {_SCALINGS} expected")
    if kind == "none":
        return None
    try:
        factors, context = [float(word) for word in words[:3]], [int(word) for word in words[3:]]
    except ValueError:
        raise InputError(
            f"--rope-scaling: {text!r:.60} given; numbers expected in {_SCALINGS}"
        ) from None
    return RopeScaling(kind, *factors, *context)  # type: ignore[arg-type]


def _changed(model: "Pretrained", changes: dict) -> "Pretrained":
    """The model with another architecture around the same weights; what is different is said."""
    config = dataclasses.replace(model.config, **changes)
    told = _differences(model.config, config)
    beyond = dataclasses.replace(config, context_length=model.config.context_length) != model.config
    if beyond or config.context_length > model.config.context_length:
        note(f"{told}; quality beyond what the model was trained for is not promised")
    elif told:
        note(told)
    return model._replace(config=config)


def _differences(old: LlamaConfig, new: LlamaConfig) -> str:
    """What differs between two architectures, in words."""
    told = []
    if new.context_length != old.context_length:
        told.append(f"context {old.context_length} -> {new.context_length}")
    if new.rope_theta != old.rope_theta:
        told.append(f"RoPE theta {old.rope_theta:g} -> {new.rope_theta:g}")
    if new.rope_scaling != old.rope_scaling:
        told.append(
            f"RoPE {_scaling_words(old.rope_scaling)} -> {_scaling_words(new.rope_scaling)}"
        )
    return ", ".join(told)


def _scaling_words(scaling: RopeScaling | None) -> str:
    return "unscaled" if scaling is None else f"{scaling.rope_type} {scaling.factor:g}"


def _finish(options: argparse.Namespace) -> "Finish":
    """What becomes of each parameter as it is loaded: with `--quantize`, the wide model never is in
    memory.
    """
    from llama_jax.model.quantize import leaf_quantizer
    from llama_jax.weights.assemble import as_it_is
    from llama_jax.weights.open import open_model

    if options.quantize is None:
        return as_it_is
    if options.quantize == "int8":
        return leaf_quantizer(8)
    config = open_model(options.model).source.config
    return leaf_quantizer(4, _group(config.dim, config.heads * config.head_dim, config.ffn_dim))


def _group(*widths: int) -> int:
    """The largest group of weights, up to 32, into which rows of all these widths can be
    divided.
    """
    groups = [
        group
        for group in range(2, _LARGEST_GROUP + 1, 2)
        if not any(width % group for width in widths)
    ]
    if not groups:
        raise InputError(
            f"--quantize int4 given for matrices of {', '.join(map(str, widths))} "
            "inputs, even numbers expected; take int8"
        )
    return groups[-1]


def template_source(name: str | None) -> str | None:
    """The text of a template's file; `None` for one of the built-in formats, which are named.

    Raises:
      InputError: for a file that cannot be read.
    """
    if name is None or name in FORMATS:
        return None
    try:
        return read_text(pathlib.Path(name), LARGEST_SOURCE)
    except OSError as error:
        known = ", ".join(FORMATS)
        raise InputError(
            f"--chat-template {name}: no built-in format ({known}), and no file ({error.strerror})"
        ) from None


def _template(name: str, source: str | None, model: "Pretrained") -> ChatTemplate:
    """The template of a name or of a file's text, with the tokenizer's begin and end tokens."""
    if model.tokenizer is None:
        raise InputError(f"{model.origin} has no tokenizer; a chat template needs one")
    return (
        named_format(name, model.tokenizer)
        if source is None
        else _own_template(source, model.tokenizer)
    )


def template_of(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a built-in format's name, or of a file, with the tokenizer's begin and end
    tokens.

    Raises:
      InputError: for neither; and if the tokenizer lacks special tokens that the format is made of.
    """
    source = template_source(name)
    return named_format(name, tokenizer) if source is None else _own_template(source, tokenizer)


def _own_template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    texts = {number: text for text, number in tokenizer.special_tokens.items()}
    begin, end = (
        texts.get(-1 if token is None else token)
        for token in (tokenizer.begin_id, tokenizer.end_id)
    )
    return ChatTemplate(source, begin, end)


# --- settings ---
#
# Settings of generation from options and JSON: gathered, and checked before any model is loaded.


# Settings of `make_sampling` that are one number a sequence.
NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_PENALTIES = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}  # with what does nothing
# Settings that a request of a file may have of its own.
OWN = (*NUMBERS, "logit_bias", "stop", "max_new_tokens")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `llama_jax.generation.text.stream` that a command line gives, checked.

    Raises:
      InputError: naming the setting that is out of range.
    """
    settings = {
        name: getattr(options, name) for name in (*NUMBERS, "max_new_tokens", "samples", "logprobs")
    }
    settings |= {"logit_bias": dict(options.logit_bias or ()), "stop": options.stop or []}
    check_settings(settings)
    _check_draft_options(options)
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings out of range, whatever their types.

    Raises:
      InputError: naming the setting.
    """
    from llama_jax.generation.sampling import make_sampling

    _check_count("max_new_tokens", settings.get("max_new_tokens", 0), 0, None)
    _check_count("samples", settings.get("samples", 1), 1, None)
    if settings.get("logprobs") is not None:
        _check_count("logprobs", settings["logprobs"], 0, MOST_LOGPROBS)
    given = {name: settings[name] for name in NUMBERS if name in settings}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name}: {value!r:.60} given; a number expected")
    make_sampling(1, **given, logit_bias=settings.get("logit_bias", {}))


def _check_draft_options(options: argparse.Namespace) -> None:
    """Refuses drafting that cannot be, before a model is loaded."""
    _check_count("speculate", options.speculate, 0, MOST_DRAFT_TOKENS)
    if options.draft is not None and not options.speculate:
        raise InputError("--draft given without --speculate; --speculate K expected with it")
    if options.speculate and penalised(vars(options)):
        raise InputError(
            "--speculate given with a penalty, which cannot look at tokens not yet kept; "
            "leave out one"
        )


def penalised(settings: Mapping[str, Any]) -> bool:
    """Whether settings hold a penalty that does something."""
    return any(settings[name] != neutral for name, neutral in _PENALTIES.items())


def _check_count(name: str, value: object, least: int, most: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        raise InputError(
            f"{name}: {value!r:.60} given; {least} "
            f"{'or more' if most is None else f'to {most}'} expected"
        )


def check_bias(settings: Mapping[str, Any], config: LlamaConfig) -> None:
    """Refuses a bias for a token that the model does not have.

    Raises:
      InputError: naming the token.
    """
    outside = [token for token in settings["logit_bias"] if token >= config.vocab_size]
    if outside:
        raise InputError(
            f"logit_bias: token {outside[0]} given; the vocabulary goes from 0 to "
            f"{config.vocab_size - 1}"
        )
