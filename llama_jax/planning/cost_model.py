"""The time of a program compiled for TPUs, from the compiler's own estimates of its instructions;
nothing is run.

Cycles of all scheduled instructions are added up, loops times their trip count. Kernels of
attention, of which the compiler knows nothing, and transfers between chips are added by their size.
Asynchronous transfers take turns on the links beside the products, and those between slices on the
network; what is not there when it is wanted is waited for.

Calibration: MaxText's published step of Llama 3.1 405B on 512 v5p took 131.5 s, its program,
  compiled in the same way, is
predicted at 119 to 125 s; Llama 3.1 8B on 64 v6e is published at 40.4 % of the peak and predicted
at 41.7 %.
"""

import collections
import math
import re
from typing import NamedTuple

from llama_jax.parallel.chips import Topology

# --- hlo ---
#
# Programs as XLA's compilers leave them, read from their text: computations, instructions, sizes.
#
# The text is that of a scheduled program: an instruction outside of fusions is a kernel, and the
# order is that of execution.


_BYTES: dict[str, float] = {
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s4": 0.5,
    "u4": 0.5,
}
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
        """The names of its operands."""
        return re.findall(
            r"%([\w.\-]+)", self.line.partition(f" {self.operation}(")[2].partition(")")[0]
        )

    @property
    def cycles(self) -> int:
        """The compiler's estimate of its time, in cycles of the chip's clock; 0 where there is
        none.
        """
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found.group(1)) if found else 0

    @property
    def meeting(self) -> str:
        """Of a transfer between slices, the name under which its ends find each other; else
        empty.
        """
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.line)
        return found.group(1) if found else ""

    @property
    def chain(self) -> str:
        """Of a part of a transfer that goes on inside of several kernels, the number of the
        transfer; else empty.
        """
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
        """How often the body of a `while` runs, `None` where the text does not say; it is taken to
        count from 0.
        """
        known = re.search(r'known_trip_count["\s:={]+n["\s:]+"?(\d+)', loop.line)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition")[0], [])
        fused = [
            inner
            for line in condition
            for name in line.called("calls")
            for inner in self.computations.get(name, [])
        ]
        bounds = next((found for found in map(_constants, (condition, fused)) if found), None)
        return math.ceil(max(bounds.values()) / self._stride(loop, condition)) if bounds else None

    def _stride(self, loop: Instruction, condition: list[Instruction]) -> int:
        """By how much a round of a loop moves the counter that its condition compares; 1 where the
        text does not say.
        """
        counters = [
            re.search(r"\), index=(\d+)", line.line)
            for line in condition
            if line.operation == "get-tuple-element"
        ]
        body = self.computations.get(loop.called("body")[0], [])
        constants, by_name = _constants(body), {line.name: line for line in body}
        if len(counters) != 1 or counters[0] is None or not body or body[-1].operation != "tuple":
            return 1
        moved = by_name.get(body[-1].operands[int(counters[0].group(1))])
        steps = (
            [constants[name] for name in moved.operands if name in constants]
            if moved and moved.operation == "add"
            else []
        )
        return steps[0] if steps and steps[0] > 0 else 1


def _constants(lines: list[Instruction]) -> dict[str, int]:
    """Whole numbers that stand in a computation, by name."""
    found = {line.name: re.search(r"[su]32\[\]\S* constant\((\d+)\)", line.line) for line in lines}
    return {name: int(constant.group(1)) for name, constant in found.items() if constant}


def sizes(result: str) -> list[float]:
    """Bytes of each array of a result's type."""
    found = _ARRAY.findall(result)
    return [
        _BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size)
        for dtype, dims in found
    ]


# --- cost model ---


CALIBRATION = (
    "two published trainings came out 5 to 10 % slower, and 3 % slower, than this "
    "predicts "
    "for their programs"
)
ATTENTION_SHARE = 0.6  # of the peak, that kernels of attention are taken to reach
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FETCHES = (
    "copy-start",
    "slice-start",
)  # asynchronous, between HBM and on-chip memory; the compiler takes them as free
_LARGE = 2**20  # bytes from which a copy inside of a loop is listed


