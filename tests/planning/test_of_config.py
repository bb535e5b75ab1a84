"""Jobs of configs, what `compute.remat: auto` stands for, and that what a plan prints is what
`train.py` takes.
"""

import dataclasses
import pathlib

import pytest

from llama_jax.cli.arguments import parse_train
from llama_jax.model.remat import REMAT_POLICIES
from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.job import Job, MeshSizes, parse_mesh
from llama_jax.planning.plan import (
    TRAIN_KEYS,
    Change,
    devices_of,
    first_fitting_remat,
    flags,
    job_of,
    make_plan,
    outlook,
    remat_candidates,
)
from llama_jax.presets import preset
from llama_jax.training.config import ComputeConfig, MeshConfig, TrainConfig
from llama_jax.training.config_sections import DataConfig

NOWHERE = pathlib.Path("none.yaml")
BASE = pathlib.Path(__file__).parent.parent.parent / "configs" / "recipes" / "llama3.1-8b.yaml"


def job_on(name: str, model: str = "llama3.1-8b", sequences: int = 1, **changes) -> Job:
    topology = parse_topology(name)
    mesh = parse_mesh(None, topology)
    return Job(preset(model), topology, mesh, 8192, sequences * mesh.sequences, **changes)


def test_every_choice_of_a_job_has_a_key_of_the_config():
    words = [f"--{key}" for key in TRAIN_KEYS.values()]
    values = ("4096", "attention", "2", "1024", "lion", "bfloat16", "bfloat16", "16", "int8")
    typed = [word for pair in zip(words, values, strict=True) for word in pair]
    config = parse_train(["--config", str(BASE), "--run.init", "model", *typed], NOWHERE)
    job = job_of(config, parse_topology("h100:8"))
    assert tuple(str(getattr(job, field)) for field in TRAIN_KEYS) == values


@pytest.mark.parametrize(
    ("model", "name", "sequences"),
    [
        ("llama3.1-70b", "v5p:4x4x8", 4),
        ("llama3.1-8b", "h100:8", 8),
        ("llama3.2-1b", "h100:1", 4),
        pytest.param("llama3.1-8b", "v5e:4x4", 4, marks=pytest.mark.slow),
        pytest.param("llama3.1-70b", "v6e:16x16", 4, marks=pytest.mark.slow),
    ],
)
def test_every_printed_flag_is_taken_by_the_training(model, name, sequences):
    """Each remedy, read by the config's own parser on top of the job it is for, is the job that was
    promised.
    """
    plan = make_plan(job_on(name, model, sequences, remat="none"))
    around = outlook(plan)
    found = around.remedies + ([around.faster] if around.faster else [])
    assert found
    for remedy in found:
        job = plan.job
        base = {
            "data.length": job.length,
            "data.batch_size": job.sequences,
            "compute.loss_chunk": job.loss_chunk,
            "compute.remat": job.remat,
            "data.accumulation": 1,
        }
        base |= {f"mesh.{axis}": size for axis, size in job.mesh._asdict().items()}
        typed = [f"--{key}={value}" for key, value in base.items()] + flags(remedy, job).split()
        config = parse_train(["--config", str(BASE), "--model", model, *typed], NOWHERE)
        got = job_of(config, job.topology)
        assert dataclasses.replace(got, base_dtype=job.base_dtype) == remedy.plan.job


def test_the_first_rung_that_fits_is_the_highest():
    job = job_on("v5p:4x4x4", sequences=4)
    chosen = first_fitting_remat(job)
    above, at = (
        REMAT_POLICIES[: REMAT_POLICIES.index(chosen)],
        dataclasses.replace(job, remat=chosen),
    )
    assert above
    limit = 0.95 * job.topology.chip.memory
    assert make_plan(at, limit).fits
    assert not any(make_plan(dataclasses.replace(job, remat=remat), limit).fits for remat in above)
    assert first_fitting_remat(job, memory=1e12) == "none"
    assert first_fitting_remat(job, memory=1e9) == "full"


def test_auto_is_what_was_before_then_every_rung_that_may_fit():
    """The compiler is asked of those alone that the closed form does not refuse; `full` is what is
    left.
    """
    job = job_on("v5p:4x4x4", sequences=4)
    possible = tuple(
        remat for remat in REMAT_POLICIES if make_plan(dataclasses.replace(job, remat=remat)).fits
    )
    assert remat_candidates(job) == possible
    assert 1 < len(possible) < len(REMAT_POLICIES)
    assert possible[-1] == "full"
    assert remat_candidates(job, before="none") == possible  # too large
    assert remat_candidates(job, before="q+k") == ("q+k", *possible)
    assert remat_candidates(job, before="full") == (
        "full",
    )  # nothing behind it could fit where it does not
    assert remat_candidates(job, memory=1e9) == ("full",)
    assert remat_candidates(job, memory=1e12) == REMAT_POLICIES


def test_a_kind_of_device_that_is_not_known_keeps_least():
    config = TrainConfig(
        model=preset("llama3.2-1b"),
        compute=ComputeConfig(remat="auto"),
        mesh=MeshConfig(1, -1),
        data=DataConfig(length=4096, batch_size=8),
    )
    job = job_of(config, devices_of("a device of next year", 8))
    assert job.remat == "full"
    assert remat_candidates(job) == ("full",)
    assert remat_candidates(job, before="context") == ("context",)
    assert remat_candidates(job, memory=1e12) == REMAT_POLICIES


def test_the_mesh_of_a_job_stores_weights_over_context_too():
    mesh = MeshSizes(data=2, fsdp=4, tensor=2, context=2)
    assert (mesh.sequences, mesh.stored) == (8, 8)
    assert flags_of(mesh, MeshSizes(data=2, fsdp=8, tensor=2)) == "--mesh.fsdp 4 --mesh.context 2"


def flags_of(mesh: MeshSizes, now: MeshSizes) -> str:
    from llama_jax.planning.plan import Remedy

    job = Job(preset("llama3.1-8b"), parse_topology("h100:32"), now, 8192, 16)
    return flags(Remedy((Change("mesh", mesh),), make_plan(job)), job)
