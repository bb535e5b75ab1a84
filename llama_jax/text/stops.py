"""Which tokens end an answer."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, encode_dialogue
from llama_jax.text.files import read_json
from llama_jax.text.tokenizer import Tokenizer

# Ends of a turn or a text in Llama 3, ChatML (SmolLM2) and GPT-2's kin; models do not always
# declare all they use.
_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")
_GGUF_HOMES = (
    ("eot_token_id", "<|im_end|>"),
    ("eot_token_id", "<|eot_id|>"),
    ("eom_token_id", "<|eom_id|>"),
)
_GGUF_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def stop_ids(tokenizer: Tokenizer, declared: Iterable[int] = ()) -> tuple[int, ...]:
    """All ids that end an answer, ascending.

    Args:
      tokenizer: gives its end token and the end-of-turn tokens known by name.
      declared: ids that the model's files declare (`declared_stop_ids`,
        `declared_stop_ids_from_gguf`).

    Raises:
      InputError: for a declared id outside the vocabulary.
    """
    declared = tuple(declared)
    wrong = [token for token in declared if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise InputError(
            f"eos_token_id {wrong[0]}: the tokenizer has {tokenizer.vocab_size} tokens, "
            "numbered from 0"
        )
    known = {
        tokenizer.special_tokens[token]
        for token in _END_TOKENS
        if token in tokenizer.special_tokens
    }
    end = set() if tokenizer.end_id is None else {tokenizer.end_id}
    return tuple(sorted(known | end | set(declared)))


class GgufStops(NamedTuple):
    """Stops in the words of GGUF.

    Attributes:
      metadata: the keys beside `eos_token_id`.
      lost: ids that have no place there, and whose names readers do not know either.
    """

    metadata: dict[str, int]
    lost: tuple[int, ...]


def gguf_stops(tokenizer: Tokenizer, stops: Iterable[int]) -> GgufStops:
    """The ids that end an answer as `eot_token_id` and `eom_token_id`, the places that llama.cpp
    has for two of them.

    Args:
      tokenizer: gives the end token, which has a place of its own, and the names of tokens.
      stops: ids that end an answer.
    """
    names = {token: text for text, token in tokenizer.special_tokens.items() if text in _END_TOKENS}
    more = [token for token in sorted(set(stops)) if token != tokenizer.end_id]
    unnamed = [token for token in more if token not in names]
    homes = {names[token]: token for token in more if token in names}
    known = {key: homes[name] for key, name in _GGUF_HOMES if name in homes}
    placed = known | dict(
        zip(("eot_token_id", "eom_token_id"), unnamed)
    )  # a known name needs no place
    return GgufStops(
        {f"tokenizer.ggml.{key}": token for key, token in placed.items()}, tuple(unnamed[2:])
    )


def end_of_turn_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """The special token with which a template ends the assistant's turn; nothing where there is
    none, or the template fails.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        said = encode_dialogue(template, tokenizer, messages) if template else None
    except InputError:
        return ()
    own = (
        []
        if said is None
        else [token for token, inside in zip(said.token_ids, said.mask) if inside]
    )
    return tuple(token for token in own[-1:] if token in tokenizer.special_tokens.values())


def declared_stop_ids(directory: pathlib.Path) -> tuple[int, ...]:
    """`eos_token_id` of `generation_config.json` and `config.json`, one id or a list, in a model's
    directory.

    Raises:
      InputError: for values that are no ids.
    """
    names = ("generation_config.json", "config.json")
    return sum(
        (
            _ids(
                f"{directory / name}: eos_token_id", read_json(directory / name).get("eos_token_id")
            )
            for name in names
        ),
        (),
    )


def declared_stop_ids_from_gguf(metadata: Mapping[str, object]) -> tuple[int, ...]:
    """Ids of the end-of-text, end-of-turn and end-of-message tokens in GGUF metadata.

    Raises:
      InputError: for values that are no ids.
    """
    keys = (f"tokenizer.ggml.{key}" for key in _GGUF_KEYS)
    return sum((_ids(key, metadata.get(key)) for key in keys), ())


def _ids(origin: str, value: object) -> tuple[int, ...]:
    """One id or several as a tuple; `None` is no id."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [item for item in values if not isinstance(item, int) or isinstance(item, bool)]
    if wrong:
        raise InputError(f"{origin}: {wrong[0]!r} given, a token id or a list of them expected")
    return tuple(values)


# --- stop strings ---
#
# Ending a text at a string, while it streams.


class StopStrings:
    """Watches a text that comes piece by piece for the first of some strings.

    Text that might be the beginning of a stop string is held back until it is certain; the string
    itself is never given out.

    Attributes:
      found: whether a stop string has come; nothing is given out after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> str:
        """The text that became certain with this piece."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        certain = len(self._held) - self._open()
        ready, self._held = self._held[:certain], self._held[certain:]
        return ready

    def flush(self) -> str:
        """What was held back and turned out to be text, at the end."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _open(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = range(min(longest, len(self._held)), 0, -1)
        return next(
            (n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0
        )
