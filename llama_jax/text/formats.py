"""Chat formats that are built in: Llama 2, Llama 3 and ChatML, as templates like any other."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.text.chat import APART, ChatTemplate
from llama_jax.text.tokenizer import Tokenizer

_LLAMA2 = r"""{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if not turns or (add_generation_prompt and turns[-1].role != 'user') %}
    {{- raise_exception('Llama 2 answers a user; let the last message be the user\'s') }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('Llama 2 wants user and assistant in turn, after at most one system'
            ~ ' message') }}
    {%- elif message.role == 'user' %}
        {{- bos_token ~ '[INST] '
            ~ ((system if loop.first else '') ~ message.content) | trim ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""
_LLAMA3 = (
    APART
    + r"""{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ message.content ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
)
_CHATML = r"""{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_ROLE_TOKENS: Mapping[
    str, frozenset[str]
] = {  # without which a tokenizer would read a format as plain text
    "llama2": frozenset(),
    "llama3": frozenset({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}),
    "chatml": frozenset({"<|im_start|>", "<|im_end|>"}),
}


def llama2(begin_token: str | None, end_token: str | None) -> ChatTemplate:
    """Llama 2's format: `<s>[INST] <<SYS>>…<</SYS>>  … [/INST] … </s>`, every exchange with a begin
    token of its own.

    Contents are trimmed as in Meta's code: the first user message together with the system's, in
    front of it.

    Source: `chat_completion` in llama/generation.py of Meta's llama repository.
    """
    return ChatTemplate(_LLAMA2, begin_token, end_token)


def llama3(begin_token: str | None, end_token: str | None) -> ChatTemplate:
    """Llama 3's format: each message after a header with its role, up to `<|eot_id|>`; a tool
    speaks as `ipython`.

    Contents are not trimmed, and become tokens apart from the header, as in Meta's code. (The
    templates that are shared with the weights trim them; where there is no white space to trim the
    ids are the same.)

    Source: `ChatFormat` in models/llama3/chat_format.py of Meta's llama-models repository.
    """
    return ChatTemplate(_LLAMA3, begin_token, end_token)


def chatml(begin_token: str | None, end_token: str | None) -> ChatTemplate:
    r"""ChatML: `<|im_start|>`, role, a new line, content as it is, `<|im_end|>`, a new line; no
    system message of its own.
    """
    return ChatTemplate(_CHATML, begin_token, end_token)


FORMATS: Mapping[str, Callable[[str | None, str | None], ChatTemplate]] = {
    "llama2": llama2,
    "llama3": llama3,
    "chatml": chatml,
}


def format_for(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The format that a tokenizer's special tokens were made for.

    `None` if they say nothing: the tokenizer of LLaMA 1 and 2 is the same for base and chat models.
    """
    telling = (
        name
        for name, needed in _ROLE_TOKENS.items()
        if needed and needed <= tokenizer.special_tokens.keys()
    )
    name = next(telling, None)
    return None if name is None else named_format(name, tokenizer)


def named_format(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """One of `FORMATS`, with the begin and end tokens of a tokenizer.

    Raises:
      InputError: for an unknown name, and if the tokenizer lacks special tokens that the format is
        made of.
    """
    if name not in FORMATS:
        raise InputError(f"chat format: {name!r:.60} given, one of {', '.join(FORMATS)} expected")
    begin, end = (
        _token_text(tokenizer, tokenizer.begin_id),
        _token_text(tokenizer, tokenizer.end_id),
    )
    missing = sorted(_ROLE_TOKENS[name] - tokenizer.special_tokens.keys())
    if name == "llama2" and (begin is None or end is None):
        missing = ["a token that begins or one that ends a text"]
    if missing:
        raise InputError(
            f"chat format {name}: the tokenizer lacks {', '.join(missing)}; give another "
            "format, or the tokenizer of a "
            "model trained with this one"
        )
    return FORMATS[name](begin, end)


def _token_text(tokenizer: Tokenizer, token: int | None) -> str | None:
    """Text of a special token."""
    return next(
        (text for text, number in tokenizer.special_tokens.items() if number == token), None
    )


class _Probe(NamedTuple):
    """A conversation, and whether its first message is the system's."""

    messages: list[dict[str, str]]
    led: bool


def _probe(*turns: str, system: str | None = None) -> _Probe:
    lead = [] if system is None else [{"role": "system", "content": system}]
    spoken = [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]
    return _Probe(lead + spoken, system is not None)


# Probes that distinguish formats: one and several messages, with and without a system message,
# several lines, words of templates. No white space at the edges of contents: whether it is trimmed
# is no matter of format.
_PROBES = (
    _probe("Hi", system="Be brief."),
    _probe("What is 2 + 3?", "5", "And\n\nthen?", system="Answer like\na clerk."),
    _probe("a", "b <b>&amp;</b>", "c", "{{ d }}", "e", system="[x] 'y' \"z\""),
    _probe("Think.", "<think>\nhm\n</think>\n\nYes.", "Why?", system="S"),
    _probe("Hi"),
    _probe("one", "two", "three"),
    _probe("one", "two"),
)


def recognise(template: ChatTemplate) -> str | None:
    """Name of the built-in format to which a template is equivalent; `None` for any other.

    Both write a set of conversations, with and without a generation prompt. The texts must be
    equal, with these liberties: a begin token in front or none (`encode_chat` puts exactly one
    there), contents trimmed or not, and, in conversations without a system message, any words in
    front of those of the format (a system message of the template's own, such as SmolLM2's). Tools
    are not looked at. A template that fails is none of the formats.
    """
    return next((name for name in FORMATS if _equivalent(template, name)), None)


def _equivalent(template: ChatTemplate, name: str) -> bool:
    """Whether a template writes every probe as a format does."""
    known = FORMATS[name](template.begin_token, template.end_token)
    return all(
        _agree(template, known, probe, prompt) for probe in _PROBES for prompt in (False, True)
    )


def _agree(template: ChatTemplate, known: ChatTemplate, probe: _Probe, prompt: bool) -> bool:
    """Whether both write a conversation in the same way; where only `known` refuses, nothing is
    compared.
    """
    try:
        expected = _body(known, probe, prompt)
    except InputError:
        return True
    try:
        given = _body(template, probe, prompt)
    except InputError:
        return False
    return given == expected if probe.led else given.endswith(expected)


def _body(template: ChatTemplate, probe: _Probe, prompt: bool) -> str:
    """A conversation as text, without the begin token in front."""
    return template.render(probe.messages, prompt).removeprefix(template.begin_token or "")
