"""Chat templates: a conversation as one text, and as token ids in which only the template speaks in
special tokens.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.text.files import read_json, read_text, special_token
from llama_jax.text.loss_mask import AssistantText, Span, assistant_spans, cut_at, tokens_inside
from llama_jax.text.sandbox import LARGEST_SOURCE, render
from llama_jax.text.tokenizer import Tokenizer

# A comment in Jinja, so that it goes along wherever a template is written, and means nothing to
# others.
APART = "{#- The words of messages become tokens apart from those around them. -#}\n"
ROLES = ("system", "user", "assistant", "tool", "ipython")
Tools = Sequence[Mapping[str, Any]] | None
_MORE = {
    "assistant": {"tool_calls", "weight"},
    "tool": {"name", "tool_call_id"},
}  # keys beside role and content


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a model wants a conversation written.

    Attributes:
      source: the template in Jinja.
      begin_token: text of the token that begins a text, `bos_token` in templates; `None` if there
        is none.
      end_token: text of the token that ends a text, `eos_token` in templates; `None` if there is
        none.
    """

    source: str
    begin_token: str | None
    end_token: str | None

    @property
    def encodes_apart(self) -> bool:
        """Whether contents become tokens apart from the template's words around them, as in Meta's
        code for Llama 3.

        Else template and content are one text, as in the Hugging Face tools.
        """
        return self.source.startswith(APART)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Tools = None,
    ) -> str:
        """A conversation as text.

        Args:
          messages: `{"role": ..., "content": ...}`, both text, in the order of speaking; of the
            assistant also `tool_calls`, of a tool `name` and `tool_call_id`. `weight` is not the
            template's matter.
          add_generation_prompt: whether to end with the words that make the model answer.
          tools: functions that the model may call.

        Raises:
          InputError: for malformed messages, and with the template's own message where it refuses
            them.
        """
        _check(messages)
        tokens = {"bos_token": self.begin_token, "eos_token": self.end_token}
        known = {name: token for name, token in tokens.items() if token is not None}
        plain = [
            {key: value for key, value in message.items() if key != "weight"}
            for message in messages
        ]
        return render(
            self.source,
            {
                "messages": plain,
                "add_generation_prompt": add_generation_prompt,
                "tools": tools and list(tools),
                "documents": None,
                **known,
            },
        )


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation, ending where the model is to answer unless
    `add_generation_prompt` is false.

    Special tokens that a message contains stay text; those of the template become their ids. Where
    the model's prompts begin with a begin token there is one, whether the template writes none, one
    or two.

    Raises:
      InputError: for malformed messages, and with the template's own message where it refuses them.
    """
    writing = _Writing(template, tokenizer, messages)
    rendered = template.render(writing.messages, add_generation_prompt)
    return _begin_once(
        tokenizer, [token for stretch in writing.stretches(rendered) for token in stretch.ids]
    )


class Dialogue(NamedTuple):
    """A conversation to learn from.

    Attributes:
      token_ids: of the whole conversation.
      mask: for each token, whether the assistant says it.
    """

    token_ids: list[int]
    mask: list[bool]


def encode_dialogue(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools = None,
) -> Dialogue:
    """Token ids of a whole conversation, and which of them the assistant says in any of its turns.

    The ids are those of `encode_chat` without a generation prompt. The assistant says its contents
    and what ends its turn, up to and including the next special token if nothing but white space
    stands before that; the model must learn to stop. The words that open a turn are never its own.
    A token on the border between content and the template's words belongs to the assistant if any
    of its characters does. A message with `tool_calls` is said as the template writes it behind a
    generation prompt. A message of `weight` 0 is not learned from.

    Raises:
      InputError: as `encode_chat`; for a template that drops, moves, repeats or changes what the
        assistant says, or does not write its `tool_calls` or the `tools`; for a tokenizer that
        changes the text.
    """
    writing = _Writing(template, tokenizer, messages, tools)
    rendered = writing.render(writing.messages)
    probe = writing.render(writing.probes())
    writing.require_written()
    marks = writing.marks
    contents = assistant_spans(rendered, probe, writing.said(), marks.opening, marks.closing)
    turns = writing.learned(writing.turns(rendered, contents), writing.call_turns(rendered))
    stretches = list(writing.stretches(rendered))
    mask = [inside for stretch in stretches for inside in writing.inside(stretch, turns)]
    ids = _begin_once(tokenizer, [token for stretch in stretches for token in stretch.ids])
    return Dialogue(
        ids, [False, *mask][1 + len(mask) - len(ids) :]
    )  # begin tokens come and go in front


class _Marks(NamedTuple):
    """Characters that no text holds, each with a meaning while a conversation is rendered and
    encoded.
    """

    plain: str  # before a special token that is text
    seam: str  # where encoding starts anew
    opening: str  # before the assistant's text
    closing: str  # after it


class _Stretch(NamedTuple):
    """A part of a rendering that is encoded by itself: one special token, or text."""

    start: int  # in the rendering
    text: str  # marks included
    ids: list[int]
    special: bool


class _Writing:
    """A conversation on its way through a template: contents with marks in, rendered text to
    tokens.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Tools = None,
    ) -> None:
        _check(messages)
        texts = [
            template.source,
            template.begin_token or "",
            template.end_token or "",
            *tokenizer.special_tokens,
        ]
        texts += _texts([tools, *(list(message.values()) for message in messages)])
        self.marks = _Marks(*_unused_characters(texts, 4))
        self._template, self._tokenizer = template, tokenizer
        self._special = _any_of(tokenizer.special_tokens)
        self._seam = self.marks.seam if template.encodes_apart else ""
        self.messages = [
            {**self._marked(message), "content": self._written(message["content"])}
            for message in messages
        ]
        self._tools: Tools = self._marked(tools)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """Some messages as the template writes them, with the tools."""
        return self._template.render(messages, prompt, self._tools)

    def _marked(self, value: Any) -> Any:
        """A value with a mark before each special token in its texts."""
        if isinstance(value, str):
            return re.sub(f"(?={self._special})", self.marks.plain, value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(part) for key, part in value.items()}
        return [self._marked(part) for part in value] if isinstance(value, list | tuple) else value

    def _written(self, content: str) -> str:
        """A content with a mark before each place where a special token begins, overlapping ones
        included.
        """
        return self._seam + re.sub(f"(?={self._special})", self.marks.plain, content) + self._seam

    def _said(self, written: str) -> AssistantText:
        core = written.strip(self._seam).strip()
        start = written.find(core) if core else 0
        return AssistantText(written[:start], core, written[start + len(core) :])

    def said(self) -> list[AssistantText]:
        """What the assistant says."""
        return [self._said(message["content"]) for message in self.messages if _speaks(message)]

    def probes(self) -> list[dict[str, Any]]:
        """The messages, with the assistant's contents trimmed and between marks."""
        return [self._probe(message) if _speaks(message) else message for message in self.messages]

    def _probe(self, message: dict[str, Any]) -> dict[str, Any]:
        return {
            **message,
            "content": self.marks.opening
            + self._said(message["content"]).core
            + self.marks.closing,
        }

    def require_written(self) -> None:
        """Refuses a template that does not write every call, with its arguments, or every tool.

        Names and arguments with marks in them must leave as many marks in what the template writes.
        """
        opening, closing = self.marks.opening, self.marks.closing
        calls = [call for message in self.messages for call in message.get("tool_calls", ())]
        if calls:
            probe = self.render(
                [_with_marked_calls(message, opening, closing) for message in self.messages]
            )
            if min(probe.count(opening), probe.count(closing)) < len(calls):
                raise _unwritten("tool_calls")
        if self._tools:
            tools = [
                {**tool, "function": _with_marked_name(tool["function"], opening)}
                for tool in self._tools
            ]
            if self._template.render(self.messages, False, tools).count(opening) < len(tools):
                raise _unwritten("tools")

    def call_turns(self, rendered: str) -> Iterator[Span]:
        """Where the messages with calls stand: from a generation prompt before each to the end of
        its turn.

        Raises:
          InputError: if the template does not write a conversation message by message.
        """
        for number, message in enumerate(self.messages):
            if message.get("tool_calls"):
                if number == 0:
                    raise InputError(
                        "messages[0]: tool_calls in the first message; a message before it expected"
                    )
                before, after = (
                    self.render(self.messages[:number], True),
                    self.render(self.messages[: number + 1]),
                )
                if not rendered.startswith(after) or not after.startswith(before):
                    raise InputError(
                        "chat template: what it writes for a message with tool_calls "
                        "depends on other messages, so its "
                        "tokens cannot be told from the others (no loss mask); give a "
                        "template that does not"
                    )
                yield Span(len(before), len(after.rstrip()))

    def learned(self, spoken: Sequence[Span], called: Iterable[Span]) -> list[Span]:
        """The turns of the assistant, in order, without those of weight 0."""
        spoken_turns, called_turns = iter(spoken), iter(called)
        own = (message for message in self.messages if message["role"] == "assistant")
        turns = [
            (next(spoken_turns if _speaks(message) else called_turns), message.get("weight", 1))
            for message in own
        ]
        return [turn for turn, weight in turns if weight]

    def turns(self, rendered: str, contents: Sequence[Span]) -> list[Span]:
        """The contents, each with the special token that closes its turn if only white space stands
        before that.
        """
        closing = re.compile(rf"[\s{self.marks.seam}]*+(?:{self._special})")
        limits = [*(content.start for content in contents[1:]), len(rendered)]
        matches = (
            closing.match(rendered, content.end, limit) for content, limit in zip(contents, limits)
        )
        return [
            Span(own.start, match.end() if match else own.end)
            for own, match in zip(contents, matches)
        ]

    def stretches(self, rendered: str) -> Iterator[_Stretch]:
        """A rendering cut at special tokens (unless a mark stands before them) and at seams."""
        begin, encode = 0, self._tokenizer.encode
        for cut in re.finditer(
            rf"(?<!{self.marks.plain})(?:{self._special})|{self.marks.seam}|\Z", rendered
        ):
            text = rendered[begin : cut.start()]
            if text:
                yield _Stretch(begin, text, encode(self._clean(text)), special=False)
                encode = self._tokenizer.encode_after_special
            if cut[0] not in ("", self.marks.seam):
                yield _Stretch(
                    cut.start(), cut[0], [self._tokenizer.special_tokens[cut[0]]], special=True
                )
                encode = self._tokenizer.encode_after_special
            begin = cut.end()

    def _clean(self, text: str) -> str:
        return text.replace(self.marks.plain, "")

    def inside(self, stretch: _Stretch, turns: Sequence[Span]) -> list[bool]:
        """Whether each token of a stretch is inside any of the turns."""
        parts = cut_at(stretch.text, stretch.start, turns)
        if stretch.special:
            return [len(parts) > 1]
        return tokens_inside(self._tokenizer, [self._clean(part) for part in parts], stretch.ids)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses messages that a template would misread without a word."""
    if not messages:
        raise InputError("messages: none given, at least one expected")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(
                f"messages[{number}]: {message!r:.60} given, a mapping with role and "
                "content expected"
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"messages[{number}].role: {message['role']!r:.60} given, one of "
                f"{', '.join(ROLES)} expected"
            )
        unknown = set(message) - {"role", "content"} - _MORE.get(message["role"], set())
        if unknown:
            raise InputError(
                f"messages[{number}]: {', '.join(sorted(map(str, unknown))):.60} of a "
                f"message of the {message['role']} given, "
                "role and content expected"
            )
        if message.get("weight", 1) not in (0, 1):
            raise InputError(
                f"messages[{number}].weight: {message['weight']!r:.20} given, 0 or 1 expected"
            )
        if not isinstance(message["content"], str):
            raise InputError(
                f"messages[{number}].content: {type(message['content']).__name__} given, "
                "text expected"
            )


def _speaks(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's and its content is all of it."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def _texts(value: object) -> list[str]:
    """All texts in a value."""
    if isinstance(value, str):
        return [value]
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return (
        [text for part in parts for text in _texts(part)] if isinstance(parts, list | tuple) else []
    )


def _with_marked_calls(message: Mapping[str, Any], opening: str, closing: str) -> Mapping[str, Any]:
    """A message whose calls have one mark in the name of the function and another one in the
    arguments.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _with_marked_name(call["function"], opening)
        given = function.get("arguments")
        arguments = {**given, closing: ""} if isinstance(given, Mapping) else f"{given}{closing}"
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_marked_name(function: Mapping[str, Any], mark: str) -> dict[str, Any]:
    return {**function, "name": f"{function['name']}{mark}"}


