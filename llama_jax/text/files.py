"""The small JSON files that lie beside a model's tokenizer."""

import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from llama_jax.errors import InputError
from llama_jax.formatting import one_line
from llama_jax.text.sandbox import LARGEST_SOURCE

_LARGEST_JSON = 32 << 20
_SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def read_text(path: pathlib.Path, largest: int) -> str:
    """A UTF-8 file of at most `largest` bytes.

    Raises:
      InputError: for larger files, other encodings, and anything but a file (a device may have no
        end).
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: a device or a pipe given, a regular file expected")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, largest) + 1)
        if (
            len(content) > size
        ):  # it grows, or is one of the system's, which say that they are empty
            content += file.read(largest + 1 - len(content))
            size = len(content)
    if size > largest:
        raise InputError(f"{path}: {size} bytes given, at most {largest} expected")
    try:
        return io.StringIO(content.decode(), newline=None).read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; the file is damaged or of another kind"
        ) from None


def read_json(path: pathlib.Path) -> Mapping[str, Any]:
    """A file that holds one JSON object; a file that does not exist reads as an empty one.

    Raises:
      InputError: for anything else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path, _LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON {type(values).__name__} given, an object expected")
    return values


def special_token(directory: pathlib.Path, role: str) -> str | None:
    """The text of a special token (`role` is `bos_token` or `eos_token`) as the model's files
    declare it.
    """
    declared = (read_json(directory / name).get(role) for name in _SPECIAL_TOKEN_FILES)
    value = next((value for value in declared if value is not None), None)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not is_text(text):
        raise InputError(f"{directory}: {role} is {value!r:.80}, a string expected")
    return text


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value of a JSON file is a string that UTF-8 can hold: JSON can spell half of a
    surrogate pair.
    """
    return isinstance(value, str) and not any(
        "\ud800" <= character <= "\udfff" for character in value
    )


# --- turns ---
#
# Tokens that structure a conversation though their file calls them ordinary: control all the same.
#
# A fine-tuning often adds `<|im_end|>` and its kin as plain added tokens. Were they left so, a
# message that spells them would become them, and speak as another role.


_KNOWN = frozenset(
    {
        "<|im_start|>",
        "<|im_end|>",
        "<|im_sep|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|python_tag|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|end_of_turn|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
    }
)
_TAG = re.compile(
    r"<\S+>|\[\S+\]"
)  # an added run of spaces, or a word, stands in many a template without structuring it


def role_tokens(added: Iterable[str], template: str) -> tuple[str, ...]:
    """Those of the added tokens that structure a conversation.

    Args:
      added: tokens that a file adds to its vocabulary without calling them special.
      template: source of the chat template, empty where there is none.
    """
    return tuple(
        token for token in added if token in _KNOWN or (_TAG.fullmatch(token) and token in template)
    )


def template_text(directory: pathlib.Path) -> str:
    """All that the files in a directory say about chat templates, to look for tokens in; the better
    of `chat_template.jinja`.

    Raises:
      InputError: for files that are damaged or too large.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path, LARGEST_SOURCE)
    return str(read_json(directory / "tokenizer_config.json").get("chat_template") or "")
