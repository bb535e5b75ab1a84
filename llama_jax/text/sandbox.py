"""Runs chat templates: programs that come with a model, so anybody's, rendered with little to call
and a budget.

Jinja's sandbox keeps a template away from Python's internals, but not from `'a' * 10**9`, from `x ~
x` forty times over or from loops inside loops. Here every step costs, and every value costs its
size before anything walks over it; the cost of a template is bounded (about a second and 100 MB;
for a conversation of more than a million characters in proportion to it), and the same template
always costs the same.
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama_jax.errors import InputError
from llama_jax.text import sandbox as meter

LARGEST_SOURCE = 64 << 10
LARGEST_OUTPUT = 1 << 20
_OUTPUT_PER_CHARACTER = 4  # of the template's input, where that is more

_FILTERS = (
    "abs",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "int",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "select",
    "selectattr",
    "sort",
    "string",
    "title",
    "trim",
    "unique",
    "upper",
)
_TEXT_METHODS = (
    "capitalize",
    "count",
    "endswith",
    "find",
    "index",
    "isalnum",
    "isalpha",
    "isdigit",
    "islower",
    "isspace",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
)
_METHODS: dict[type, tuple[str, ...]] = {
    str: _TEXT_METHODS,
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}

_SCOPES = (
    "_loop_vars",
    "_block_vars",
)  # what Jinja hands on with every call inside a loop or block, for functions of its own


def _raise(message: object) -> None:
    """Function `raise_exception`: how a template refuses messages."""
    raise TemplateError(str(message))


def _now(form: str) -> str:
    """Function `strftime_now`: the date, which some templates put before the conversation."""
    return datetime.datetime.now().strftime(form[:100])


class _Toll(NodeTransformer):
    """Rewrites a template so that every step and every value of it is charged to the meter."""

    def _through(self, node: nodes.Node, name: str) -> nodes.Filter:
        """The expression with its value passed through one of the functions above."""
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop pays for each turn; a recursive one is refused."""
        if node.recursive:
            raise SecurityError("it loops recursively")
        self.generic_visit(node)
        node.iter = self._through(node.iter, "_steps")
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        """Text of the template itself, printed like any value."""
        return nodes.Const(
            node.data, lineno=node.lineno
        )  # as an expression it passes through `meter.printed`

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """`~` joins through the meter."""
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Both sides pay for their size."""
        self.generic_visit(node)
        node.expr = self._through(node.expr, "_pay")
        for operand in node.ops:
            operand.expr = self._through(operand.expr, "_pay")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        """A filter pays for its input and its output."""
        self.generic_visit(node)
        self._pay_arguments(node)
        if node.node is None:  # of a filter block, which hands it the text printed inside
            return node
        node.node = self._through(node.node, "_pay")
        return self._through(node, "_made")

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        """A test pays for its input."""
        self.generic_visit(node)
        node.node = self._through(node.node, "_pay")
        self._pay_arguments(node)
        return node

    def _pay_arguments(self, node: nodes.Filter | nodes.Test) -> None:
        """Arguments pay for their size, by whatever way they are given."""
        if node.dyn_args or node.dyn_kwargs:
            raise SecurityError(f"it hands unpacked arguments to {node.name}")
        node.args = [self._through(argument, "_pay") for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = self._through(keyword.value, "_pay")

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        """A list pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        """A dict pays for its keys, which are hashed, and for its making."""
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._through(pair.key, "_pay")
        return self._through(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Tuple | nodes.Filter:
        """A tuple that is a value pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made") if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem | nodes.Filter:
        """A slice pays for its making, a key for its size."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._through(node, "_made")
        node.arg = (
            node.arg if isinstance(node.arg, nodes.Const) else self._through(node.arg, "_pay")
        )
        return node


class _Generation(jinja2.ext.Extension):
    """The block `generation`, which marks an assistant's words for training: here only its content
    matters.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with few names to call, and operators and calls that are charged."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=meter.printed,
            optimized=False,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "join": meter.joined,
            "replace": meter.replaced,
            "tojson": meter.as_json,
            "safe": str,
            "round": meter.rounded,
            "title": meter.titled,
            "trim": meter.trimmed,
            "_pay": meter.pay,
            "_made": meter.made,
            "_steps": meter.steps,
            "_joined": meter.joined,
        }
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = {**kept, "raise_exception": _raise, "strftime_now": _now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods of text, lists and mappings by name; whatever a namespace or a loop holds;
        nothing else.
        """
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace | LoopContext) or attr in _METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is a method like others here (not allowed: `'{:999999999}'`), not one to be
        wrapped.
        """

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make something large."""
        meter.charge(_operator_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, macro or method."""
        owner = getattr(__obj, "__self__", None)
        given = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        meter.charge(meter.STEP_COST + meter.cost([owner, *args, *given.values()]))
        if isinstance(owner, str) and __obj.__name__ == "join":
            return meter.joined(__context, args[0], owner)
        metered = meter.TEXT_METHODS.get(__obj.__name__) if isinstance(owner, str) else None
        if metered is not None:
            return metered(owner, *args, **given)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry, also each one on an attribute path such as `map(attribute='a.b')`."""
        meter.charge(meter.LOOKUP_COST)
        return super().getitem(obj, argument)

    def call_filter(self, name: str, value: Any, args: Any = None, *rest: Any, **named: Any) -> Any:
        """A filter that `map` calls for each item."""
        meter.charge(meter.STEP_COST + meter.cost([value, *(args or ())]))
        return meter.made(super().call_filter(name, value, args, *rest, **named))

    def call_test(self, name: str, value: Any, args: Any = None, *rest: Any, **named: Any) -> Any:
        """A test that `select` and its kin call for each item."""
        meter.charge(meter.STEP_COST + meter.cost([value, *(args or ())]))
        return super().call_test(name, value, args, *rest, **named)


def _operator_cost(operator: str, left: Any, right: Any) -> int:
    """Size of what an operator makes; numbers stay below 64 bits, and `%` is the remainder, never
    formatting.
    """
    if isinstance(left, int | float) and isinstance(right, int | float):
        result_bits = _bits(left) * abs(right) if operator == "**" else 0
        return meter.FORBIDDEN if max(_bits(left), _bits(right), result_bits) > 64 else 0
    if operator == "+":
        return meter.size(left) + meter.size(right)
    if operator == "*":
        return (
            _repetition_cost(left, right)
            if isinstance(right, int)
            else _repetition_cost(right, left)
        )
    raise SecurityError(
        f"operator {operator} is for numbers, {type(left).__name__} and "
        f"{type(right).__name__} given"
    )


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _repetition_cost(value: Any, times: int) -> int:
    return (meter.size(value) or 1) * max(times, 0)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox()
    tree = _Toll().visit(environment.parse(source))
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.globals
    )


