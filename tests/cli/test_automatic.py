"""`compute.remat: auto`: resolved before the run, told in its heading, kept in its config; on
accelerators by the plan.

What it is on a CPU, which has no such plan, is in `test_train.py`.
"""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import tiny_config, write_corpus, write_yaml

from llama_jax.cli import train as automatic
from llama_jax.cli.train import candidates, compiled_bytes, first_that_fits, main, write_config
from llama_jax.data.packing import empty_batch
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.presets import preset
from llama_jax.training import step
from llama_jax.training.config import ComputeConfig, MeshConfig, RunConfig, TrainConfig, with_remat
from llama_jax.training.config_sections import AdapterConfig, DataConfig
from llama_jax.training.setup import frozen_base, frozen_shapes, make_recipe, run_mesh
from llama_jax.training.step import batch_sharding, micro_batches, sharded_init, sharded_step
from llama_jax.weights.open import open_model


@pytest.fixture
def h100(monkeypatch):
    """Eight devices that say that they are H100s; the memory that one has for a program."""
    memory = {"bytes_limit": 0.9 * 79e9}
    device = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: memory
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    return memory


def config_in(directory: pathlib.Path, remat: str = "auto") -> TrainConfig:
    return TrainConfig(
        run=RunConfig(dir=str(directory)),
        model=preset("llama3.1-8b"),
        mesh=MeshConfig(data=1, fsdp=-1),
        compute=ComputeConfig(dtype="bfloat16", remat=remat),
        data=DataConfig(length=8192, batch_size=16),
    )


def first_of(config: TrainConfig, going_on: bool = False) -> str:
    return candidates(config, Hosts(), going_on)[0]


def test_it_follows_the_memory_that_a_device_has_for_the_program(h100, tmp_path):
    config = config_in(tmp_path)
    assert first_of(config) == "attention"
    h100["bytes_limit"] = 30e9
    assert first_of(config) == "full"
    h100["bytes_limit"] = 1e12
    assert first_of(config) == "none"
    assert candidates(config_in(tmp_path, "q+k"), Hosts(), False) == ("q+k",)


def test_a_run_that_goes_on_tries_what_it_had_first(h100, tmp_path):
    config = config_in(tmp_path)
    assert first_of(config, going_on=True) == "attention"  # nothing is written down
    write_config(config_in(tmp_path, "outputs"), tmp_path / "config.yaml")
    assert first_of(config, going_on=True) == "outputs"
    assert first_of(config, going_on=False) == "attention"
    (tmp_path / "config.yaml").write_text("compute: [")
    assert first_of(config, going_on=True) == "attention"


def test_process_0_decides_what_is_tried(h100, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Hosts, "agree", lambda self, name, value: "outputs full" if name == "remat" else value
    )
    assert candidates(config_in(tmp_path), Hosts(), False) == ("outputs", "full")


@pytest.fixture
def small_devices(monkeypatch):
    """Devices that say that they have so many bytes; programs are compiled for those at hand. Set
    `memory["bytes"]`.
    """
    memory: dict[str, float] = {}
    here = automatic.job_here
    monkeypatch.setattr(automatic, "job_here", lambda config: (here(config)[0], memory["bytes"]))
    return memory


def small_config(directory: pathlib.Path, corpus: pathlib.Path, **changes) -> TrainConfig:
    """A tiny run whose activations weigh more than its state."""
    long = {
        "model": {"context_length": 256},
        "data": {"length": 256, "batch_size": 8},
        "mesh": {"data": 2, "fsdp": 4},
    }
    return tiny_config(directory, corpus, **long, **changes)


# Nothing of it is read or written.
SMALL = small_config(pathlib.Path("run"), pathlib.Path("text"))


@pytest.fixture(scope="module")
def needed() -> dict[str, float]:
    """Bytes of the compiled step of `SMALL` by setting of remat, of real arrays, as JAX tells
    them.
    """
    found, state, batch = {}, None, None
    for remat in ("none", "outputs", "full"):
        whole = with_remat(SMALL, remat)
        recipe, mesh = make_recipe(whole), run_mesh(whole)
        with jax.set_mesh(mesh):
            if state is None:  # the same with all of them
                state = sharded_init(recipe, mesh)(jax.random.key(0))
                rows = micro_batches(empty_batch(SMALL.data.batch_size, SMALL.data.length), 1)
                batch = jax.device_put(rows, batch_sharding(recipe, mesh))
            memory = sharded_step(recipe, mesh).lower(state, batch).compile().memory_analysis()
        found[remat] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found


@pytest.fixture
def compiled_once(monkeypatch):
    """No step is compiled twice to see what it takes."""
    monkeypatch.setattr(automatic, "compiled_bytes", COMPILED_BYTES)


COMPILED_BYTES = functools.cache(compiled_bytes)


