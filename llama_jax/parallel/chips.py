"""What chips hold and move, and how they are put together: one table with its sources, and the
parser of topologies.

The peaks are those of `llama_jax.parallel.chips`. Memory is the part that a program can have, which
is less than the nominal size.
"""

import difflib
import math
import re
from typing import NamedTuple

from llama_jax.errors import InputError

# --- peak ---
#
# What a device can do at best: the denominator of model FLOPs utilisation (MFU).


# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its `device_kind`; the first that
# fits counts. TPUs: cloud.google.com/tpu/docs, by chip; v2, v3 and 7x show each of a chip's two
# cores as a device of its own.
# GPUs: NVIDIA's data sheets, without sparsity.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 45e12 / 2),
    ("TPU v3", 123e12 / 2),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p, under both of its names
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA GH200", 989.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in dense bfloat16 products; `None` for a CPU and for a device that is
    not in the table.

    Args:
      device_kind: as `jax.Device.device_kind` has it, such as `TPU v5 lite` or `NVIDIA H100 80GB
        HBM3`.
    """
    return next((peak for name, peak in _PEAKS if device_kind.startswith(name)), None)


# --- chips ---


GIB = 2**30


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      name: as in a topology.
      kind: the beginning of its `device_kind` in JAX.
      memory: bytes that a program can have.
      bandwidth: bytes/second between chip and memory.
      link: bytes/second to other chips: of a TPU one axis of the torus in both directions, of a GPU
        NVLink one way.
      network: bytes/second and chip between slices or nodes.
      share: of the peak, to be expected of all products that are computed; an assumption, see
        `source`.
      source: the published training that the share is taken from.
      axes: dimensions of the topology; 0 for GPUs, which are counted.
      ring: an axis is closed to a ring where its size is a multiple of this.
      largest: chips of one slice, or GPUs of one node.
      clock: cycles a second in which its compiler counts; 0 where that is not known.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    link: float
    network: float
    share: float
    source: str
    axes: int
    ring: int
    largest: int
    clock: float = 0.0

    @property
    def peak(self) -> float:
        """FLOP/s in dense bfloat16 products."""
        peak = peak_flops(self.kind)
        if peak is None:
            raise InputError(f"chip {self.name}: its peak is not known")
        return peak


# TPU memory: what XLA's compiler for TPUs allows a program (v5p 95.7 GiB, v6e 31.25 GiB, v5e 15.75
#   GiB), v4 by its label less
# the same reserve. GPU memory: 95 % of what the driver leaves (78, 139, 79 GiB), as with
# XLA_PYTHON_CLIENT_MEM_FRACTION=.95; JAX itself takes 75 %. Bandwidths: cloud.google.com/tpu/docs
# by chip; links and data-centre network of TPUs: "How to scale your model"
# (jax-ml.github.io/scaling-book/tpus), one axis in both
#   directions; GPUs: NVIDIA's data sheets, network of one
# 400 Gb/s adapter a GPU (A100: 200 Gb/s).
# Shares: causal model FLOPs of a published training over peak. They are applied to recomputed
#   products too, so that what is
# expected is rather too slow than too fast.
CHIPS: tuple[Chip, ...] = (
    Chip(
        "v4",
        "TPU v4",
        31.25 * GIB,
        1.228e12,
        90e9,
        6.25e9,
        0.53,
        "MaxText, 22B on v4: 56.7 % with attention counted in full",
        3,
        4,
        4096,
    ),
    Chip(
        "v5e",
        "TPU v5e",
        15.75 * GIB,
        0.819e12,
        90e9,
        3.125e9,
        0.56,
        "AXLearn, 70B on 1,024 v5e: 59.9 % with attention counted in full",
        2,
        16,
        256,
        1.5e9,
    ),
    Chip(
        "v5p",
        "TPU v5p",
        102.8e9,
        2.765e12,
        180e9,
        6.25e9,
        0.646,
        "MaxText, Llama 2 70B on 512 v5p: 64.6 %",
        3,
        4,
        6144,
        1.75e9,
    ),
    Chip(
        "v6e",
        "TPU v6",
        31.25 * GIB,
        1.638e12,
        180e9,
        12.5e9,
        0.41,
        "MaxText, Llama 3.1 on v6e: 40.4 % (8B), 47.0 % (70B), 41.1 % (405B)",
        2,
        16,
        256,
        1.75e9,
    ),
    Chip(
        "a100",
        "NVIDIA A100",
        0.95 * 79 * GIB,
        2.039e12,
        300e9,
        25e9,
        0.50,
        "TinyLlama 1.1B on A100: 52 % as reported",
        0,
        1,
        8,
    ),
    Chip(
        "h100",
        "NVIDIA H100",
        0.95 * 78 * GIB,
        3.35e12,
        450e9,
        50e9,
        0.478,
        "MaxText, Llama 3 70B on 128 H100: 47.8 %; Llama 2 7B on 8: 49.2 %",
        0,
        1,
        8,
    ),
    Chip(
        "h200",
        "NVIDIA H200",
        0.95 * 139 * GIB,
        4.8e12,
        450e9,
        50e9,
        0.479,
        "MaxText, Llama 3 70B on H200: 47.9 %",
        0,
        1,
        8,
    ),
)
# Slices that can be had, by the documentation of each chip. From a cube of 4x4x4 on, v4 and v5p
# take any multiples of 4.
_SMALL_SHAPES: dict[str, set[tuple[int, ...]]] = {
    "v4": {(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)},
    "v5p": {(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)},
    "v5e": {(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)},
    "v6e": {(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)},
}
_CUBES = [(4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16)]


class Topology(NamedTuple):
    """Chips that train or decode together.

    Attributes:
      name: as it was given.
      chip: of which kind.
      shape: of one slice; of GPUs their number.
      slices: joined by the network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """In all."""
        return self.slices * math.prod(self.shape)

    @property
    def near(self) -> int:
        """Chips that the links join: those of a slice, or of a node."""
        return math.prod(self.shape) if self.chip.axes else min(self.chips, self.chip.largest)

    @property
    def link(self) -> float:
        """Bytes a second that a chip takes in over all its links; an axis that is no ring counts
        one way only.
        """
        if not self.chip.axes:
            return self.chip.link
        rings = [1.0 if size % self.chip.ring == 0 else 0.5 for size in self.shape if size > 1]
        return self.chip.link * max(sum(rings), 0.5)

    def along(self, count: int) -> float:
        """Bandwidth of a ring over `count` chips, in bytes/s: one direction only,
        unless they are a whole ring.
        """
        is_ring = not self.chip.axes or (count in self.shape and count % self.chip.ring == 0)
        return self.chip.link * (1.0 if is_ring else 0.5)


