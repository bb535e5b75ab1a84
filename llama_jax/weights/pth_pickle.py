"""The pickle inside a `.pth`, read as data: a machine that knows dicts, tuples, plain values and
tensors, and runs nothing.

`pickletools.genops` takes the stream apart into operations. The few that a state dict of tensors is
made of are carried out here; a name of a function or class is only compared with those below. All
others are refused, so there is nothing that a file could call.

Source: PEP 307 and `pickletools` for the operations; PyTorch's `torch/serialization.py` and
  `torch/_utils.py` for the names.
"""

import dataclasses
import pickletools
import re
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

_LARGEST_COUNT = (
    1 << 19
)  # operations; a tensor takes 35, and a model of 1000 layers has 10,000 tensors
_LARGEST_RANK = 8
_KEY = re.compile(r"\w{1,32}", re.ASCII)

_DTYPES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
_NAMES = {*_DTYPES, _DICT, _TENSOR, _PARAMETER}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers in the archive.

    Attributes:
      key: its name in the archive, below `data/`.
      dtype: type of a number.
      count: how many, as the pickle declares.
    """

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class PthTensor:
    """A window on a storage.

    Attributes:
      storage: the numbers.
      offset: index of the first one.
      shape: sizes of the axes.
      strides: numbers from one element to the next, for each axis.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a function or class."""

    text: str


def tensors_in_pickle(stream: bytes) -> dict[str, PthTensor]:
    """The tensors of a state dict by name.

    Raises:
      InputError: for a stream that is damaged or endless, and for anything but a flat dict of
        tensors.
    """
    state = _Machine().run(stream)
    if type(state) is not dict:
        raise InputError(
            f"the file holds a {_kind(state)}; a state dict (names to tensors) expected"
        )
    for name, value in state.items():
        if not isinstance(value, PthTensor):
            raise InputError(
                f"{shown(name)} is a {_kind(value)}; a flat state dict holds tensors only"
            )
    return state


def _kind(value: object) -> str:
    return {PthTensor: "tensor", _Name: "class", Storage: "storage"}.get(
        type(value), type(value).__name__
    )


def _refuse(what: str) -> NoReturn:
    raise InputError(
        f"the pickle {what}; only state dicts of tensors are read, and nothing is executed"
    )


class _Machine:
    """The stack, the marks in it and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: bytes) -> Any:
        """Carries out all operations and returns the result."""
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
                if operation.name not in _OPERATIONS:
                    _refuse(f"uses the operation {operation.name}")
                if count > _LARGEST_COUNT:
                    _refuse(f"has more than {_LARGEST_COUNT} operations")
                _OPERATIONS[operation.name](self, argument)
            (result,) = self.stack
            return result
        except InputError:
            raise
        except (
            ValueError,
            OverflowError,
            IndexError,
            KeyError,
        ):  # of `genops`, of an empty stack, of the memo
            _refuse("is damaged")

    def push(self, value: Any) -> None:
        """A plain value, as it is."""
        self.stack.append(value)

    def nothing(self, _: Any) -> None:
        """Framing, the mark of the end."""

    def protocol(self, number: int) -> None:
        """The version; torch.save writes 2."""
        if not 2 <= number <= 5:
            _refuse(f"has protocol {number}")

    def mark(self, _: Any) -> None:
        """Starts a group of values."""
        self.marked.append(self.stack)
        self.stack = []

    def group(self) -> list[Any]:
        """The values since the last mark."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def put(self, index: int) -> None:
        """Remembers the topmost value."""
        self.memo[index] = self.stack[-1]

    def put_next(self, _: Any) -> None:
        """Remembers the topmost value under the next number."""
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        """A remembered value."""
        self.push(self.memo[index])

    def name(self, text: str) -> None:
        """The name of one of the few functions and classes that are known."""
        module_and_name = text.replace(" ", ".", 1)
        if module_and_name not in _NAMES:
            _refuse(f"names {shown(module_and_name)}")
        self.push(_Name(module_and_name))

    def name_on_stack(self, _: Any) -> None:
        """The same, from two texts."""
        module, name = self.popped(str, str)
        self.name(f"{module} {name}")

    def popped(self, *kinds: type) -> list[Any]:
        """As many values off the stack, which have to be of these kinds."""
        values = [self.stack.pop() for _ in kinds][::-1]
        if any(type(value) is not kind for value, kind in zip(values, kinds)):
            _refuse("puts values where others belong")
        return values

    def last_in_tuple(self, count: int) -> None:
        """A tuple of the last values."""
        self.push(tuple(self.stack.pop() for _ in range(count))[::-1])

    def set_items(self, values: list[Any]) -> None:
        """Names and values into the dict on top of the stack."""
        entries = self.stack[-1]
        if type(entries) is not dict or len(values) % 2:
            _refuse("puts items into something that is no dict")
        for name, value in zip(values[::2], values[1::2]):
            if type(name) is not str or name in entries:
                _refuse(
                    f"has the key {shown(name)} twice"
                    if type(name) is str
                    else f"has a {_kind(name)} as a key"
                )
            entries[name] = value

    def set_item(self, _: Any) -> None:
        """One name and value."""
        self.set_items([self.stack.pop() for _ in range(2)][::-1])

    def attributes(self, _: Any) -> None:
        """Attributes of a dict: versions of modules, that torch keeps beside a state dict and
        nobody needs here.
        """
        (state,) = self.popped(dict)
        if type(self.stack[-1]) is not dict or state.keys() != {"_metadata"}:
            _refuse("sets attributes of an object")

    def storage(self, _: Any) -> None:
        """A storage by the tuple that stands for it."""
        (identity,) = self.popped(tuple)
        if tuple(map(type, identity)) != (str, _Name, str, str, int) or identity[0] != "storage":
            _refuse("refers to something that is no storage")
        _, kind, key, _, count = identity
        if kind.text not in _DTYPES or not _KEY.fullmatch(key) or count < 0:
            _refuse(f"has a storage {shown(key)} of {shown(kind.text)}, which is not supported")
        self.push(Storage(key, _DTYPES[kind.text], count))

    def call(self, _: Any) -> None:
        """What stands for an empty dict, a tensor or a parameter."""
        name, arguments = self.popped(_Name, tuple)
        if name.text not in _CALLS:
            _refuse(f"calls {name.text}")
        self.push(_CALLS[name.text](arguments))


def _empty_dict(arguments: tuple) -> dict:
    return {} if not arguments else _refuse("fills an OrderedDict in an unknown way")


def _tensor(arguments: tuple) -> PthTensor:
    """A tensor from storage, offset, shape and strides; whether it needs gradients, hooks and the
    like are left aside.
    """
    if len(arguments) < 6 or tuple(map(type, arguments[:4])) != (Storage, int, tuple, tuple):
        _refuse("has a tensor without storage, offset, shape and strides")
    storage, offset, shape, strides = arguments[:4]
    numbers = (offset, *shape, *strides)
    if (
        len(shape) != len(strides)
        or len(shape) > _LARGEST_RANK
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        _refuse("has a tensor with a shape or strides that cannot be")
    return PthTensor(storage, offset, shape, strides)


def _parameter(arguments: tuple) -> PthTensor:
    if not arguments or type(arguments[0]) is not PthTensor:
        _refuse("has a parameter that is no tensor")
    return arguments[0]


_CALLS: dict[str, Callable[[tuple], Any]] = {
    _DICT: _empty_dict,
    _TENSOR: _tensor,
    _PARAMETER: _parameter,
}

# Every operation there is, by its name in `pickletools`.
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "FRAME": _Machine.nothing,
    "STOP": _Machine.nothing,
    "NONE": _Machine.push,
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "LONG1": _Machine.push,
    "BINUNICODE": _Machine.push,
    "SHORT_BINUNICODE": _Machine.push,
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.group())),
    "TUPLE1": lambda machine, _: machine.last_in_tuple(1),
    "TUPLE2": lambda machine, _: machine.last_in_tuple(2),
    "TUPLE3": lambda machine, _: machine.last_in_tuple(3),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.group()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put_next,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "BINPERSID": _Machine.storage,
    "BUILD": _Machine.attributes,
}
