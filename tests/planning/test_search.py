"""What is advised fits, nothing of it can be left out, and it is ordered by time."""

import dataclasses
import itertools

import pytest

from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.job import Job, MeshSizes, parse_mesh
from llama_jax.planning.plan import (
    Change,
    Remedy,
    advice,
    best_remat,
    changed,
    devices_of,
    enough_chips,
    fastest,
    flags,
    is_out_of_memory,
    job_of,
    make_plan,
    outlook,
    remat_plans,
    remedies,
    wanted_bytes,
)
from llama_jax.presets import preset
from llama_jax.training.config import ComputeConfig, MeshConfig, TrainConfig
from llama_jax.training.config_sections import DataConfig, OptimizerConfig

CASES = [
    ("llama3.1-70b", "v5p:4x4x8", 4, "none"),
    ("llama3.1-8b", "v5e:4x4", 4, "none"),
    ("llama3.1-405b", "v5p:8x8x8", 1, "none"),
    ("llama3.1-8b", "h100:8", 8, "none"),
    ("llama3.2-1b", "h100:1", 32, "all"),
]


def plan_of(model: str, name: str, sequences: int, remat: str):
    topology = parse_topology(name)
    mesh = parse_mesh(None, topology)
    return make_plan(
        Job(preset(model), topology, mesh, 8192, sequences * mesh.sequences, remat=remat)
    )


QUICK = [CASES[0], CASES[3], CASES[4]]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id="-".join(map(str, case)), marks=[pytest.mark.slow] * (case not in QUICK)
        )
        for case in CASES
    ],
)
def test_remedies_fit_and_are_as_small_as_can_be(case):
    plan = plan_of(*case)
    assert not plan.fits
    found = remedies(plan)
    assert 1 <= len(found) <= 5
    steps = [remedy.plan.speed.step for remedy in found]
    assert steps == sorted(steps)
    for remedy in found:
        assert remedy.plan.fits
        for fewer in itertools.combinations(remedy.changes, len(remedy.changes) - 1):
            job = changed(plan.job, fewer)
            assert job is None or not make_plan(job).fits, fewer


def test_best_remat_is_the_fastest_that_fits():
    """By hand over the ladder: every setting that fits is slower, or as fast and larger."""
    job = plan_of("llama3.1-8b", "v5p:4x4x4", 2, "full").job
    best = dataclasses.replace(job, remat=best_remat(job))
    for other in remat_plans(job):
        assert not other.fits or other.speed.step >= make_plan(best).speed.step
    assert make_plan(best).fits


def test_a_job_that_fits_has_no_remedies_but_may_be_faster():
    plan = plan_of("llama3.1-70b", "v5p:4x4x8", 4, "full")
    assert plan.fits
    assert remedies(plan) == []
    faster = fastest(plan)
    assert faster.plan.fits
    assert faster.plan.speed.step < 0.98 * plan.speed.step
    assert fastest(faster.plan) is None


def test_another_optimizer_is_a_last_resort():
    """1B on one v5e: with AdamW's 12 bytes a parameter it is full. With bfloat16 moments in the
    config, those go too.
    """
    plan = plan_of("llama3.2-1b", "v5e:1x1", 1, "full")
    assert [flags(remedy, plan.job) for remedy in remedies(plan)] == ["--optimizer.name adafactor"]
    narrow = make_plan(dataclasses.replace(plan.job, moment_dtype="bfloat16"))
    assert [change.name for change in remedies(narrow)[0].changes] == ["optimizer", "moment_dtype"]
    assert all(
        change.name != "optimizer"
        for remedy in remedies(plan_of(*CASES[0]))
        for change in remedy.changes
    )


def test_where_nothing_helps_more_chips_are_named():
    plan = plan_of("llama3.1-405b", "h100:8", 1, "full")
    around = outlook(plan)
    assert around.remedies == []
    assert around.enough == enough_chips(plan)
    chips = around.enough.job.topology.chips
    assert around.enough.fits
    assert chips > 8
    assert plan_of("llama3.1-405b", f"h100:{chips // 2}", 1, "full").fits is False


def test_flags_are_keys_of_the_config():
    plan = plan_of("llama3.1-8b", "h100:8", 8, "none")
    mesh = MeshSizes(fsdp=4, tensor=2)
    remedy = Remedy(
        (Change("remat", "full"), Change("microbatches", 4), Change("mesh", mesh)), plan
    )
    typed = "--compute.remat full --data.accumulation 4 --mesh.fsdp 4 --mesh.tensor 2"
    assert flags(remedy, plan.job) == typed


CONFIG = TrainConfig(
    model=preset("llama3.1-8b"),
    compute=ComputeConfig(remat="none", loss_chunk=16384),
    mesh=MeshConfig(data=1, fsdp=-1),
    data=DataConfig(length=8192, batch_size=32, accumulation=2),
    optimizer=OptimizerConfig(name="lion", moments_dtype="bfloat16"),
)


def test_the_job_of_a_config():
    job = job_of(CONFIG, devices_of("NVIDIA H100 80GB HBM3", 8))
    assert job.topology.chip.name == "h100"
    assert job.mesh == MeshSizes(fsdp=8)
    assert (job.sequences, job.microbatches, job.chip_batch_size, job.remat) == (32, 2, 2, "none")
    assert (job.optimizer, job.moment_dtype, job.loss_chunk) == ("lion", "bfloat16", 16384)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5p", "a device of next year"])
def test_advice_is_a_few_lines_with_keys_of_the_config(kind):
    lines = advice(job_of(CONFIG, devices_of(kind, 8)))
    assert 2 <= len(lines) <= 3
    assert "by the closed form this training needs" in lines[0]
    assert lines[1].startswith("try --")
    assert "--compute.remat" in lines[1] or "--data.accumulation" in lines[1]


def test_advice_where_there_is_none():
    small = dataclasses.replace(
        CONFIG, compute=ComputeConfig(remat="full"), data=DataConfig(length=64, batch_size=1)
    )
    lines = advice(job_of(small, devices_of("NVIDIA H100 80GB HBM3", 1)), memory=8e9)
    assert len(lines) == 2
    assert "use more devices, adapters" in lines[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.",
            4294967296,
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 1.50GiB (1610612736B) on "
            "device ordinal 0",
            None,
        ),
        ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.00G.", None),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1,024 bytes.", 1024),
    ],
)
def test_errors_of_the_runtime_are_understood(text, wanted):
    assert is_out_of_memory(text)
    assert wanted is None or wanted_bytes(text) == wanted
    assert not is_out_of_memory("INVALID_ARGUMENT: No such compile option")
