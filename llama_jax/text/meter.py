"""What a chat template costs: every step is charged, and every value its size, before anything walks over it."""

import contextvars
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.filters
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

_BUDGET = 1 << 24
_WORK_PER_CHARACTER = 16  # of what a template is given, where that makes more than the budget
FORBIDDEN = 1 << 62
STEP_COST = 256  # an iteration or a call
_ENTRY_COST = 64  # a value held by a list
_DEEPEST = 200
LOOKUP_COST = 32  # an entry or attribute looked up


class Meter:
    """What one rendering may still cost: the same for all, and more for conversations of more than a million characters.

    Attributes:
      left: what may be charged.
    """

    def __init__(self, characters: int = 0) -> None:
        self.left = max(_BUDGET, _WORK_PER_CHARACTER * characters)

    def charge(self, cost: int) -> None:
        """Takes a cost off, before it arises."""
        self.left -= cost
        if self.left < 0:
            raise SecurityError("it asks for more work than any conversation needs")


METER: contextvars.ContextVar[Meter] = contextvars.ContextVar("meter")  # of the rendering under way


def charge(cost: int) -> None:
    """Takes a cost off what the rendering under way may spend."""
    METER.get().charge(cost)


def cost(value: object) -> int:
    """Characters and entries of a value, shared parts counted as often as they would be printed.

    Raises:
      SecurityError: for a value so deep that hashing, comparing or printing it could exhaust the stack.
    """
    total, waiting = 0, [(value, 0)]
    limit = METER.get().left
    while waiting and total <= limit:
        item, depth = waiting.pop()
        total += _ENTRY_COST + size(item)
        if depth > _DEEPEST:
            raise SecurityError(f"it nests values more than {_DEEPEST} deep")
        if total <= limit:
            waiting += [(part, depth + 1) for part in _parts(item)]
    return total


def _parts(value: object) -> Iterable[object]:
    """What a value holds."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return [object.__getattribute__(value, "_Namespace__attrs")]
    return value if isinstance(value, list | tuple | KeysView | ValuesView | ItemsView) else ()


def size(value: object) -> int:
    """What a value itself occupies, in characters or what comes near."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() >> 3
    sized = isinstance(value, list | tuple | Mapping | range | KeysView | ValuesView | ItemsView)
    return _ENTRY_COST * len(value) if sized else 0  # type: ignore[arg-type]


def pay(value: Any) -> Any:
    """For a value that something will walk over; one that comes item by item pays as it comes."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return _walked(value)
    charge(cost(value))
    return value


def _walked(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        charge(STEP_COST + cost(value))
        yield value


def made(value: Any) -> Any:
    """For a value just made; lazy ones are made at once, or they could be nested until the stack overflows."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return iter(list(steps(value)))  # still true, without length, and used up by one walk
    charge(size(value))
    return value


def steps(values: Iterable[Any]) -> Iterator[Any]:
    """For what a loop runs over."""
    for value in values:
        charge(STEP_COST)
        yield value


def printed(value: object) -> str:
    """For what is put out; objects of the engine have no text."""
    if not isinstance(value, str | int | float | list | tuple | dict | jinja2.Undefined | None):
        raise SecurityError(f"it prints a {type(value).__name__}")
    return str(pay(value))


@jinja2.pass_context
def joined(context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """Filter `join`."""
    texts = []
    for value in values:
        item = value if attribute is None else context.environment.getitem(value, attribute)
        charge(cost(item) + len(separator))
        texts.append(str(item))
    return separator.join(texts)


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """Filter and method `replace`."""
    found = text.count(old) if count < 0 else min(count, text.count(old))
    charge(len(text) + found * len(new))
    return text.replace(old, new, count)


def stripping(strip: Callable[[str, str | None], str]) -> Callable[..., str]:
    """A method that strips, where every character of a text may be looked for in all of `chars`."""

    def stripped(text: str, chars: str | None = None) -> str:
        charge(len(text) + (len(text) * len(chars or "") >> 4))
        return strip(text, chars)

    return stripped


def trimmed(text: object, chars: str | None = None) -> str:
    """Filter `trim`."""
    return TEXT_METHODS["strip"](str(text), chars)


def titled(text: object) -> str:
    """Filter `title`, which cuts a text into its words first."""
    charge(_ENTRY_COST * len(str(text)) >> 2)
    return jinja2.filters.do_title(str(text))


def rounded(value: float, precision: int = 0, method: Any = "common") -> float:
    """Filter `round`, which computes ten to the power of the precision."""
    if not -16 <= precision <= 16:
        raise SecurityError(f"it rounds to {precision!r:.30} digits")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_context
def as_json(context: Context, value: Any, ensure_ascii: bool = False, indent: int | None = None,
          separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Filter `tojson` as chat templates expect it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"it indents JSON by {indent}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return joined(context, encoder.iterencode(value))


TEXT_METHODS: dict[str, Callable[..., str]] = {
    "replace": replaced,
    "strip": stripping(str.strip),
    "lstrip": stripping(str.lstrip),
    "rstrip": stripping(str.rstrip),
}