@pytest.mark.usefixtures("compiled_once")
def test_the_compiled_step_decides_what_fits(small_devices, needed):
    config, said = SMALL, []
    assert needed["none"] > 1.2 * needed["outputs"] > 1.2 * needed["full"]
    for memory, expected in (
        (1.1 * needed["none"], "none"),
        (needed["none"], "outputs"),
        (0.5 * needed["full"], "full"),
    ):
        small_devices["bytes"] = memory
        assert (
            first_that_fits(config, ("none", "outputs", "full"), Hosts(), said.append) == expected
        )
    assert len(said) == 3
    assert all("the compiled step takes" in line for line in said)
    assert said[0].startswith("remat none: ")
    assert said[0].endswith("outputs is next")


@pytest.mark.usefixtures("compiled_once")
def test_one_process_that_lacks_memory_decides_for_all(small_devices, monkeypatch):
    config = SMALL
    small_devices["bytes"] = 1e12
    monkeypatch.setattr(Hosts, "gather", lambda self, name, value, seconds: [value, other[name]])
    other, said = {"remat none": "60e9 61e9", "remat outputs": "50e9 61e9"}, []
    assert first_that_fits(config, ("none", "outputs", "full"), Hosts(), said.append) == "outputs"
    assert said == [
        "remat none: the compiled step takes 60.0 of 61.0 GB of a device, more than 95 "
        "%; outputs is next"
    ]


class Refused:
    """A program that the compiler gives up with some words."""

    def __init__(self, words: str) -> None:
        self.words = words

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_step_that_the_compiler_gives_up_does_not_fit(small_devices, monkeypatch):
    config, said, lowered = SMALL, [], step.lowered_step
    small_devices["bytes"] = 1e12
    words = (
        "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (26.46G) "
        "exceeds available HBM (15.75G)."
    )

    def lower(recipe, *given):
        return Refused(words) if recipe.model.options.remat == "none" else lowered(recipe, *given)

    monkeypatch.setattr(step, "lowered_step", lower)
    assert first_that_fits(config, ("none", "outputs", "full"), Hosts(), said.append) == "outputs"
    assert said == [
        "remat none: the compiled step does not fit into the 1000.0 GB of a device; outputs is next"
    ]
    # is no reason to keep less
    words = "RESOURCE_EXHAUSTED: a kernel wants more memory of the chip than it may have"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel wants"):
        first_that_fits(config, ("none", "outputs", "full"), Hosts(), said.append)


def test_the_largest_batch_of_a_ramp_counts():
    """Several micro-batches are added up in float32, one is not."""
    config = SMALL
    growing = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_ramp=((5, 16),))
    )
    large = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=16, accumulation=2)
    )
    assert compiled_bytes(growing) == compiled_bytes(large) > COMPILED_BYTES(config)


def test_a_run_takes_what_fits_and_finds_its_program_compiled(
    small_devices, needed, tmp_path, monkeypatch, capsys
):
    """The program that was compiled to see whether it fits is the one that is run: JAX's cache has
    it.
    """
    config = small_config(
        tmp_path / "run",
        write_corpus(tmp_path / "text"),
        run={"steps": 2, "eval_every": 0},
        compute={"remat": "auto"},
    )
    small_devices["bytes"] = needed["none"]
    monkeypatch.setattr(
        automatic, "_candidates", lambda config, going_on: ("none", "outputs", "full")
    )
    path, cache = write_yaml(tmp_path / "config.yaml", config), tmp_path / "cache"
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(cache))
    compilation_cache.reset_cache()
    try:
        assert main(["--config", str(path)]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("outputs is next") for line in lines)
    assert next(line for line in lines if line.startswith("model ")).endswith(
        "float32 compute, remat outputs"
    )
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["compute"]["remat"]
        == "outputs"
    )
    assert len(list(cache.glob("jit_step-*-cache"))) == 2  # of none and of outputs; no third one
    first = (tmp_path / "run" / "goodput.jsonl").read_text().splitlines()[1]
    assert (
        json.loads(first)["seconds"]["compile"] > 0
    )  # what was compiled before the first update is booked


@pytest.mark.parametrize("base", ["auto", "float32", "int8"])
def test_what_is_frozen_under_adapters_is_known_before_it_is_read(base, tiny_directory):
    """Shapes, types and places of the base, on a mesh."""
    config = TrainConfig(
        run=RunConfig(init=str(tiny_directory)),
        model=open_model(tiny_directory).source.config,
        mesh=MeshConfig(2, 2, 2),
        data=DataConfig(length=32, batch_size=4, tokenizer="base"),
        adapter=AdapterConfig(rank=4, base=base),
    )
    recipe, mesh = make_recipe(config), run_mesh(config)
    (expected,), (found,) = frozen_base(config, recipe, mesh), frozen_shapes(config, recipe, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, other.ndim)


def test_a_mesh_that_does_not_fit_is_one_line(h100, tmp_path):
    config = dataclasses.replace(config_in(tmp_path), mesh=MeshConfig(data=3, fsdp=1))
    with pytest.raises(InputError, match="set one axis to -1"):
        candidates(config, Hosts(), False)
    assert automatic.job_here(config_in(tmp_path))[1] == h100["bytes_limit"]
