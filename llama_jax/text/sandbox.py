"""Runs chat templates: programs that come with a model, so anybody's, rendered with little to call and a budget.

Jinja's sandbox keeps a template away from Python's internals, but not from `'a' * 10**9`, from `x ~ x` forty times
over or from loops inside loops. Here every step costs, and every value costs its size before anything walks over it;
what a template may cost is bounded (about a second and 100 MB), and the same template always costs the same.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama_jax.errors import InputError

LARGEST_SOURCE = 64 << 10
LARGEST_OUTPUT = 1 << 20

_BUDGET = 1 << 24
_FORBIDDEN = _BUDGET + 1
_STEP_COST = 256  # an iteration or a call
_ENTRY_COST = 64  # a value held by a list
_METER = "the meter"  # with a space, so no template can name it

_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "sort",
    "string", "title", "trim", "unique", "upper",
)  # fmt: skip
_TEXT_METHODS = (
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rsplit",
    "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)  # fmt: skip
_METHODS: dict[type, tuple[str, ...]] = {
    str: _TEXT_METHODS,
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}


class _Meter:
    """What one rendering may still cost."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def charge(self, cost: int) -> None:
        """Takes a cost off, before it arises."""
        self._left -= cost
        if self._left < 0:
            raise SecurityError("it asks for more work than any conversation needs")


def _cost(value: object) -> int:
    """Characters and entries of a value, shared parts counted as often as they would be printed."""
    total, waiting = 0, [value]
    while waiting and total <= _BUDGET:
        item = waiting.pop()
        total += _ENTRY_COST + _size(item)
        if total > _BUDGET:
            break
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return total


def _size(value: object) -> int:
    """What a value itself occupies, in characters or what comes near."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() >> 3
    return _ENTRY_COST * len(value) if isinstance(value, list | tuple | Mapping | range) else 0


def _meter(context: Context) -> _Meter:
    return context[_METER]


@jinja2.pass_context
def _pay(context: Context, value: Any) -> Any:
    """For a value that something will walk over."""
    _meter(context).charge(_cost(value))
    return value


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    """For a value just made."""
    _meter(context).charge(_size(value))
    return value


@jinja2.pass_context
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """For what a loop runs over."""
    meter = _meter(context)
    for value in values:
        meter.charge(_STEP_COST)
        yield value


@jinja2.pass_context
def _printed(context: Context, value: object) -> str:
    """For what is put out; objects of the engine have no text."""
    if not isinstance(value, str | int | float | list | tuple | dict | jinja2.Undefined | None):
        raise SecurityError(f"it prints a {type(value).__name__}")
    return str(_pay(context, value))


@jinja2.pass_context
def _joined(context: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """Filter `join`."""
    meter, texts = _meter(context), []
    for value in values:
        item = value if attribute is None else context.environment.getitem(value, attribute)
        meter.charge(_cost(item) + len(separator))
        texts.append(str(item))
    return separator.join(texts)


@jinja2.pass_context
def _replaced(context: Context, text: str, old: str, new: str, count: int = -1) -> str:
    """Filter and method `replace`."""
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _meter(context).charge(len(text) + found * len(new))
    return text.replace(old, new, count)


@jinja2.pass_context
def _json(context: Context, value: Any, ensure_ascii: bool = False, indent: int | None = None,
          separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Filter `tojson` as chat templates expect it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"it indents JSON by {indent}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _joined(context, encoder.iterencode(value))


def _raise(message: object) -> None:
    """Function `raise_exception`: how a template refuses messages."""
    raise TemplateError(str(message))


def _now(form: str) -> str:
    """Function `strftime_now`: the date, which some templates put before the conversation."""
    return datetime.datetime.now().strftime(form[:100])


_METERED_METHODS: dict[str, Callable[..., str]] = {
    "replace": _replaced,
    "join": lambda context, separator, values: _joined(context, values, separator),
}


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
        return nodes.Const(node.data, lineno=node.lineno)  # as an expression it passes `_printed`

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
        """A filter pays for what it takes and for what it makes."""
        self.generic_visit(node)
        node.args = [self._through(argument, "_pay") for argument in node.args]
        if node.node is None:  # of a filter block, which hands it the text printed inside
            return node
        node.node = self._through(node.node, "_pay")
        return self._through(node, "_made")

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        """A test pays for what it looks at."""
        self.generic_visit(node)
        node.node = self._through(node.node, "_pay")
        node.args = [self._through(argument, "_pay") for argument in node.args]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        """A list pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        """A dict pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Tuple | nodes.Filter:
        """A tuple that is a value pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made") if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem | nodes.Filter:
        """A slice pays for its making."""
        self.generic_visit(node)
        return self._through(node, "_made") if isinstance(node.arg, nodes.Slice) else node