def render(source: str, variables: Mapping[str, object]) -> str:
    """Renders a Jinja chat template, as the Hugging Face tools understand it.

    Args:
      source: the template, of at most 64 KiB.
      variables: names the template may use, with values of text, numbers, lists and mappings.

    Raises:
      InputError: with the template's own message where it refuses; also for syntax errors,
        undefined attributes, names that are not allowed, too much work, and output above 1 MiB and
        four times the template's input.
    """
    if len(source) > LARGEST_SOURCE:
        raise InputError(
            f"chat template: {len(source)} characters given, at most {LARGEST_SOURCE} allowed"
        )
    given = _characters(variables)
    token = meter.METER.set(meter.Meter(given))
    try:
        text = _compiled(source).render(variables)
    except (
        Exception
    ) as error:  # the template is a program of strangers: whatever it raises is its own fault
        reason = " ".join(f"{error}".split())[:300] or type(error).__name__
        raise InputError(f"chat template: {reason}") from None
    finally:
        meter.METER.reset(token)
    largest = max(LARGEST_OUTPUT, _OUTPUT_PER_CHARACTER * given)
    if len(text) > largest:
        raise InputError(
            f"chat template: it made {len(text)} characters, at most {largest} allowed"
        )
    return text


def _characters(value: object) -> int:
    """Characters of all texts in a value."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return total


# --- meter ---
#
# What a chat template costs: every step is charged, and every value its size, before anything walks
# over it.


_BUDGET = 1 << 24
_WORK_PER_CHARACTER = 16  # of the template's input, where that is more than the budget
FORBIDDEN = 1 << 62
STEP_COST = 256  # an iteration or a call
_ENTRY_COST = 64  # a value held by a list
_DEEPEST = 200
LOOKUP_COST = 32  # an entry or attribute looked up


class Meter:
    """What one rendering may still cost: the same for all, and more for conversations of more than
    a million characters.

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
    """Subtracts a cost from the budget of the current rendering."""
    METER.get().charge(cost)


def cost(value: object) -> int:
    """Characters and entries of a value, shared parts counted as often as they would be printed.

    Raises:
      SecurityError: for a value so deep that hashing, comparing or printing it could exhaust the
        stack.
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
    """For a value just made; lazy ones are made at once, or they could be nested until the stack
    overflows.
    """
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return iter(list(steps(value)))  # still true, without length, and used up by one walk
    charge(size(value))
    return value


def steps(values: Iterable[Any]) -> Iterator[Any]:
    """For the iterable of a loop."""
    for value in values:
        charge(STEP_COST)
        yield value


def printed(value: object) -> str:
    """For output; objects of the engine have no text."""
    if not isinstance(value, str | int | float | list | tuple | dict | jinja2.Undefined | None):
        raise SecurityError(f"it prints a {type(value).__name__}")
    return str(pay(value))


@jinja2.pass_context
def joined(
    context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
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
def as_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Filter `tojson` as chat templates expect it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"it indents JSON by {indent}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return joined(context, encoder.iterencode(value))


TEXT_METHODS: dict[str, Callable[..., str]] = {
    "replace": replaced,
    "strip": stripping(str.strip),
    "lstrip": stripping(str.lstrip),
    "rstrip": stripping(str.rstrip),
}
