"""FLOPs, traffic and limits against published figures and what compiled steps move."""

import dataclasses

import pytest

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.job import Job, MeshSizes, parse_mesh
from llama_jax.planning.speed import flops_per_token, make_decode_plan, traffic, training_speed
from llama_jax.presets import preset
from llama_jax.training import run_log as step_log
from llama_jax.training.config import RunConfig, TrainConfig
from llama_jax.training.config_sections import AdapterConfig, DataConfig, PreferenceConfig

REMAT = "all"

# GFLOP a token by 6 matmul parameters + 6 layers heads head_dim length, at 2,048, 4,096 and 8,192
# tokens, worked out by hand.
PUBLISHED = {
    "llama3.2-1b": (7.82, 8.22, 9.03),
    "llama3.2-3b": (20.33, 21.39, 23.50),
    "llama2-7b": (41.25, 42.86, None),
    "llama3.1-8b": (46.64, 48.25, 51.47),
    "llama2-70b": (420, 428, None),
    "llama3.1-70b": (425, 433, 449),
    "llama3.1-405b": (2448, 2473, 2524),
}


def job(
    model: str,
    name: str,
    length: int = 8192,
    sequences: int = 1,
    mesh: str | None = None,
    **changes,
) -> Job:
    """So many sequences for each chip along `data` and `fsdp`."""
    topology = parse_topology(name)
    sizes = parse_mesh(mesh, topology)
    return Job(
        preset(model),
        topology,
        sizes,
        length,
        sequences * sizes.sequences,
        **{"remat": REMAT, **changes},
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_flops_a_token_are_the_published_ones(model):
    for length, expected in zip((2048, 4096, 8192), PUBLISHED[model]):
        if expected is not None:
            found = flops_per_token(job(model, "h100:1", length)) / 1e9
            assert found == pytest.approx(expected, abs=0.006 if expected < 100 else 0.6)


def test_flops_under_adapters():
    """8B at 4,096 tokens: four products with each matrix and attention are 33.2 GFLOP; rank 1 adds
    next to nothing.
    """
    assert flops_per_token(job("llama3.1-8b", "h100:1", 4096, rank=1)) / 1e9 == pytest.approx(
        33.2, abs=0.1
    )


@pytest.mark.parametrize("targets", [LAYER_MATRICES, ("wq", "wv")])
def test_mfu_of_a_run_and_of_its_plan_have_one_formula(targets):
    """8B at 4,096 with rank 16; by hand: 2 + 2 a parameter of frozen matrices, 6 a parameter of
    adapters, causal attention.
    """
    config = preset("llama3.1-8b")
    run = TrainConfig(
        run=RunConfig(init="base"),
        model=config,
        data=DataConfig(length=4096),
        adapter=AdapterConfig(rank=16, targets=targets),
    )
    widths = {
        "wq": 4096 + 4096,
        "wk": 4096 + 1024,
        "wv": 4096 + 1024,
        "wo": 4096 + 4096,
        "gate": 4096 + 14336,
        "up": 4096 + 14336,
        "down": 14336 + 4096,
    }
    products, attention = 8_030_261_248 - 128_256 * 4096 - 65 * 4096, 32 * 32 * 128 * 4096
    adapters = 32 * 16 * sum(widths[name] for name in targets)
    assert step_log.flops_per_token(run) == 4 * products + 6 * attention + 6 * adapters
    if targets == LAYER_MATRICES:
        assert step_log.flops_per_token(run) == flops_per_token(
            job("llama3.1-8b", "h100:1", 4096, rank=16)
        )
        whole = dataclasses.replace(run, adapter=AdapterConfig())
        assert step_log.flops_per_token(whole) / step_log.flops_per_token(run) == pytest.approx(
            1.44, abs=0.02
        )
    pairs = dataclasses.replace(
        run, preference=PreferenceConfig(0.1)
    )  # and the bare model forward beside it
    assert (
        step_log.flops_per_token(pairs) - step_log.flops_per_token(run)
        == 2 * products + 2 * attention
    )


@pytest.mark.parametrize(
    ("model", "name", "gigabytes"),
    [
        ("llama3.1-8b", "v5p:4x4x4", 30.0 + 14.0 + 2.1),
        ("llama3.1-70b", "v5p:4x4x8", 278.0 + 136.9 + 4.2),
        ("llama3.1-405b", "v5p:8x8x8", 1615.0 + 803.3 + 8.4),
    ],
)
def test_links_carry_what_compiled_steps_carry(model, name, gigabytes):
    """Gathers, scatters and sums of steps compiled for TPUs, fsdp over all chips."""
    near, far = traffic(job(model, name))
    assert near / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert far == 0


def test_what_leaves_a_slice_goes_over_the_network():
    near, far = traffic(job("llama3.1-8b", "2xv5p:4x4x4"))
    assert near == traffic(job("llama3.1-8b", "v5p:4x4x4"))[0]
    assert far == pytest.approx(
        2 * 8.03e9 / 64 / 2 * 2, rel=0.01
    )  # bfloat16 gradients of a shard, there and back
    assert (
        traffic(job("llama3.1-8b", "h100:16"))[0] == 0
    )  # fsdp over two nodes is no faster than the network
    assert (
        traffic(job("llama3.1-8b", "h100:16", mesh="data=2"))[1]
        < traffic(job("llama3.1-8b", "h100:16"))[1]
    )


def test_a_step_is_the_slowest_of_its_parts():
    speed = training_speed(job("llama3.1-70b", "v5p:4x4x8"))
    assert speed.bound == "compute"
    assert speed.step == speed.expected_compute
    assert speed.mfu == pytest.approx(
        0.646
    )  # nothing is computed again, so the share of the peak is the MFU
    assert speed.compute == pytest.approx(449.2e9 * 8192 / 459e12, rel=0.001)
    assert speed.tokens_per_second / 128 == pytest.approx(0.646 * 459e12 / 449.2e9, rel=0.001)
    full = training_speed(job("llama3.1-70b", "v5p:4x4x8", remat="full"))
    assert full.step == pytest.approx(speed.step * (1 + full.recomputed))
    assert 0.2 < full.recomputed < 1 / 3  # all of the forward pass but `down` and the head


def test_products_wait_for_what_comes_over_tensor():
    """8B over 4 chips: of the stream of 8,192 tokens 3/4, in and out, five times a layer (four in
    all and one again).
    """
    whole, cut = (
        training_speed(job("llama3.1-8b", "v5p:4x4x4")),
        training_speed(job("llama3.1-8b", "v5p:4x4x4", mesh="tensor=4")),
    )
    bytes_in = 32 * 5 * 2 * 0.75 * 8192 * 4096 * 2
    assert whole.streams == 0
    assert cut.streams == pytest.approx(bytes_in / 180e9, rel=0.01)  # one axis of the torus
    assert cut.step == cut.expected_compute + cut.streams
    assert cut.bound == "compute"
    line = training_speed(job("llama3.1-8b", "v5e:16x16", mesh="tensor=4"))
    assert line.streams == pytest.approx(
        bytes_in / 45e9, rel=0.01
    )  # four of sixteen in a row: one way


def test_narrow_chunks_of_the_loss_are_bound_by_memory():
    """A chunk of few tokens reads the head for them alone."""
    wide, narrow = job("llama3.1-8b", "v5p:4x4x4"), job("llama3.1-8b", "v5p:4x4x4", loss_chunk=1)
    assert wide.chunk_tokens == 2048
    assert narrow.chunk_tokens == 1
    assert training_speed(narrow).bound == "memory"


def test_more_ways_cost_more_transfers():
    def for_a_token(**changes):
        """Bytes a chip, for each token of an update."""
        given = job("llama3.1-8b", "v5p:4x4x4", **changes)
        return traffic(given)[0] / given.tokens

    assert for_a_token(mesh="tensor=4") > for_a_token()
    assert for_a_token(mesh="context=4") > for_a_token()
    assert for_a_token(sequences=2) == for_a_token() / 2  # the same weights for twice the tokens
    assert for_a_token(sequences=2, microbatches=2) == for_a_token()


# Tokens a second that memory alone allows an H100 (3.35 TB/s), worked out by hand: 8B and 1B,
# bfloat16 and int8 weights.
@pytest.mark.parametrize(
    ("model", "batch", "length", "dtype", "tokens"),
    [
        ("llama3.1-8b", 8, 1024, "bfloat16", 1666),
        ("llama3.1-8b", 8, 2048, "bfloat16", 1562),
        ("llama3.1-8b", 64, 1024, "bfloat16", 9085),
        ("llama3.1-8b", 64, 2048, "bfloat16", 6661),
        ("llama3.1-8b", 1, 1, "bfloat16", 223),
        ("llama3.1-8b", 1, 1, "int8", 446),
        ("llama3.2-1b", 1, 1, "bfloat16", 1355),
    ],
)
def test_decoding_is_limited_by_memory_as_published(model, batch, length, dtype, tokens):
    plan = make_decode_plan(preset(model), parse_topology("h100:1"), batch, length, dtype)
    assert plan.tokens_per_second == pytest.approx(tokens, rel=0.003)


def test_a_cache_takes_the_published_bytes():
    """128 KiB a token of 8B in bfloat16; int8 halves it and adds a float32 scale a vector of
    128.
    """
    given = preset("llama3.1-8b"), parse_topology("h100:1"), 4, 1000
    plan = make_decode_plan(*given)
    assert plan.cache == 4 * 1000 * 131072
    assert make_decode_plan(*given, cache_dtype="int8").cache == plan.cache * (1 + 4 / 128) / 2


def test_chips_share_weights_and_sequences():
    config, topology = preset("llama3.1-70b"), parse_topology("v5p:4x4x4")
    plan = make_decode_plan(config, topology, None, 4096)
    assert plan.mesh == MeshSizes(data=8, tensor=8)
    assert plan.batch == 8
    one = make_decode_plan(config, topology, 64, 4096, mesh=MeshSizes(data=64))
    assert plan.weights == pytest.approx(one.weights / 8, rel=0.001)
    assert dataclasses.replace(job("llama3.1-8b", "h100:8"), remat="full").chip_batch_size == 1