class _Generation(jinja2.ext.Extension):
    """The block `generation`, which marks an assistant's words for training: here only its content matters."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with few names to call, and operators and calls that are charged."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_printed, optimized=False,
                         extensions=[jinja2.ext.loopcontrols, _Generation])  # fmt: skip
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "join": _joined, "replace": _replaced, "tojson": _json, "safe": str,
            "_pay": _pay, "_made": _made, "_steps": _steps, "_joined": _joined,
        }  # fmt: skip
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = {**kept, "raise_exception": _raise, "strftime_now": _now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods of text, lists and mappings by name; whatever a namespace or a loop holds; nothing else."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace | LoopContext) or attr in _METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is a method like others here (not allowed: `'{:999999999}'`), not one to be wrapped."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make something large."""
        _meter(context).charge(_operator_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, macro or method."""
        owner = getattr(__obj, "__self__", None)
        _meter(__context).charge(_STEP_COST + _cost([owner, *args, *kwargs.values()]))
        metered = _METERED_METHODS.get(__obj.__name__) if isinstance(owner, str) else None
        if metered is not None:
            return metered(__context, owner, *args, **kwargs)
        return _made(__context, super().call(__context, __obj, *args, **kwargs))


def _operator_cost(operator: str, left: Any, right: Any) -> int:
    """Size of what an operator makes; numbers stay below 64 bits, and `%` is the remainder, never formatting."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        result_bits = _bits(left) * abs(right) if operator == "**" else 0
        return _FORBIDDEN if max(_bits(left), _bits(right), result_bits) > 64 else 0
    if operator == "+":
        return _size(left) + _size(right)
    if operator == "*":
        return _repetition_cost(left, right) if isinstance(right, int) else _repetition_cost(right, left)
    raise SecurityError(f"operator {operator} is for numbers, {type(left).__name__} and {type(right).__name__} given")


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _repetition_cost(value: Any, times: int) -> int:
    return (_size(value) or 1) * max(times, 0)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox()
    tree = _Toll().visit(environment.parse(source))
    return environment.template_class.from_code(environment, environment.compile(tree), environment.globals)


def render(source: str, variables: Mapping[str, object]) -> str:
    """Renders a Jinja chat template, as the Hugging Face tools understand it.

    Args:
      source: the template, of at most 64 KiB.
      variables: names the template may use, with values of text, numbers, lists and mappings.

    Raises:
      InputError: with the template's own message where it refuses; also for syntax errors, undefined attributes,
        names that are not allowed, too much work and output above 1 MiB.
    """
    if len(source) > LARGEST_SOURCE:
        raise InputError(f"chat template: {len(source)} characters given, at most {LARGEST_SOURCE} allowed")
    try:
        text = _compiled(source).render({**variables, _METER: _Meter()})
    except Exception as error:  # the template is a program of strangers: whatever it raises is its own fault
        reason = " ".join(f"{error}".split())[:300] or type(error).__name__
        raise InputError(f"chat template: {reason}") from None
    if len(text) > LARGEST_OUTPUT:
        raise InputError(f"chat template: it made {len(text)} characters, at most {LARGEST_OUTPUT} allowed")
    return text
