"""Activations kept by the host, compiled for four chips of v5e: what leaves the memory of a chip is
in that of the host.
"""

import dataclasses

import pytest

from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.compile import compile_training
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.memory import hosted_bytes
from llama_jax.presets import preset

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = [pytest.mark.tpu, pytest.mark.timeout(1800)]  # minutes where cores are shared


def test_what_the_host_keeps_leaves_the_chip():
    small = {
        "dim": 512,
        "heads": 8,
        "kv_heads": 8,
        "ffn_dim": 4096,
        "vocab_size": 1024,
        "layers": 8,
    }
    config = dataclasses.replace(preset("llama3.2-1b"), **small)
    job = Job(
        config,
        parse_topology("v5e:2x2"),
        MeshSizes(fsdp=4),
        8192,
        4,
        remat="q+k+v+context+middle+gate+up",
    )
    hosted = "q+k+v+context+middle+gate@host+up@host"
    here, there = compile_training(job), compile_training(dataclasses.replace(job, remat=hosted))
    moved = job.chip_tokens * hosted_bytes(config, hosted, 2)
    assert here.hosted == 0
    assert moved <= there.hosted <= 1.1 * moved
    assert (
        here.temporaries - there.temporaries > moved * (config.layers - 2) / config.layers
    )  # two layers' are on their way
