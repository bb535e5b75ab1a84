"""Checks of the arguments of generation, before anything is compiled: one line says which value is
wrong with it.
"""

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError

_TOKENS = 1 << 31  # ids there are: those that int32 holds

MOST_LOGPROBS = 100  # of the most probable tokens that are given with each
MOST_DRAFT_TOKENS = 32  # of one step of speculative decoding

Unchecked = Any  # an argument of any type, which one of the functions below looks at first


def plain(value: Unchecked) -> Unchecked:
    """Arrays of NumPy and JAX as lists, or as a number; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def whole(name: str, value: Unchecked, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
      InputError: naming the argument, for anything else.
    """
    if not is_whole(value):
        raise InputError(f"{name}: {_shown(value)} given; a whole number expected")
    if value < least:
        raise InputError(f"{name}: {value} given; {least} or more expected")
    return operator.index(value)


def wholes(name: str, value: Unchecked, sequences: int, least: int) -> list[int]:
    """A whole number of at least `least` for each sequence, from one for all or a list or array of
    one a sequence.

    Raises:
      InputError: naming the argument, for anything else.
    """
    given = plain(value)
    if not isinstance(given, list | tuple):
        return [whole(name, given, least)] * sequences
    if len(given) != sequences:
        raise InputError(
            f"{name}: {len(given)} values given for {sequences} sequences; one for all "
            "or one a sequence expected"
        )
    return [whole(name, item, least) for item in given]


def check_prompts(prompts: Unchecked, config: LlamaConfig) -> list[list[int]]:
    """Prompts in token ids, from lists or arrays, as lists; refuses prompts that the model cannot
    take.

    Raises:
      InputError: for an empty prompt, one longer than the context, and a token outside the
        vocabulary or none at all; and for no prompts.
    """
    if len(prompts) == 0:
        raise InputError("no prompts given; one at least expected")
    return [_prompt(f"prompt {i}", plain(prompt), config) for i, prompt in enumerate(prompts, 1)]


def _prompt(name: str, prompt: Unchecked, config: LlamaConfig) -> list[int]:
    if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
        raise InputError(f"{name} is {_shown(prompt)}; a list of token ids expected")
    if not 1 <= len(prompt) <= config.context_length:
        raise InputError(
            f"{name} has {len(prompt)} tokens; 1 to {config.context_length} (the model's "
            "context) expected"
        )
    strange = [token for token in prompt if not is_whole(token)]
    if strange:
        raise InputError(f"{name} holds {_shown(strange[0])}; token ids, whole numbers, expected")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise InputError(
            f"{name} holds token {outside[0]}; the vocabulary goes from 0 to "
            f"{config.vocab_size - 1}"
        )
    return [operator.index(token) for token in prompt]


def stop_table(stop_ids: Unchecked, sequences: int) -> list[list[int]]:
    """The stop tokens of each sequence, from those of all sequences or a list a sequence; lists or
    arrays, or `None`.

    Raises:
      InputError: for anything else.
    """
    given = plain(() if stop_ids is None else stop_ids)
    given = [plain(item) for item in ([given] if is_whole(given) else given)]
    if all(map(is_whole, given)):
        return [_ids(given)] * sequences
    if len(given) != sequences:
        raise InputError(
            f"stop_ids: {len(given)} lists given for {sequences} sequences; ids for all "
            "or one list a sequence expected"
        )
    if not all(isinstance(ids, list | tuple | set) and all(map(is_whole, ids)) for ids in given):
        raise InputError(
            f"stop_ids: {_shown(given)} given; token ids for all sequences, or one list "
            "a sequence expected"
        )
    return [_ids(ids) for ids in given]


def _ids(given: Iterable[Unchecked]) -> list[int]:
    """Token ids in order, each once."""
    ids = sorted(set(map(operator.index, given)))
    if ids and not 0 <= ids[0] <= ids[-1] < _TOKENS:
        raise InputError(
            f"stop_ids: {ids[0] if ids[0] < 0 else ids[-1]} given; token ids from 0 to "
            f"{_TOKENS - 1} expected"
        )
    return ids


def stop_strings(value: Unchecked, sequences: int) -> list[list[str]]:
    """The stop strings of each sequence: a text or a list of texts for all sequences, or one list a
    sequence.

    Raises:
      InputError: for anything else.
    """
    values = [] if value is None else [value] if isinstance(value, str) else plain(value)
    if not isinstance(values, list | tuple | set):
        raise InputError(f"stop: {_shown(value)} given; texts that end an answer expected")
    if all(isinstance(item, str) for item in values):
        return [list(values)] * sequences
    lists = [
        item
        for item in values
        if isinstance(item, list | tuple | set) and all(isinstance(one, str) for one in item)
    ]
    if not len(lists) == len(values) == sequences:
        raise InputError(
            f"stop: {_shown(value)} given; a list for all of the {sequences} sequences, "
            "or one list a sequence expected"
        )
    return [list(item) for item in lists]


def check_plain_texts(name: str, texts: Unchecked) -> None:
    """Refuses anything but a list of texts.

    Raises:
      InputError: with what to give instead.
    """
    if (
        isinstance(texts, str)
        or not isinstance(texts, Sequence)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise InputError(f"{name}: {_shown(texts)} given; a list of texts expected, such as [text]")


def check_texts(prompts: Unchecked) -> None:
    """Refuses a single prompt, or a part of one, given instead of a list of prompts.

    Raises:
      InputError: with what to give instead.
    """
    if isinstance(prompts, str):
        raise InputError(
            f"prompts: the text {_shown(prompts)} given; a list of texts expected, such as [text]"
        )
    if len(prompts) and all(is_whole(prompt) for prompt in prompts):
        raise InputError(
            "prompts: the token ids of one prompt given; a list of prompts expected, such as [ids]"
        )
    for i, prompt in enumerate(prompts, 1):
        if isinstance(prompt, Mapping):
            raise InputError(
                f"prompt {i} is one message; a list of conversations expected, each a "
                "list of messages"
            )
        if not isinstance(prompt, Sequence):
            raise InputError(
                f"prompt {i} is a {type(prompt).__name__}; a text or a list of messages expected"
            )


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses settings that there are not.

    Raises:
      InputError: naming the first and the nearest that there is.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"setting {name!r} is unknown; the nearest is {near[0]}")


def is_whole(value: Unchecked) -> bool:
    """Whether it is a whole number, Python's or NumPy's; true and false are none."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _shown(value: Unchecked) -> str:
    """What was given, on one line of bounded length."""
    return " ".join(repr(value).split())[:60]
