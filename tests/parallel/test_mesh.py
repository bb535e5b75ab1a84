"""Meshes over chips that are described and not there: every slice, several of them, and each config
for pods.
"""

import dataclasses
import itertools
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from llama_jax.cli.plan import config_job, read_config
from llama_jax.errors import InputError
from llama_jax.parallel.chips import Topology, parse_topology
from llama_jax.parallel.mesh import across_slices, make_mesh

PODS = pathlib.Path(__file__).parents[2] / "configs" / "pods"
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@dataclasses.dataclass(
    frozen=True, eq=False
)  # each is itself: a mesh compares them with other devices
class Chip:
    """A device as far as a mesh looks at it; checks of types take it for one."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0

    __class__ = property(lambda self: jax.Device)  # type: ignore[assignment]


def chips(topology: Topology) -> list[Chip]:
    sizes = (*topology.shape, 1)[:3]
    places = itertools.product(range(topology.slices), *(range(size) for size in reversed(sizes)))
    return [
        Chip(number, place[0], place[:0:-1], KINDS[topology.chip.name], process_index=number // 4)
        for number, place in enumerate(places)
    ]


def arranged(text: str, data=1, fsdp=-1, tensor=1, context=1) -> np.ndarray:
    return make_mesh(data, fsdp, tensor, chips(parse_topology(text)), context).devices


def topology_of(path: pathlib.Path) -> Topology:
    found = re.search(r"--topology (\S+)", path.read_text("utf8"))
    assert found
    return parse_topology(found[1])


TPU_PODS = [path.name for path in sorted(PODS.glob("*.yaml")) if topology_of(path).chip.axes]


@pytest.mark.parametrize("name", TPU_PODS)
def test_the_mesh_of_each_config_for_pods_can_be_laid_out(name):
    topology = topology_of(PODS / name)
    mesh = config_job(read_config(PODS / name), topology).mesh
    found = make_mesh(mesh.data, mesh.fsdp, mesh.tensor, chips(topology), mesh.context)
    assert tuple(found.shape.values()) == (mesh.data, mesh.fsdp, mesh.context, mesh.tensor)
    assert len({chip.id for chip in found.devices.flat}) == topology.chips


@pytest.mark.parametrize(
    ("text", "tensor"),
    [
        ("v5e:4x4", 8),
        ("v5e:16x16", 8),
        ("v6e:16x16", 4),
        ("v5p:4x8x8", 2),
        ("v5p:4x8x8", 4),
        ("v6e:8x8", 2),
    ],
)
def test_an_axis_that_is_no_axis_of_the_slice_is_a_block_of_it(text, tensor):
    """All chips of a group are near: the longest way inside of one is that of a block of its
    size.
    """
    for group in arranged(text, tensor=tensor).reshape(-1, tensor):
        sides = [max(axis) - min(axis) + 1 for axis in zip(*(chip.coords for chip in group))]
        assert math.prod(sides) == tensor


@pytest.mark.parametrize(
    ("text", "sizes"), [("2xv5e:4x4", (2, 16)), ("4xv5e:2x2", (8, 2)), ("2xv5p:4x4x4", (2, 16, 4))]
)
def test_data_goes_across_slices(text, sizes):
    found = arranged(text, *sizes)
    slices = parse_topology(text).slices
    for index, part in enumerate(np.split(found, slices)):
        assert {chip.slice_index for chip in part.flat} == {index}
    assert len({chip.id for chip in found.flat}) == found.size


def test_slices_keep_the_order_that_one_of_them_has():
    one, two = arranged("v5e:4x4", 1, 16), arranged("2xv5e:4x4", 2, 16)
    assert [[chip.coords for chip in part.flat] for part in two] == [
        [chip.coords for chip in one.flat]
    ] * 2


def test_fsdp_goes_across_slices_where_data_does_not():
    found = arranged("4xv5e:2x2", 2, 8)
    assert [[chip.slice_index for chip in part.flat] for part in found] == [
        [0] * 4 + [1] * 4,
        [2] * 4 + [3] * 4,
    ]


def test_axes_are_cut_from_the_outside_in():
    assert across_slices((2, 8, 1, 4), 2) == (2, 1, 1, 1)
    assert across_slices((6, 8, 1, 4), 4) == (2, 2, 1, 1)
    assert across_slices((1, 8, 2, 1), 16) == (1, 8, 2, 1)
    with pytest.raises(
        InputError, match=r"data 3 \* fsdp 8 .* 5 slices; set mesh.data to 5 or a multiple"
    ):
        across_slices((3, 8, 1, 1), 5)


def test_slices_of_unlike_size_are_refused():
    devices = chips(parse_topology("2xv5e:2x2"))[:-1]
    with pytest.raises(InputError, match="4 in slice 0, 3 in slice 1"):
        make_mesh(1, 7, 1, devices)
