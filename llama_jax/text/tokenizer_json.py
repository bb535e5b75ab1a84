"""Opens a `tokenizer.json` that nobody vouches for.

The library runs what the file describes: regular expressions that take for ever, replacements that
make a text grow without end, padding to four billion tokens; and it aborts on some contradictions.
So the parts are held against a list of what LLaMA's relatives use, in sizes that bound time and
memory, before the library sees the file.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from llama_jax.errors import InputError
from llama_jax.formatting import one_line
from llama_jax.text.byte_level import is_bounded
from llama_jax.text.files import read_text

_LONGEST_PIECE = 1024  # characters; the longest of known vocabularies have some hundred
_LARGEST_FILE = 64 << 20
_LARGEST_ID = 1 << 22
_MOST_ADDED = 1 << 16
_MOST_STEPS = 16
_SPACE = "\u2581"

Part = Mapping[str, Any]


def read_tokenizer_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    """The library's object for a file; it neither cuts nor pads.

    Raises:
      InputError: for a file that is no tokenizer.json, and for parts that are not known to be
        harmless.
    """
    text = read_text(path, _LARGEST_FILE)
    try:
        state = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a tokenizer.json ({one_line(error)})") from None
    _require_known(state, str(path))
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("", add_special_tokens=True)  # a post-processor may name missing tokens
    except (KeyboardInterrupt, SystemExit):
        raise
    # the library raises bare Exception, and for unforeseen errors a BaseException
    except BaseException as error:
        raise InputError(f"{path}: not a tokenizer.json ({one_line(error)})") from None
    return tokenizer


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which Python and the library may choose another."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _require_known(state: Any, origin: str) -> None:
    """Refuses a file with a part that is not on the lists below."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f"{origin}: not a tokenizer.json (an object with a model expected)")
    added = state.get("added_tokens") or []
    _require(
        isinstance(added, list) and len(added) <= _MOST_ADDED and all(map(_added_is_plain, added)),
        origin,
        "added_tokens",
    )
    _require_model(state["model"], {entry["content"] for entry in added}, f"{origin}: model")
    for part, known in _KNOWN.items():
        for step in _steps(state.get(part), f"{origin}: {part}"):
            kind = step.get("type")
            if not isinstance(kind, str) or kind not in known:
                raise InputError(
                    f"{origin}: {part} {kind!r:.40} given, {', '.join(known)} expected"
                )
            _require(known[kind](step), origin, f"{part} {kind}", step)


def _require(condition: bool, origin: str, what: str, given: object = None) -> None:
    """Refuses anything malformed, or larger than in any known tokenizer."""
    if not condition:
        shown = "" if given is None else f" ({given!r:.160})"
        raise InputError(
            f"{origin}: {what} is malformed or of a kind not known to take bounded time "
            f"and memory{shown}"
        )


def _require_model(model: Part, added: set[str], origin: str) -> None:
    """Byte pairs without chance (dropout) and without marks on pieces (GPT-1's `</w>`, BERT's
    `##`).
    """
    if model.get("type") != "BPE":
        raise InputError(f"{origin} {model.get('type')!r:.40} given, BPE expected")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"{origin}: {name} {model[name]!r:.40} given, none expected")
    vocabulary: Any = model.get("vocab")
    _require(isinstance(vocabulary, dict) and _ids_are_plain(vocabulary.values()), origin, "vocab")
    _require(
        max(map(len, vocabulary), default=0) <= _LONGEST_PIECE,
        origin,
        f"vocab with pieces above {_LONGEST_PIECE} characters",
    )
    unknown: Any = model.get("unk_token")
    if unknown is not None and not (
        isinstance(unknown, str) and (unknown in vocabulary or unknown in added)
    ):
        raise InputError(f"{origin}: unk_token {unknown!r:.60} is not in the vocabulary")


def _ids_are_plain(ids: Any) -> bool:
    """Whether no id is shared, and the largest bounds a list by id."""
    return all(type(number) is int and 0 <= number < _LARGEST_ID for number in ids) and len(
        set(ids)
    ) == len(ids)