class Prediction(NamedTuple):
    """What a compiled step is predicted to take, in seconds, on one chip.

    Attributes:
      compute: all scheduled instructions, and attention.
      attention: the kernels of attention, as a part of it.
      exposed: synchronous transfers between chips, which nothing hides.
      simulated: the whole step, waiting for asynchronous transfers included.
      forward_kernels: runs of the forward kernel of attention.
      backward_kernels: runs of its backward kernel for keys and values.
      collectives: by kind, how often each runs.
      moved: by kind, bytes.
      copies: copies of at least 1 MiB inside of loops, with how often they run.
      unknown_loops: loops of unknown length, counted once: with any, nothing here is to be
        believed.
    """

    compute: float
    attention: float
    exposed: float
    simulated: float
    forward_kernels: int
    backward_kernels: int
    collectives: dict[str, int]
    moved: dict[str, float]
    copies: dict[str, int]
    unknown_loops: int

    def shares(self, flops: float, peak: float) -> tuple[float, float, float]:
        """Utilisation by compute alone, with synchronous transfers exposed, and as simulated.

        Args:
          flops: of the model, one chip's part of a step.
          peak: FLOP/s of the chip.
        """
        return tuple(
            flops / peak / seconds
            for seconds in (self.compute, self.compute + self.exposed, self.simulated)
        )  # type: ignore[return-value]


class _Transfer(NamedTuple):
    """A collective operation: its kind, whether it runs beside the products, its time in seconds,
    and the name of its end.
    """

    kind: str
    asynchronous: bool
    bytes: float
    seconds: float
    name: str


