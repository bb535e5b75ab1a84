"""Settings of generation from options and JSON: gathered, and checked before any model is loaded."""

import argparse
from collections.abc import Mapping
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError

# Settings of `make_sampling` that are one number a row.
NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip
_PENALTIES = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}  # with what does nothing
# Settings that a request of a file may have of its own.
OWN = (*NUMBERS, "logit_bias", "stop", "max_new_tokens")
_MOST_LOGPROBS = 100
_MOST_GUESSES = 32


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `llama_jax.generation.text.stream` that a command line gives, checked.

    Raises:
      InputError: naming the setting that is out of range.
    """
    settings = {name: getattr(options, name) for name in (*NUMBERS, "max_new_tokens", "samples", "logprobs")}
    settings |= {"logit_bias": dict(options.logit_bias or ()), "stop": options.stop or []}
    check_settings(settings)
    _check_speculation(options)
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
        _check_count("logprobs", settings["logprobs"], 0, _MOST_LOGPROBS)
    given = {name: settings[name] for name in NUMBERS if name in settings}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name}: {value!r:.60} given; a number expected")
    make_sampling(1, **given, logit_bias=settings.get("logit_bias", {}))


def _check_speculation(options: argparse.Namespace) -> None:
    """Refuses guessing that cannot be, before a model is loaded."""
    _check_count("speculate", options.speculate, 0, _MOST_GUESSES)
    if options.draft is not None and not options.speculate:
        raise InputError("--draft given without --speculate; --speculate K expected with it")
    if options.speculate and penalised(vars(options)):
        raise InputError("--speculate given with a penalty, which cannot look at tokens not yet kept; leave out one")


def penalised(settings: Mapping[str, Any]) -> bool:
    """Whether settings hold a penalty that does something."""
    return any(settings[name] != neutral for name, neutral in _PENALTIES.items())


def _check_count(name: str, value: object, least: int, most: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        raise InputError(f"{name}: {value!r:.60} given; {least} {'or more' if most is None else f'to {most}'} expected")


def check_bias(settings: Mapping[str, Any], config: LlamaConfig) -> None:
    """Refuses a bias for a token that the model does not have.

    Raises:
      InputError: naming the token.
    """
    outside = [token for token in settings["logit_bias"] if token >= config.vocab_size]
    if outside:
        raise InputError(f"logit_bias: token {outside[0]} given; the vocabulary goes from 0 to {config.vocab_size - 1}")
