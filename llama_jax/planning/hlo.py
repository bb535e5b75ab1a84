"""Programs as XLA's compilers leave them, read from their text: computations, instructions, sizes.

The text is that of a scheduled program: an instruction outside of fusions is a kernel, and the order is that of execution.
"""

import math
import re
from typing import NamedTuple

_BYTES: dict[str, float] = {
    "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a program: its name, its result's type, its operation, and the line."""

    name: str
    result: str
    operation: str
    line: str

    def called(self, role: str) -> list[str]:
        """The computations it calls as `role`."""
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.line)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []

    @property
    def operands(self) -> list[str]:
        """The names of what it works on."""
        return re.findall(r"%([\w.\-]+)", self.line.partition(f" {self.operation}(")[2].partition(")")[0])

    @property
    def cycles(self) -> int:
        """The compiler's estimate of its time, in cycles of the chip's clock; 0 where there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found.group(1)) if found else 0

    @property
    def meeting(self) -> str:
        """Of a transfer between slices, the name under which its ends find each other; else empty."""
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.line)
        return found.group(1) if found else ""

    @property
    def chain(self) -> str:
        """Of a part of a transfer that goes on inside of several kernels, the number of the transfer; else empty."""
        found = re.search(r'chain_id="(\d+)"', self.line)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """What a custom call runs; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.line)
        return found.group(1) if found else ""

    @property
    def group(self) -> int:
        """Devices of one group of a collective operation; 0 where the line does not say."""
        named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.line)
        if named:
            sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", named.group(1)))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
        listed = re.search(r"replica_groups=\[\d+,(\d+)\]|replica_groups=\{\{([\d,]+)\}", self.line)
        if not listed:
            return 0
        return int(listed.group(1)) if listed.group(1) else len(listed.group(2).split(","))


class Program:
    """The computations of a compiled program by name, and which of them is the entry."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
            if head:
                current = self.computations[head.group(2)] = []
                self.entry = head.group(2) if head.group(1) else self.entry
            body = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
            if body:
                current.append(Instruction(body.group(1), body.group(2), body.group(3), line))

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, `None` where the text does not say; it is taken to count from 0."""
        known = re.search(r'known_trip_count["\s:={]+n["\s:]+"?(\d+)', loop.line)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition")[0], [])
        fused = [inner for line in condition for name in line.called("calls") for inner in self.computations.get(name, [])]
        bounds = next((found for found in map(_constants, (condition, fused)) if found), None)
        return math.ceil(max(bounds.values()) / self._stride(loop, condition)) if bounds else None

    def _stride(self, loop: Instruction, condition: list[Instruction]) -> int:
        """By how much a round of a loop moves the counter that its condition compares; 1 where the text does not say."""
        counters = [re.search(r"\), index=(\d+)", line.line) for line in condition if line.operation == "get-tuple-element"]
        body = self.computations.get(loop.called("body")[0], [])
        constants, by_name = _constants(body), {line.name: line for line in body}
        if len(counters) != 1 or counters[0] is None or not body or body[-1].operation != "tuple":
            return 1
        moved = by_name.get(body[-1].operands[int(counters[0].group(1))])
        steps = [constants[name] for name in moved.operands if name in constants] if moved and moved.operation == "add" else []
        return steps[0] if steps and steps[0] > 0 else 1


def _constants(lines: list[Instruction]) -> dict[str, int]:
    """Whole numbers that stand in a computation, by name."""
    found = {line.name: re.search(r"[su]32\[\]\S* constant\((\d+)\)", line.line) for line in lines}
    return {name: int(constant.group(1)) for name, constant in found.items() if constant}


def sizes(result: str) -> list[float]:
    """Bytes of each array of a result's type."""
    found = _ARRAY.findall(result)
    return [_BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size) for dtype, dims in found]