class _Clock:
    """A pass over the schedule."""

    def __init__(
        self,
        program: Program,
        topology: Topology,
        kernel_seconds: float,
        longest: bool = True,
        fetches: bool = False,
    ) -> None:
        self.program, self.topology, self.chip = program, topology, topology.chip
        self._links = self.chip.link * self.chip.axes
        self._kernel_seconds = kernel_seconds  # of one product of attention in one run of a kernel
        self._longest, self._fetches = longest, fetches
        self.cycles = self.exposed = 0.0
        self.unknown = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.moved: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.copies: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()

    def run(self, name: str, times: int = 1, inside: bool = False) -> float:
        """Seconds of one run of a computation, which runs `times` in all."""
        now = links_free = network_free = memory_free = 0.0
        between: dict[str, float] = {}  # meeting of slices -> arrival of their data
        pending: dict[
            str, tuple[float | None, float]
        ] = {}  # name -> when it is there, or how long it takes once it begins
        for step in self.program.computations.get(name, []):
            now += self._inner(step, times)
            if step.operation in ("while", "conditional", "call"):
                continue
            now += step.cycles / self.chip.clock
            self.cycles += times * step.cycles
            now += self._kernel(step, times)
            self._note_copy(step, times, inside)
            transfer = self._transfer(step)
            if transfer:
                self.counts[transfer.kind] += times
                self.moved[transfer.kind] += times * transfer.bytes
            if transfer and not transfer.asynchronous:
                self.exposed += times * transfer.seconds
                now = links_free = max(now, links_free) + transfer.seconds
            elif transfer and step.operation == "call-start":  # begins with its update
                pending[step.name] = None, transfer.seconds
            elif transfer:
                links_free = max(links_free, now) + transfer.seconds
                pending[transfer.name] = links_free, 0.0
            if step.operation == "send" and step.meeting:
                network_free = between[step.meeting] = max(network_free, now) + self._sent(
                    step, times
                )
            elif step.operation == "recv" and step.meeting:
                pending[step.name] = between.get(step.meeting, now), 0.0
            elif self._fetches and step.operation in _FETCHES:
                memory_free = (
                    max(memory_free, now) + min(sizes(step.result)[:2]) / self.chip.bandwidth
                )
                pending[step.name] = memory_free, 0.0
            waited = next(
                (operand for operand in (*step.operands, self._ended(step)) if operand in pending),
                None,
            )
            if waited and (
                step.operation.endswith(("-update", "-done")) or waited == self._ended(step)
            ):
                ready, seconds = pending.pop(waited)
                if ready is None:
                    ready = links_free = max(links_free, now) + seconds
                if step.operation.endswith("-update"):
                    pending[step.name] = ready, 0.0
                else:
                    now = max(now, ready)
        return now

    def _sent(self, step: Instruction, times: int) -> float:
        """Seconds in which slices add up the data of a chip: each part of it goes round twice."""
        size, slices = sizes(step.result)[0], self.topology.slices
        self.counts["sum between slices"] += times
        self.moved["sum between slices"] += times * size
        return 2 * (slices - 1) / slices * size / self.chip.network

    def _inner(self, step: Instruction, times: int) -> float:
        """Seconds of the computations that an instruction runs."""
        if step.operation == "while":
            trips = self.program.trips(step)
            self.unknown += trips is None
            trips = trips or 1
            return trips * self.run(step.called("body")[0], times * trips, True)
        if step.operation == "conditional":
            return self.run(self._branch(step), times, True)
        return (
            self.run(step.called("to_apply")[0], times, True) if step.operation == "call" else 0.0
        )

    def _branch(self, step: Instruction) -> str:
        """The branch of a conditional that counts."""
        named = [
            name for role in ("true_computation", "false_computation") for name in step.called(role)
        ]
        alone = {
            name: _Clock(
                self.program, self.topology, self._kernel_seconds, self._longest, self._fetches
            ).run(name)
            for name in named or step.called("branch_computations")
        }
        return (max if self._longest else min)(alone, key=lambda name: alone[name])

    def _kernel(self, step: Instruction, times: int) -> float:
        """Seconds of a kernel of attention: two products forward, five backward, in two kernels of
        two and a half.
        """
        if (
            step.operation != "custom-call"
            or "tpu_custom_call" not in step.line
            or "splash" not in step.name
        ):
            return 0.0
        backward = "dkv" in step.name or "dq" in step.name
        self.kernels["dkv" if "dkv" in step.name else "dq" if "dq" in step.name else "forward"] += (
            times
        )
        return self._kernel_seconds * (2.5 if backward else 2)

    def _note_copy(self, step: Instruction, times: int, inside: bool) -> None:
        large = max(sizes(step.result), default=0) > _LARGE
        if inside and large and step.operation in ("copy", "copy-start", "transpose"):
            self.copies[f"{step.operation} {step.result.split(' ')[0][:60]}"] += times

    def _transfer(self, step: Instruction) -> _Transfer | None:
        """The transfer that an instruction makes or begins, itself or inside of a called
        computation.
        """
        base = step.operation.removesuffix("-start")
        if base in COLLECTIVES:
            return self._priced(base, step, step, step.operation.endswith("-start"))
        if step.operation not in ("fusion", "async-start", "call-start"):
            return None
        inner = self._largest(step)
        if inner is None:
            return None
        kind = inner.operation.removesuffix("-start")
        fused = step.operation == "fusion"
        if (
            fused and inner.chain
        ):  # goes on inside of products, piece by piece, from where it is begun
            begun = "AsyncCollectiveStart" in self._targets(step)
            return (
                self._priced(kind, inner, step, True)._replace(name=_chain(inner))
                if begun
                else None
            )
        return self._priced(
            "fused reduce-scatter" if fused and kind == "all-reduce" else kind,
            inner,
            step,
            not fused,
        )

    def _largest(self, step: Instruction) -> Instruction | None:
        """The largest collective operation inside of what an instruction calls."""
        found = []
        for name in (
            name
            for role in ("calls", "to_apply", "called_computations")
            for name in step.called(role)
        ):
            for inner in self.program.computations.get(name, []):
                if inner.operation.removesuffix("-start") in COLLECTIVES:
                    found.append(inner)
                elif inner.operation in ("fusion", "call", "async-start"):
                    found += [deeper for deeper in [self._largest(inner)] if deeper]
        return max(found, key=lambda inner: sum(sizes(inner.result)), default=None)

    def _targets(self, step: Instruction) -> set[str]:
        """What the custom calls in a fusion run."""
        return {
            inner.target
            for name in step.called("calls")
            for inner in self.program.computations.get(name, [])
        }

    def _ended(self, step: Instruction) -> str:
        """The name of the transfer inside of products that an instruction waits for; empty for
        others.
        """
        if step.operation != "fusion" or "AsyncCollectiveDone" not in self._targets(step):
            return ""
        inner = self._largest(step)
        return _chain(inner) if inner else ""

    def _priced(
        self, kind: str, inner: Instruction, step: Instruction, asynchronous: bool
    ) -> _Transfer:
        found = sizes(inner.result)
        whole = (
            max(found, default=0.0)
            if kind == "collective-permute" or (kind == "all-gather" and asynchronous)
            else sum(found)
        )
        if kind == "reduce-scatter":
            whole *= max(inner.group, 1)
        speed = self.chip.link if kind == "collective-permute" else self._links
        seconds = whole * (2 if kind == "all-reduce" else 1) / speed
        return _Transfer(
            f"{'asynchronous' if asynchronous else 'synchronous'} {kind}",
            asynchronous,
            whole,
            seconds,
            step.name,
        )


