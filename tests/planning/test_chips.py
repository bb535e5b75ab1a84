"""Topologies as people write them, and the figures of chips against published ones."""

import itertools

import pytest

from llama_jax.errors import InputError
from llama_jax.parallel.chips import CHIPS, chip_of, common_topologies, parse_topology
from llama_jax.planning.job import MeshSizes, parse_mesh


@pytest.mark.parametrize(
    ("text", "chips", "slices"),
    [
        ("v4:4x4x4", 64, 1),
        ("v5e:4x4", 16, 1),
        ("v5p:4x4x8", 128, 1),
        ("v6e:8x8", 64, 1),
        ("2xv5p:4x4x8", 256, 2),
        ("v5p:2x2x1", 4, 1),
        ("v5p:8x16x16", 2048, 1),
        ("v5e:16x16", 256, 1),
        ("4xv6e:16x16", 1024, 4),
        ("h100:8", 8, 1),
        ("2x v5e:4x4", 32, 2),
        ("h200:1", 1, 1),
        ("a100:64", 64, 1),
        ("V5P:4x4x4", 64, 1),
    ],
)
def test_chips_are_counted(text, chips, slices):
    topology = parse_topology(text)
    assert (topology.chips, topology.slices) == (chips, slices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5p-256", "CHIP:SHAPE such as v5p:4x4x8"),
        ("", "CHIP:SHAPE"),
        ("v5p:4x4", "2 sizes given, 3 expected, as in v5p:4x4x8"),
        ("v5e:4x4x4", "3 sizes given, 2 expected"),
        ("v5p:4x4x5", "no such slice"),
        ("v5e:3x3", "no such slice; 1x1, 2x2"),
        ("v5p:8x4x4", "rising multiples of 4"),
        ("v5p:16x16x28", "at most 6,144 chips"),
        ("v5q:4x4x4", "the nearest is v5"),
        ("h100:3", "1, 2, 4 or a multiple of 8"),
        ("2xh100:8", "a number of GPUs"),
        ("h100:8x8", "a number of GPUs"),
        ("h100:0", "1 or more"),
        ("0xv5p:4x4x4", "1 or more"),
        ("rtx4090:1", "chip rtx4090 is unknown; v4, v5e"),
    ],
)
def test_what_cannot_be_had_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_topology(text)


def test_links_of_a_cube_are_the_three_axes_both_ways():
    """Llama 3 8B on v5p:4x4x4 moves 44 GB in 81 ms of link time, by the compiler's schedule: 543
    GB/s.
    """
    assert parse_topology("v5p:4x4x4").link == pytest.approx(44e9 / 81e-3, rel=0.01)
    assert parse_topology("v6e:8x8").link == 180e9  # a mesh without rings: one way along two axes
    assert parse_topology("v5e:16x16").link == 180e9
    assert parse_topology("h100:8").link == 450e9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_recognised(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_every_chip_has_a_peak_and_every_common_topology_exists():
    for chip in CHIPS:
        assert chip.peak > 1e14
        assert 0 < chip.share < 1
        sizes = [topology.chips for topology in common_topologies(chip)]
        assert all(large == 2 * small or small == 1 for small, large in itertools.pairwise(sizes))


def test_meshes_are_completed():
    assert parse_mesh(None, parse_topology("v5p:4x4x8")) == MeshSizes(fsdp=128)
    assert parse_mesh(None, parse_topology("2xv5p:4x4x8")) == MeshSizes(data=2, fsdp=128)
    assert parse_mesh("tensor=4", parse_topology("v5p:4x4x8")) == MeshSizes(fsdp=32, tensor=4)
    assert parse_mesh("tensor=4", parse_topology("2xv5p:4x4x8")) == MeshSizes(
        data=2, fsdp=32, tensor=4
    )
    assert parse_mesh("fsdp=32, context=4", parse_topology("v5p:4x4x8")) == MeshSizes(
        fsdp=32, context=4
    )
    assert parse_mesh("data=-1,fsdp=4", parse_topology("h100:8")) == MeshSizes(data=2, fsdp=4)
    assert parse_mesh("fsdp=4", parse_topology("h100:8")) == MeshSizes(data=2, fsdp=4)
    assert parse_mesh("fsdp=256", parse_topology("2xv5p:4x4x8")) == MeshSizes(fsdp=256)


@pytest.mark.parametrize(
    "text",
    [
        "fsdp=3",
        "fsdp=256",
        "pipeline=2",
        "fsdp",
        "fsdp=0",
        "fsdp=-2",
        "fsdp=-1,data=-1",
        "fsdp=2,data=2",
    ],
)
def test_meshes_that_do_not_fit_are_refused(text):
    with pytest.raises(InputError, match="mesh '"):
        parse_mesh(text, parse_topology("v5p:4x4x8"))
