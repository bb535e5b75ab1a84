"""Reads programs compiled for TPU: what the decoding loop writes to device memory, and how many
kernels it starts.

The text is that of a scheduled program: an instruction outside of fusions is a kernel, its result
is in device memory unless the layout says `S(n)`, which is memory on the chip.
"""

import re

from llama_jax.planning import cost_model as hlo
from llama_jax.planning.cost_model import Instruction

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
# Names for what is there already, loops and branches (their bodies are read), and starts (their
# ends are read).
NO_KERNEL = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
}
IN_PLACE = {"dynamic-update-slice"}
BODIES = ("body", "branch_computations", "true_computation", "false_computation", "to_apply")
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


class Program(hlo.Program):
    """The computations of a compiled program that is a loop."""

    def loop(self) -> str:
        """The body of the loop that is the program."""
        (body,) = [
            i.called("body")[0] for i in self.computations[self.entry] if i.operation == "while"
        ]
        return body

    def kernels(self, computation: str) -> list[Instruction]:
        """Instructions of a computation with those of loops and branches in it, not those inside of
        fusions.
        """
        found = []
        for instruction in self.computations[computation]:
            found.append(instruction)
            inner = [name for role in BODIES for name in instruction.called(role)]
            if instruction.operation in ("while", "conditional", "call"):
                found += [kernel for name in inner for kernel in self.kernels(name)]
        return found

    def updates_in_place(self, instruction: Instruction) -> bool:
        """Whether it changes a few places of an array that is there already."""
        roots = [self.computations[name][-1].operation for name in instruction.called("calls")]
        return bool(IN_PLACE & {instruction.operation, *roots})

    def written(self, least: int) -> list[str]:
        """Arrays of at least so many bytes that one round of the loop writes to device memory,
        whole.

        Without those that the compiler itself moved onto the chip and writes back: whether it pays
        is its own reckoning.
        """
        kernels = self.kernels(self.loop())
        back = {
            k.name for k in kernels if k.operation == "copy-start" and len(arrays(k.result)) == 1
        }
        written = [
            k
            for k in kernels
            if k.operation not in NO_KERNEL and not k.operation.endswith("-start")
        ]
        written = [k for k in written if not (self.updates_in_place(k) or set(k.operands) & back)]
        return [
            f"{k.operation} {array}"
            for k in written
            for array, size in arrays(k.result)
            if size >= least
        ]

    def gathered(self, least: int) -> list[str]:
        """Results of at least so many bytes of collective operations in the loop."""
        kernels = [k for k in self.kernels(self.loop()) if k.operation.startswith(COLLECTIVES)]
        return [
            f"{k.operation} {array}"
            for k in kernels
            for array, size in arrays(k.result, "")
            if size >= least
        ]

    def sequence_kernels(self) -> int:
        """Kernels that the loop starts in one round for changing places of arrays, and whatever
        loops in it do beside that.
        """
        found = 0
        for instruction in self.computations[self.loop()]:
            if instruction.operation == "while":
                inner = self.computations[instruction.called("body")[0]]
                found += (self.trips(instruction) or 1) * sum(i.cycles > 0 for i in inner)
            found += self.updates_in_place(instruction)
        return found


def arrays(result: str, memory: str = r"(?![^}]*S\(\d)") -> list[tuple[str, int]]:
    """The arrays of a result type that lie in device memory, with their bytes."""
    found = []
    for dtype, sizes in re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]\{{{memory}", result):
        size = BYTES[dtype]
        for dimension in filter(None, sizes.split(",")):
            size *= int(dimension)
        found.append((f"{dtype}[{sizes}]", size))
    return found


def summed_weights(text: str) -> list[str]:
    """Matrices of 1 MiB or more that layers of a training step sum over devices and leave whole on
    every one: gradients.
    """
    found = []
    for instructions in Program(text).computations.values():
        sums = [
            i
            for i in instructions
            if i.operation in ("all-reduce", "all-reduce-start") and "/layers/" in i.line
        ]
        found += [
            f"{i.name} {array}"
            for i in sums
            for array, size in arrays(i.result)
            if size >= 2**20 and array.count(",") == 1
        ]
    return found