def _chain(inner: Instruction) -> str:
    return f"chain {inner.chain}"


def predict(text: str, topology: Topology, attention_product: float) -> Prediction:
    """The time of a compiled training step.

    Args:
      text: of the compiled program, `compiled.as_text()`.
      topology: that it was compiled for.
      attention_product: FLOPs of one matrix product of causal attention, all layers, one chip's
        part.
    """
    program = Program(text)
    first = _Clock(program, topology, 0.0)
    first.run(program.entry)
    backward = max(first.kernels["dkv"], 1)
    each = attention_product / backward / topology.chip.peak / ATTENTION_SHARE
    # Again, with the time of attention in the schedule, so that transfers hide behind it.
    return _prediction(_Clock(program, topology, each), program.entry, each)


def predict_round(text: str, topology: Topology, longest: bool = False) -> Prediction:
    """The time of one round of the longest loop of a program, such as one step of decoding.

    Most of that is to move weights, also ahead of the products that want them: these take turns on
    the memory, at its nominal bandwidth, beside everything else. (In training they hide, and are
    not counted, as they were not for the calibration.)

    Args:
      text: of the compiled program.
      topology: that it was compiled for.
      longest: whether the longest branch of a conditional counts; otherwise the shortest, as when
        all rows are greedy.
    """
    program = Program(text)
    bodies = [
        step.called("body")[0]
        for step in program.computations[program.entry]
        if step.operation == "while"
    ]
    body = max(bodies, key=lambda name: len(program.computations[name]))
    return _prediction(_Clock(program, topology, 0.0, longest, fetches=True), body)


def _prediction(clock: _Clock, name: str, kernel_seconds: float = 0.0) -> Prediction:
    """What one run of a computation takes."""
    simulated = clock.run(name)
    attention = kernel_seconds * (
        2 * clock.kernels["forward"] + 2.5 * (clock.kernels["dkv"] + clock.kernels["dq"])
    )
    return Prediction(
        clock.cycles / clock.chip.clock + attention,
        attention,
        clock.exposed,
        simulated,
        clock.kernels["forward"],
        clock.kernels["dkv"],
        dict(clock.counts),
        dict(clock.moved),
        dict(clock.copies),
        clock.unknown,
    )
