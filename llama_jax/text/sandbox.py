"""Runs chat templates: programs that come with a model, so anybody's, rendered with little to call and a budget.

Jinja's sandbox keeps a template away from Python's internals, but not from `'a' * 10**9`, from `x ~ x` forty times
over or from loops inside loops. Here every step costs, and every value costs its size before anything walks over it;
what a template may cost is bounded (about a second and 100 MB; for a conversation of more than a million characters in
proportion to it), and the same template always costs the same.
"""

import datetime
import functools
from collections.abc import Mapping
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
from llama_jax.text import meter

LARGEST_SOURCE = 64 << 10
LARGEST_OUTPUT = 1 << 20
_OUTPUT_PER_CHARACTER = 4  # of what a template is given, where that makes more

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

_SCOPES = ("_loop_vars", "_block_vars")  # what Jinja hands on with every call inside a loop or block, for functions of its own


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
        return nodes.Const(node.data, lineno=node.lineno)  # as an expression it passes through `meter.printed`

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
        self._pay_arguments(node)
        if node.node is None:  # of a filter block, which hands it the text printed inside
            return node
        node.node = self._through(node.node, "_pay")
        return self._through(node, "_made")

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        """A test pays for what it looks at."""
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
        node.arg = node.arg if isinstance(node.arg, nodes.Const) else self._through(node.arg, "_pay")
        return node


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
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=meter.printed, optimized=False,
                         extensions=[jinja2.ext.loopcontrols, _Generation])  # fmt: skip
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "join": meter.joined, "replace": meter.replaced, "tojson": meter.as_json, "safe": str,
            "round": meter.rounded, "title": meter.titled, "trim": meter.trimmed,
            "_pay": meter.pay, "_made": meter.made, "_steps": meter.steps, "_joined": meter.joined,
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
    """Size of what an operator makes; numbers stay below 64 bits, and `%` is the remainder, never formatting."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        result_bits = _bits(left) * abs(right) if operator == "**" else 0
        return meter.FORBIDDEN if max(_bits(left), _bits(right), result_bits) > 64 else 0
    if operator == "+":
        return meter.size(left) + meter.size(right)
    if operator == "*":
        return _repetition_cost(left, right) if isinstance(right, int) else _repetition_cost(right, left)
    raise SecurityError(f"operator {operator} is for numbers, {type(left).__name__} and {type(right).__name__} given")


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _repetition_cost(value: Any, times: int) -> int:
    return (meter.size(value) or 1) * max(times, 0)


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
        names that are not allowed, too much work, and output above 1 MiB and four times what the template is given.
    """
    if len(source) > LARGEST_SOURCE:
        raise InputError(f"chat template: {len(source)} characters given, at most {LARGEST_SOURCE} allowed")
    given = _characters(variables)
    token = meter.METER.set(meter.Meter(given))
    try:
        text = _compiled(source).render(variables)
    except Exception as error:  # the template is a program of strangers: whatever it raises is its own fault
        reason = " ".join(f"{error}".split())[:300] or type(error).__name__
        raise InputError(f"chat template: {reason}") from None
    finally:
        meter.METER.reset(token)
    largest = max(LARGEST_OUTPUT, _OUTPUT_PER_CHARACTER * given)
    if len(text) > largest:
        raise InputError(f"chat template: it made {len(text)} characters, at most {largest} allowed")
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