def _unwritten(what: str) -> InputError:
    return InputError(
        f"chat template: it does not write {what}, which would be lost; give the model's "
        "own template, which knows tools "
        f"(--template), or leave {what} out"
    )


def _any_of(tokens: Mapping[str, int]) -> str:
    """Pattern of any of the tokens, the longest first; of nothing if there are none."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"


def _unused_characters(texts: list[str], count: int) -> Iterator[str]:
    """Characters for private use that stand in none of the texts."""
    used = set().union(*texts)
    return itertools.islice(
        (mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in used), count
    )


def _begin_once(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids with exactly one begin token in front, where prompts of this model begin with one."""
    if not tokenizer.adds_begin or tokenizer.begin_id is None:
        return ids
    return [
        tokenizer.begin_id,
        *itertools.dropwhile(lambda token: token == tokenizer.begin_id, ids),
    ]


def template_from_directory(directory: pathlib.Path) -> ChatTemplate | None:
    """The template in a model's directory: `chat_template.jinja`, else `chat_template` of
    `tokenizer_config.json`.

    Raises:
      InputError: for damaged files. Of several templates none of which is named `default`, none is
        taken.
    """
    path = directory / "chat_template.jinja"
    declared = read_json(directory / "tokenizer_config.json").get("chat_template")
    source = (
        read_text(path, LARGEST_SOURCE)
        if path.is_file()
        else _default_template(directory, declared)
    )
    if source is None:
        return None
    return ChatTemplate(
        source, special_token(directory, "bos_token"), special_token(directory, "eos_token")
    )


