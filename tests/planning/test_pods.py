"""Configs for pods: each is read by `train.py`, alone and on top of its recipe, and fits the chips
of its first comment.

The topology stands in the comment alone, in the command of the plan; what it says of the plan is
compared with the plan.
"""

import pathlib
import re
from typing import NamedTuple

import pytest

from llama_jax.cli.arguments import parse_train
from llama_jax.cli.plan import config_job, read_config
from llama_jax.parallel.chips import Topology, parse_topology
from llama_jax.planning.plan import Plan, job_of, make_plan
from llama_jax.training.config import TrainConfig

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
FILES = sorted(
    path.relative_to(CONFIGS / "pods").as_posix() for path in (CONFIGS / "pods").glob("*.yaml")
)
MODELS = {"llama3.1-8b", "llama3.1-70b", "llama-7b", "llama2-13b", "llama2-70b", "llama-65b"}


class Pod(NamedTuple):
    """A file, with what its first comment says."""

    path: pathlib.Path
    comment: str
    topology: Topology


def pod(name: str) -> Pod:
    path = CONFIGS / "pods" / name
    comment = path.read_text("utf8").partition("\n\n")[0]
    found = re.search(
        rf"^#   python -m llama_jax plan --config configs/pods/{re.escape(name)} --topology (\S+)$",
        comment,
        re.M,
    )
    assert found, "the first comment has the command of the plan"
    return Pod(path, comment, parse_topology(found[1]))


def read(*paths: pathlib.Path) -> TrainConfig:
    files = [word for path in paths for word in ("--config", str(path))]
    return parse_train([*files, "--data.paths", "[text]"], paths[0])


def verdict(plan: Plan) -> str:
    """What a first comment says of a plan."""
    gb, speed = plan.memory.total / 1e9, plan.speed
    seconds = f"{speed.step:.1f} s" if speed.step >= 1 else f"{speed.step * 1e3:.0f} ms"
    return (
        f"# Plan: {gb:.1f} of {plan.limit / 1e9:.1f} GB/chip, remat {plan.job.remat}; "
        f"{plan.job.tokens:,} tokens an update, {seconds}; "
        f"{speed.tokens_per_second:,.0f} tokens/s, causal MFU {speed.mfu:.0%}: expected "
        "by closed form, not measured."
    )


@pytest.mark.parametrize("name", FILES)
def test_it_fits_the_chips_that_it_is_for(name):
    path, comment, topology = pod(name)
    plan = make_plan(config_job(read_config(path), topology))
    assert plan.memory.total < 0.95 * plan.limit
    assert verdict(plan) in comment
    assert path.stem.split("-")[-2:] == [topology.chip.name, str(topology.chips)]


@pytest.mark.parametrize("name", FILES)
def test_its_command_names_itself_and_what_it_goes_on_top_of(name):
    path, comment, topology = pod(name)
    commands = [line for line in comment.splitlines() if " python train.py " in line]
    assert len(commands) == 1
    files = re.findall(r"--config (\S+)", commands[0])
    assert files[-1] == f"configs/pods/{name}"
    whole, alone = read(*[CONFIGS.parent / file for file in files]), read(path)
    assert job_of(whole, topology) == job_of(
        alone, topology
    )  # the machine's part is in the pod's file, all of it
    assert whole.optimizer.name == alone.optimizer.name


def test_the_published_sizes_have_their_pods():
    of_tpus = {
        (name.rpartition("-")[0].rpartition("-")[0], pod(name).topology.chip.name) for name in FILES
    }
    assert of_tpus >= {(model, chip) for model in MODELS for chip in ("v5e", "v5p", "v6e")} | {
        ("llama3.1-405b", "v5p")
    }
