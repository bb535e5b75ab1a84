"""Conversations in the forms in which they are published, as messages with a role and a content.

Nothing that changes the meaning is dropped: other fields of a message are kept for the template
(`tool_calls`, `name` and `tool_call_id` of a tool) or for the loss mask (`weight`), or it is
refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import InputError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

# Roles by the names that data sets give them. A developer's message is what newer APIs call a
# system's.
_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "Human"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "Assistant"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function"), "tool"),
    "developer": "system",
}
_ANSWERS = ("chosen", "rejected")
_WEIGHTS = (
    "weight",
    "train",
    "loss",
)  # whether a message is learned from: OpenAI's name, and those of other trainers
_REFUSED = (
    "function_call",
    "refusal",
    "reasoning_content",
    "reasoning",
    "thinking",
    "audio",
    "images",
)
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


def read_messages(place: str, name: str, value: object) -> Messages:
    """A list of messages: `role` and `content`, or `from` and `value` (ShareGPT).

    Args:
      place: file and line, for errors.
      name: of the field.
      value: of the field; a list, or the same as JSON text (as in tables).

    Raises:
      InputError: naming the place, for anything else.
    """
    value = _parsed(value)
    if not isinstance(value, list):
        raise InputError(f"{place}: {name} is {kind_name(value)}, a list of messages expected")
    return [_message(place, name, message) for message in value]


def read_turns(place: str, name: str, value: object, role: str) -> Messages:
    """Messages given as such, or as the text of one message of `role`.

    Raises:
      InputError: as `read_messages`.
    """
    if isinstance(value, Mapping):  # one message
        return read_messages(place, name, [value])
    return (
        read_messages(place, name, value)
        if isinstance(value, list)
        else [_said(role, read_text(place, name, value))]
    )


def read_alpaca(place: str, values: Mapping[str, Any]) -> Messages:
    """Alpaca: `instruction`, `input` (which follows it on a line of its own) and `output`; earlier
    turns in `history`.

    Raises:
      InputError: naming the place and the field that is not text.
    """
    earlier = values.get("history") or []
    if not isinstance(earlier, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in earlier
    ):
        raise InputError(
            f"{place}: history is {earlier!s:.40}, pairs of question and answer expected"
        )
    spoken = [
        _said(role, read_text(place, "history", text))
        for pair in earlier
        for role, text in zip(("user", "assistant"), pair)
    ]
    return [
        *spoken,
        _asked(place, values),
        _said("assistant", read_text(place, "output", values["output"])),
    ]


def _asked(place: str, values: Mapping[str, Any]) -> dict[str, Any]:
    parts = [read_text(place, name, values.get(name) or "") for name in ("instruction", "input")]
    return _said("user", "\n".join(part for part in parts if part))


def read_pair(place: str, values: Mapping[str, Any]) -> tuple[Messages, list[Messages]]:
    """The prompt of a pair of answers, and the two answers.

    The prompt is given (`prompt`, `messages`, `conversations`, or `instruction` and `input`; the
    answers may repeat it), or it is what both dialogues have in common: messages, or text in which
    `Human:` and `Assistant:` speak (HH-RLHF).

    Raises:
      InputError: naming the place, where there is no prompt, or the answers begin with another one.
    """
    prompt = _prompt(place, values)
    if prompt is None:
        both = [_dialogue(place, name, values[name]) for name in _ANSWERS]
    else:
        both = [read_turns(place, name, values[name], "assistant") for name in _ANSWERS]
        asking = [
            name
            for name, answer in zip(_ANSWERS, both)
            if answer and answer[0]["role"] in ("user", "system")
        ]
        if not asking:
            return prompt, both
    shared = 0
    while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
        shared += 1
    if prompt is None and not shared:
        raise InputError(
            f"{place}: chosen and rejected begin differently and there is no prompt; give one"
        )
    if prompt is not None and both[0][:shared][-len(prompt) :] != prompt:
        raise InputError(
            f"{place}: {asking[0]} begins with a message that is not the prompt; give "
            "the answers without theirs"
        )
    return both[0][:shared], [messages[shared:] for messages in both]


def _prompt(place: str, values: Mapping[str, Any]) -> Messages | None:
    """What a pair of answers is to, where the record says it apart from them."""
    name = next(
        (name for name in ("prompt", "messages", "conversations") if values.get(name) is not None),
        None,
    )
    if name is not None:
        return read_turns(place, name, values[name], "user")
    return [_asked(place, values)] if values.get("instruction") is not None else None


def _dialogue(place: str, name: str, value: object) -> Messages:
    if not isinstance(value, str):
        return read_messages(place, name, value)
    head, *parts = _SPEAKER.split(read_text(place, name, value))
    if head.strip() or not parts:
        raise InputError(
            f"{place}: chosen and rejected given without prompt; a prompt, lists of "
            "messages, or text that begins with "
            "'Human:' expected"
        )
    return [_said(_ROLES[speaker], text) for speaker, text in zip(parts[::2], parts[1::2])]


def read_tools(place: str, values: Mapping[str, Any]) -> Tools | None:
    """The functions that a conversation may call (`tools`), in the form that templates know; `None`
    without any.

    Raises:
      InputError: naming the place, for anything but a list of functions, and for `functions`, their
        old form.
    """
    if values.get("functions"):
        raise InputError(f"{place}: functions given, the old form of tools; give them as tools")
    tools = _parsed(values.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(
            f"{place}: tools is {kind_name(tools)}, a list of functions (or the same as "
            "JSON text) expected"
        )
    wrapped = [
        _pruned(tool if "function" in tool else {"type": "function", "function": tool})
        for tool in tools
    ]
    if not all(
        isinstance(tool["function"], Mapping) and isinstance(tool["function"].get("name"), str)
        for tool in wrapped
    ):
        raise InputError(
            f"{place}: tools holds a function without a name, functions with names expected"
        )
    return wrapped


def with_system(place: str, values: Mapping[str, Any], messages: Messages) -> Messages:
    """The messages after the record's own `system` message, where it has one.

    Raises:
      InputError: naming the place, if the messages begin with another one.
    """
    if not values.get("system"):
        return messages
    system = _said("system", read_text(place, "system", values["system"]))
    if messages and messages[0]["role"] == "system":
        if messages[0] != system:
            raise InputError(
                f"{place}: system given beside another system message; one of them expected"
            )
        return messages
    return [system, *messages]


def read_text(place: str, name: str, value: object) -> str:
    """A text that UTF-8 can hold.

    Raises:
      InputError: naming the place and the field.
    """
    if not isinstance(value, str):
        raise InputError(f"{place}: {name} is {kind_name(value)}, text expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: {name} holds half of a surrogate pair, which no UTF-8 text can; "
            "mend the line"
        ) from None
    return value


def kind_name(value: object) -> str:
    """What a value is, for a message."""
    return "null" if value is None else f"a {type(value).__name__}"


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _parsed(value: object) -> object:
    """The value of JSON text that holds a list; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _pruned(value: Any) -> Any:
    """Without null fields: Parquet gives every field of every struct."""
    if isinstance(value, Mapping):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _message(place: str, name: str, given: object) -> dict[str, Any]:
    message = _pruned(given) if isinstance(given, Mapping) else {}
    speaker = next((key for key in ("role", "from") if key in message), None)
    words = next((key for key in ("content", "value") if key in message), None)
    if speaker is None or (words is None and not message.get("tool_calls")):
        raise InputError(
            f"{place}: {name} holds {given!r:.60}, messages with role and content (or "
            "from and value) expected"
        )
    refused = next((key for key in _REFUSED if message.get(key)), None)
    if refused:
        raise InputError(
            f"{place}: {name} holds a message with {refused}, which is not supported; "
            "remove it or the record"
        )
    role = read_text(place, f"{name}.{speaker}", message[speaker])
    content = "" if words is None else _content(place, f"{name}.{words}", message[words])
    if role == "function_call":  # ShareGPT: the call is the message
        return _said("assistant", "") | {"tool_calls": _calls(place, [content])}
    made = _said(_ROLES.get(role, role), content)
    if message.get("tool_calls"):
        made["tool_calls"] = _calls(place, message["tool_calls"])
    made |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    return made | _weight(place, message) if made["role"] == "assistant" else made


