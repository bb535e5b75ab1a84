"""Requests of a file: JSON lines with prompts or messages, checked line by line before any model is
loaded.
"""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from llama_jax.cli.models import OWN, check_settings
from llama_jax.errors import InputError
from llama_jax.text.chat import ROLES

_KINDS = ("prompt", "messages")
_KEYS = (*_KINDS, "id", *OWN)
Prompt = str | list[dict[str, str]]


class Request(NamedTuple):
    """One line of the input, with everything that decides its answers.

    Attributes:
      number: its place among the requests, from 0.
      line: its number in the file, from 1.
      id: the user's name for it; `None` without.
      prompt: a text, or messages.
      settings: those of `OWN`, the command line's where the line has none.
      first_key: number of its first answer among those that share its seed: 0 where the line has a
        seed of its own.
      digest: of all this and, after `bound`, of what else decides the answers: tells whether an
        answer belongs to it.
    """

    number: int
    line: int
    id: str | int | None
    prompt: Prompt
    settings: dict[str, Any]
    first_key: int
    digest: str


class Reader(NamedTuple):
    """How lines become requests.

    Attributes:
      settings: of the command line; lines without a seed share its seed, and every answer has
        random numbers of its own.
      chat: whether a prompt is a user's message.
      system: system message of conversations without one.
    """

    settings: Mapping[str, Any]
    chat: bool
    system: str | None

    def read(self, name: str) -> list[Request]:
        """All requests of a file; `-` is standard input. Empty lines are none.

        Raises:
          InputError: naming the file and the line, for what is no request; for a file without any.
        """
        requests: list[Request] = []
        for at, line in enumerate(_lines(name), start=1):
            if line.strip():
                try:
                    requests.append(self._request(len(requests), at, line))
                except InputError as error:
                    raise InputError(f"{_shown(name)}, line {at}: {error}") from None
        if not requests:
            raise InputError(f"{_shown(name)}: no requests found; one JSON object a line expected")
        return requests

    def _request(self, number: int, at: int, line: bytes) -> Request:
        values = _object(line)
        unknown = [key for key in values if key not in _KEYS]
        if unknown:
            raise InputError(f"key {unknown[0]!r:.60} is unknown; {', '.join(_KEYS)} are known")
        if sum(kind in values for kind in _KINDS) != 1:
            raise InputError("prompt or messages expected, and one of them only")
        name = values.get("id")
        if isinstance(name, bool) or not isinstance(name, str | int | None):
            raise InputError(f"id: {name!r:.60} given; a text or a whole number expected")
        prompt = (
            self._text(values["prompt"])
            if "prompt" in values
            else self._messages(values["messages"])
        )
        own = _settings({key: values[key] for key in OWN if key in values})
        settings = {**{key: self.settings[key] for key in OWN}, **own}
        first_key = 0 if "seed" in own else number * self.settings["samples"]
        return Request(
            number,
            at,
            name,
            prompt,
            settings,
            first_key,
            _digest([name, prompt, settings, first_key]),
        )

    def _text(self, value: object) -> Prompt:
        """A prompt: text, or what a user says."""
        if not isinstance(value, str):
            raise InputError(f"prompt: {value!r:.60} given; text expected")
        if not self.chat and self.system is not None:
            raise InputError(
                "a plain prompt given with --system; a system message belongs to a "
                "conversation: add --chat, or "
                "give messages"
            )
        return self._led([{"role": "user", "content": value}]) if self.chat else value

    def _messages(self, value: object) -> Prompt:
        """Messages as chat templates take them."""
        if not isinstance(value, list) or not value:
            raise InputError(f"messages: {value!r:.60} given; a list of role and content expected")
        for number, message in enumerate(value):
            whole = (
                isinstance(message, dict)
                and set(message) == {"role", "content"}
                and isinstance(message["content"], str)
            )
            if not whole or message["role"] not in ROLES:
                roles = ", ".join(ROLES)
                raise InputError(
                    f"messages[{number}]: {message!r:.60} given; a role ({roles}) and "
                    "content, a text, expected"
                )
        return self._led(value)

    def _led(self, messages: list[dict[str, str]]) -> Prompt:
        """Messages with the system's in front, if there is one."""
        led = self.system is None or messages[0]["role"] == "system"
        return messages if led else [{"role": "system", "content": str(self.system)}, *messages]


def bound(requests: Iterable[Request], identity: Mapping[str, Any]) -> list[Request]:
    """The requests, their digests bound to what else decides the answers."""
    return [request._replace(digest=_digest([request.digest, identity])) for request in requests]


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


def _lines(name: str) -> Iterator[bytes]:
    if name == "-":
        yield from sys.stdin.buffer
        return
    try:
        with pathlib.Path(name).open("rb") as file:
            yield from file
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{name}: cannot be read ({reason}); --input takes a file of JSON lines"
        ) from None


def _object(line: bytes) -> dict[str, Any]:
    """A line as a JSON object of texts that can be written again."""
    try:
        values = json.loads(line.decode())
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text at byte {error.start}") from None
    except UnicodeEncodeError:
        raise InputError("half of a surrogate pair given; whole characters expected") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({' '.join(str(error).split()):.100})") from None
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60} given; a JSON object expected")
    return values


def _settings(own: dict[str, Any]) -> dict[str, Any]:
    """Settings as `llama_jax.generation.text.stream` takes them; JSON's keys are texts always."""
    if "stop" in own:
        own["stop"] = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not isinstance(own["stop"], list) or not all(
            isinstance(stop, str) and stop for stop in own["stop"]
        ):
            raise InputError(
                f"stop: {own['stop']!r:.60} given; a text or a list of texts, none of "
                "them empty, expected"
            )
    if "logit_bias" in own:
        own["logit_bias"] = _bias(own["logit_bias"])
    _checked(json.dumps(own, sort_keys=True))
    return own


def _bias(value: object) -> dict[int, Any]:
    try:
        return {int(token): number for token, number in value.items()}  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        raise InputError(
            f"logit_bias: {value!r:.60} given; an object of token ids and numbers expected"
        ) from None


@functools.lru_cache(maxsize=1024)
def _checked(settings: str) -> None:
    """Refuses settings out of range; most lines of a file have the same, and the check takes a
    while.
    """
    values = json.loads(settings)
    check_settings(values | {"logit_bias": _bias(values.get("logit_bias", {}))})