def chip_of(device_kind: str) -> Chip | None:
    """The chip with a `device_kind` of JAX; `None` for one that is not in the table.

    Kinds of another peak than the chip's (such as `NVIDIA H100 PCIe`) are not in the table.
    """
    peak = peak_flops(device_kind)
    of_family = [
        chip
        for chip in CHIPS
        if chip.peak == peak and device_kind.startswith(chip.kind.rpartition(" ")[0])
    ]
    closest = [chip for chip in of_family if device_kind.startswith(chip.kind)]
    return next(iter(closest or of_family), None)


def parse_topology(text: str) -> Topology:
    """Chips by kind and shape: `v5p:4x4x8`, `2xv5p:4x4x8` (two slices), `h100:8`.

    Raises:
      InputError: for a chip that is not in the table, and for a shape that cannot be had.
    """
    found = re.fullmatch(
        r"(?:(\d{1,4})x ?)?([a-z]+\d+[a-z]?):(\d{1,5}(?:x\d{1,5}){0,2})",
        text.strip().lower(),
        re.ASCII,
    )
    names = ", ".join(chip.name for chip in CHIPS)
    if found is None:
        raise InputError(
            f"topology {text!r:.60} given; CHIP:SHAPE such as v5p:4x4x8, 2xv5p:4x4x8 or "
            f"h100:8 expected ({names})"
        )
    slices, name, sizes = (
        int(found[1] or 1),
        found[2],
        tuple(int(size) for size in found[3].split("x")),
    )
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None:
        near = difflib.get_close_matches(name, [chip.name for chip in CHIPS], n=1)
        raise InputError(
            f"topology {text!r:.60}: chip {name} is unknown; "
            f"{f'the nearest is {near[0]}' if near else names}"
        )
    _require_shape(text, chip, sizes, slices)
    return Topology(text.strip(), chip, sizes, slices)


def common_topologies(chip: Chip) -> list[Topology]:
    """Slices, or numbers of GPUs, of one kind of chip, from small to large: each twice the one
    before.
    """
    if not chip.axes:
        return [parse_topology(f"{chip.name}:{2**power}") for power in range(11)]
    shapes = sorted(_SMALL_SHAPES[chip.name], key=math.prod) + (_CUBES if chip.axes == 3 else [])
    return [parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}") for shape in shapes]


def _require_shape(text: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> None:
    if slices < 1 or min(sizes) < 1:
        raise InputError(f"topology {text!r:.60}: sizes of 1 or more expected")
    if not chip.axes:
        _require_nodes(text, chip, sizes, slices)
        return
    example = {2: "4x4", 3: "4x4x8"}[chip.axes]
    if len(sizes) != chip.axes:
        raise InputError(
            f"topology {text!r:.60}: {len(sizes)} sizes given, {chip.axes} expected, as "
            f"in {chip.name}:{example}"
        )
    cubes = chip.axes == 3 and all(size % 4 == 0 for size in sizes)
    if cubes and list(sizes) == sorted(sizes) and math.prod(sizes) <= chip.largest:
        return
    if sizes not in _SMALL_SHAPES[chip.name]:
        shapes = sorted(_SMALL_SHAPES[chip.name], key=math.prod)
        known = ", ".join("x".join(map(str, shape)) for shape in shapes)
        more = (
            f", or three rising multiples of 4 with at most {chip.largest:,} chips"
            if chip.axes == 3
            else ""
        )
        raise InputError(f"topology {text!r:.60}: there is no such slice; {known}{more} expected")


def _require_nodes(text: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> None:
    whole = (
        len(sizes) == 1 and slices == 1 and (sizes[0] in (1, 2, 4) or sizes[0] % chip.largest == 0)
    )
    if not whole:
        raise InputError(
            f"topology {text!r:.60}: a number of GPUs, 1, 2, 4 or a multiple of "
            f"{chip.largest}, expected, as in "
            f"{chip.name}:8"
        )
