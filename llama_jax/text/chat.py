"""Chat templates: a conversation as one text, and as token ids in which only the template speaks in special tokens."""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.text.files import read_json, read_text, special_token
from llama_jax.text.sandbox import LARGEST_SOURCE, render
from llama_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "ipython")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a model wants a conversation written.

    Attributes:
      source: the template in Jinja.
      begin_token: text of the token that begins a text, `bos_token` in templates; `None` if there is none.
      end_token: text of the token that ends a text, `eos_token` in templates; `None` if there is none.
    """

    source: str
    begin_token: str | None
    end_token: str | None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """A conversation as text.

        Args:
          messages: `{"role": ..., "content": ...}`, both text, in the order of speaking.
          add_generation_prompt: whether to end with the words that make the model answer.

        Raises:
          InputError: for malformed messages, and with the template's own message where it refuses them.
        """
        _check(messages)
        tokens = {"bos_token": self.begin_token, "eos_token": self.end_token}
        known = {name: token for name, token in tokens.items() if token is not None}
        plain = [dict(message) for message in messages]
        return render(self.source, {"messages": plain, "add_generation_prompt": add_generation_prompt,
                                    "tools": None, "documents": None, **known})  # fmt: skip


def encode_chat(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, ending where the model is to answer.

    Special tokens that a message contains stay text; those of the template become their ids. Where the model's
    prompts begin with a begin token there is one, whether the template writes none, one or two.

    Raises:
      InputError: for malformed messages, and with the template's own message where it refuses them.
    """
    _check(messages)
    special = _any_of(tokenizer.special_tokens)
    mark = _unused_character([template.source, *(message["content"] for message in messages)])
    marked = [{**message, "content": _marked(message["content"], special, mark)} for message in messages]
    rendered = template.render(marked, add_generation_prompt=True)
    return _begin_once(tokenizer, _encode_marked(tokenizer, rendered, special, mark))


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses messages that a template would misread without a word."""
    if not messages:
        raise InputError("messages: none given, at least one expected")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"messages[{number}]: {message!r:.60} given, a mapping with role and content expected")
        if message["role"] not in ROLES:
            raise InputError(f"messages[{number}].role: {message['role']!r:.60} given, one of {', '.join(ROLES)} expected")
        if not isinstance(message["content"], str):
            raise InputError(f"messages[{number}].content: {type(message['content']).__name__} given, text expected")


def _any_of(tokens: Mapping[str, int]) -> str:
    """Pattern of any of the tokens, the longest first; of nothing if there are none."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"


def _unused_character(texts: list[str]) -> str:
    """A character for private use that stands in none of the texts."""
    used = set().union(*texts)
    return next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in used)


def _marked(content: str, special: str, mark: str) -> str:
    """The text with a mark before each place where a special token begins, overlapping ones included."""
    return re.sub(f"(?={special})", mark, content)


def _encode_marked(tokenizer: Tokenizer, rendered: str, special: str, mark: str) -> list[int]:
    """Ids of text in which special tokens count unless a mark stands before them."""
    ids: list[int] = []
    stretches = re.split(f"(?<!{mark})({special})", rendered)
    for text, token in itertools.zip_longest(stretches[::2], stretches[1::2]):
        encode = tokenizer.encode_after_special if ids else tokenizer.encode
        ids += encode(text.replace(mark, "")) if text else []
        ids += [] if token is None else [tokenizer.special_tokens[token]]
    return ids


def _begin_once(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids with exactly one begin token in front, where prompts of this model begin with one."""
    if not tokenizer.adds_begin or tokenizer.begin_id is None:
        return ids
    return [tokenizer.begin_id, *itertools.dropwhile(lambda token: token == tokenizer.begin_id, ids)]


def template_from_directory(directory: pathlib.Path) -> ChatTemplate | None:
    """The template in a model's directory: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.

    Raises:
      InputError: for damaged files, and for several templates none of which is named `default`.
    """
    path = directory / "chat_template.jinja"
    declared = read_json(directory / "tokenizer_config.json").get("chat_template")
    source = read_text(path, LARGEST_SOURCE) if path.is_file() else _default_template(directory, declared)
    if source is None:
        return None
    return ChatTemplate(source, special_token(directory, "bos_token"), special_token(directory, "eos_token"))


def _default_template(directory: pathlib.Path, declared: object) -> str | None:
    """One template, given as text or as a list of named ones."""
    if declared is None or isinstance(declared, str):
        return declared
    entries = declared if isinstance(declared, list) else []
    named = (entry.get("template") for entry in entries if isinstance(entry, dict) and entry.get("name") == "default")
    source = next(named, None)
    if not isinstance(source, str):
        raise InputError(
            f"{directory / 'tokenizer_config.json'}: chat_template should be text, or a list with one named default"
        )
    return source


def template_from_gguf(metadata: Mapping[str, object]) -> ChatTemplate | None:
    """The template in GGUF metadata, key `tokenizer.chat_template`.

    Raises:
      InputError: if it is not text.
    """
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InputError(f"tokenizer.chat_template: {type(source).__name__} given, text expected")
    return ChatTemplate(source, _gguf_token(metadata, "bos_token_id"), _gguf_token(metadata, "eos_token_id"))


def _gguf_token(metadata: Mapping[str, object], key: str) -> str | None:
    """Text of the token that an id in the metadata points to."""
    token, tokens = metadata.get(f"tokenizer.ggml.{key}"), metadata.get("tokenizer.ggml.tokens")
    inside = isinstance(token, int) and isinstance(tokens, list) and 0 <= token < len(tokens)
    return tokens[token] if inside else None  # type: ignore[index]