def template_names(directory: pathlib.Path) -> tuple[str, ...]:
    """The names of the templates in a list of `tokenizer_config.json`; empty where there is one
    without a name, or none.

    Raises:
      InputError: for damaged files.
    """
    return tuple(
        _named(directory, read_json(directory / "tokenizer_config.json").get("chat_template"))
    )


def _default_template(directory: pathlib.Path, declared: object) -> str | None:
    """One template, given as text or as the one named `default` of several."""
    return declared if isinstance(declared, str) else _named(directory, declared).get("default")


def _named(directory: pathlib.Path, declared: object) -> dict[str, str]:
    """Templates by name: a list of objects, as files have it, or one object."""
    if declared is None or isinstance(declared, str):
        return {}
    pairs = list(declared.items()) if isinstance(declared, dict) else None
    if isinstance(declared, list) and all(isinstance(entry, dict) for entry in declared):
        pairs = [(entry.get("name"), entry.get("template")) for entry in declared]
    if pairs is None or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in pairs
    ):
        raise InputError(
            f"{directory / 'tokenizer_config.json'}: chat_template should be text, or a "
            "list of objects with name and template"
        )
    return dict(pairs)


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
    return ChatTemplate(
        source, _gguf_token(metadata, "bos_token_id"), _gguf_token(metadata, "eos_token_id")
    )


def _gguf_token(metadata: Mapping[str, object], key: str) -> str | None:
    """Text of the token that an id in the metadata points to."""
    token, tokens = metadata.get(f"tokenizer.ggml.{key}"), metadata.get("tokenizer.ggml.tokens")
    inside = isinstance(token, int) and isinstance(tokens, list) and 0 <= token < len(tokens)
    return tokens[token] if inside else None  # type: ignore[index]
