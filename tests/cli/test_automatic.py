"""`compute.remat: auto`: resolved before the run, told in its heading, kept in its config; on accelerators by the plan."""

import dataclasses
import pathlib
import types

import jax
import pytest
import yaml
from tiny_runs import tiny_config, write_corpus, write_yaml

from llama_jax.cli import automatic
from llama_jax.cli.automatic import with_remat
from llama_jax.cli.train import main, write_config
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.presets import preset
from llama_jax.training.config import ComputeConfig, MeshConfig, RunConfig, TrainConfig
from llama_jax.training.config_data import DataConfig


def test_on_a_cpu_it_is_none_and_the_run_says_so(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", write_corpus(tmp_path / "text"), run={"steps": 2}, compute={"remat": "auto"})
    path = write_yaml(tmp_path / "config.yaml", config)
    assert main(["--config", str(path), "--mesh.data", "4", "--mesh.tensor", "2"]) == 0
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
    assert heading.endswith("float32 compute, remat none")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["compute"]["remat"] == "none"


@pytest.fixture
def h100(monkeypatch):
    """Eight devices that say that they are H100s; the memory that one has for a program."""
    memory = {"bytes_limit": 0.9 * 79e9}
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: memory)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    return memory


def config_in(directory: pathlib.Path, remat: str = "auto") -> TrainConfig:
    return TrainConfig(run=RunConfig(dir=str(directory)), model=preset("llama3.1-8b"), mesh=MeshConfig(data=1, fsdp=-1),
                       compute=ComputeConfig(dtype="bfloat16", remat=remat), data=DataConfig(length=8192, batch_rows=16),
    )  # fmt: skip


def resolved(config: TrainConfig, going_on: bool = False) -> str:
    return with_remat(config, Hosts(), going_on).compute.remat


def test_it_follows_the_memory_that_a_device_has_for_the_program(h100, tmp_path):
    config = config_in(tmp_path)
    assert resolved(config) == "attention"
    h100["bytes_limit"] = 30e9
    assert resolved(config) == "full"
    h100["bytes_limit"] = 1e12
    assert resolved(config) == "none"
    assert resolved(config_in(tmp_path, "q+k")) == "q+k"


def test_a_run_that_goes_on_keeps_what_it_had(h100, tmp_path):
    config = config_in(tmp_path)
    assert resolved(config, going_on=True) == "attention"  # nothing is written down
    write_config(config_in(tmp_path, "outputs"), tmp_path / "config.yaml")
    assert resolved(config, going_on=True) == "outputs"
    assert resolved(config, going_on=False) == "attention"
    (tmp_path / "config.yaml").write_text("compute: [")
    assert resolved(config, going_on=True) == "attention"


def test_process_0_decides_for_all(h100, tmp_path, monkeypatch):
    monkeypatch.setattr(Hosts, "agree", lambda self, name, value: "attention" if name == "remat" else value)
    assert resolved(config_in(tmp_path)) == "attention"


def test_a_mesh_that_does_not_fit_is_one_line(h100, tmp_path):
    config = dataclasses.replace(config_in(tmp_path), mesh=MeshConfig(data=3, fsdp=1))
    with pytest.raises(InputError, match="set one axis to -1"):
        resolved(config)
    assert automatic.job_here(config_in(tmp_path))[1] == h100["bytes_limit"]