def _added_is_plain(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_short(entry.get("content"))
        and _ids_are_plain([entry.get("id")])
    )


def _is_short(text: Any, longest: int = _LONGEST_PIECE) -> bool:
    return isinstance(text, str) and 0 < len(text) <= longest


def _steps(part: Any, origin: str) -> list[Part]:
    """The steps of a part, one after the other; none where it is absent."""
    if part is None:
        return []
    names = ("normalizers", "pretokenizers", "processors", "decoders")
    inner: Any = (
        next((part[name] for name in names if name in part), None) if _is_sequence(part) else [part]
    )
    _require(isinstance(inner, list) and len(inner) <= _MOST_STEPS, origin, "sequence of steps")
    _require(all(isinstance(step, dict) for step in inner), origin, "step")
    growing = [step["type"] for step in inner if step.get("type") in _ONCE]
    _require(len(set(growing)) == len(growing), origin, "sequence with a repeated step")
    return inner


def _is_sequence(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Sequence"


# Steps that write more than they read, each time anew.
_ONCE = (
    "ByteLevel",
    "Metaspace",
    "Prepend",
    "NFC",
    "TemplateProcessing",
    "BertProcessing",
    "RobertaProcessing",
)


def _is_anything(step: Part) -> bool:
    """For steps without a setting that could do harm."""
    return True


def _does_not_grow(step: Part) -> bool:
    """Whether a replacement of plain text is no longer than the replaced text."""
    pattern, content = step.get("pattern"), step.get("content")
    literal = pattern.get("String") if isinstance(pattern, dict) and len(pattern) == 1 else None
    return _is_short(literal) and isinstance(content, str) and len(content) <= len(str(literal))


def _splits_quickly(step: Part) -> bool:
    """Whether text is cut at a literal, or by a pattern that takes bounded time."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return False
    return _is_short(pattern.get("String")) or (
        isinstance(pattern.get("Regex"), str) and is_bounded(pattern["Regex"])
    )


def _is_small_template(step: Part) -> bool:
    """Whether a template puts a handful of tokens that it describes around a text."""
    single, pair, special = step.get("single"), step.get("pair"), step.get("special_tokens")
    if not (isinstance(single, list) and isinstance(pair, list) and isinstance(special, dict)):
        return False
    entries = [entry.get("ids") if isinstance(entry, dict) else None for entry in special.values()]
    lists = [single, pair, *entries]
    small = len(entries) <= _MOST_STEPS and all(
        isinstance(items, list) and len(items) <= _MOST_STEPS for items in lists
    )
    return small and all(_is_described(item, special) for item in [*single, *pair])


def _is_described(item: Any, special: Part) -> bool:
    """Whether an item of a template is the text, or a token of its table."""
    if not isinstance(item, dict):
        return False
    token = item.get("SpecialToken")
    return token is None or (
        isinstance(token, dict) and isinstance(token.get("id"), str) and token["id"] in special
    )


_KNOWN: dict[str, dict[str, Callable[[Part], bool]]] = {
    "normalizer": {
        "NFC": _is_anything,
        "Prepend": lambda step: _is_short(step.get("prepend"), 8),
        "Replace": _does_not_grow,
    },
    "pre_tokenizer": {
        "ByteLevel": _is_anything,
        "Digits": _is_anything,
        "Punctuation": _is_anything,
        "Metaspace": lambda step: step.get("replacement") == _SPACE,
        "Split": _splits_quickly,
    },
    "post_processor": {
        "ByteLevel": _is_anything,
        "TemplateProcessing": _is_small_template,
        "BertProcessing": _is_anything,
        "RobertaProcessing": _is_anything,
    },
    "decoder": {
        "ByteLevel": _is_anything,
        "ByteFallback": _is_anything,
        "Fuse": _is_anything,
        "Strip": _is_anything,
        "Metaspace": lambda step: step.get("replacement") == _SPACE,
        "Replace": lambda step: (
            (step.get("pattern"), step.get("content")) == ({"String": _SPACE}, " ")
        ),
    },
}
