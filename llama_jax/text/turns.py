"""Tokens that structure a conversation though their file calls them ordinary: control all the same.

A fine-tuning often adds `<|im_end|>` and its kin as plain added tokens. Were they left so, a message that spells them
would become them, and speak as another role.
"""

import pathlib
import re
from collections.abc import Iterable

from llama_jax.text.files import read_json, read_text
from llama_jax.text.sandbox import LARGEST_SOURCE

_KNOWN = frozenset(
    {"<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
     "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|python_tag|>", "<|system|>", "<|user|>", "<|assistant|>",
     "<|end|>", "<|end_of_turn|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"}
)  # fmt: skip
_TAG = re.compile(r"<\S+>|\[\S+\]")  # an added run of spaces, or a word, stands in many a template without structuring it


def turn_tokens(added: Iterable[str], template: str) -> tuple[str, ...]:
    """Those of the added tokens that structure a conversation.

    Args:
      added: tokens that a file adds to its vocabulary without calling them special.
      template: source of the chat template, empty where there is none.
    """
    return tuple(token for token in added if token in _KNOWN or (_TAG.fullmatch(token) and token in template))


def template_text(directory: pathlib.Path) -> str:
    """All that the files in a directory say about chat templates, to look for tokens in; the better of `chat_template.jinja`.

    Raises:
      InputError: for files that are damaged or too large.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path, LARGEST_SOURCE)
    return str(read_json(directory / "tokenizer_config.json").get("chat_template") or "")