def _content(place: str, name: str, value: object) -> str:
    """A content, given as text or as a list of parts that are text."""
    if not isinstance(value, list):
        return read_text(place, name, value)
    for part in value:
        if (
            not isinstance(part, Mapping)
            or part.get("type", "text") != "text"
            or "text" not in part
        ):
            kind = part.get("type") if isinstance(part, Mapping) else kind_name(part)
            raise InputError(
                f"{place}: {name} holds a part of type {kind!r:.40}, parts of text alone expected"
            )
    return "".join(read_text(place, name, part["text"]) for part in value)


def _calls(place: str, calls: object) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as values instead of JSON text where they can be."""
    made = []
    for given in calls if isinstance(calls, list) else [calls]:
        call: Any = _json_or_none(given) if isinstance(given, str) else given
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"{place}: tool_calls holds {given!r:.60}, calls of functions with name "
                "and arguments expected"
            )
        arguments = function.get("arguments", function.get("parameters", {}))
        parsed = _json_or_none(arguments) if isinstance(arguments, str) else arguments
        own = {"name": function["name"], "arguments": arguments if parsed is None else parsed}
        made.append(
            {"type": "function", "function": own} | ({"id": call["id"]} if call.get("id") else {})
        )
    return made


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _weight(place: str, message: Mapping[str, Any]) -> dict[str, int]:
    """Whether a message is learned from, where it says so: `weight` 0 is kept."""
    for key in _WEIGHTS:
        if key in message:
            if message[key] not in (0, 1):
                raise InputError(
                    f"{place}: {key} {message[key]!r:.20} of a message given, 0 or 1 expected"
                )
            if not message[key]:
                return {"weight": 0}
    return {}
