"""Keys that go round four chips of v5e, compiled: each round's transfer is under way while the
block at hand is worked on.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.model.context_parallel import attend_over_mesh
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.chips import parse_topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import balanced_positions
from llama_jax.planning.compile import topology_devices

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = pytest.mark.tpu
LENGTH = 8192


@pytest.fixture(scope="module")
def program() -> str:
    """Forward and backward of attention in a ring."""
    mesh = make_mesh(1, 1, 1, topology_devices(parse_topology("v5e:2x2")), 4)
    positions = jnp.asarray(balanced_positions(LENGTH, 4))
    mask, options = (
        Mask(positions=positions, key_positions=positions),
        ModelOptions("bfloat16", context_attention="ring"),
    )
    place = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    shapes = [
        jax.ShapeDtypeStruct((1, heads, LENGTH, 128), jnp.bfloat16, sharding=place)
        for heads in (8, 2, 2)
    ]

    def loss(q, k, v):
        """A number to differentiate."""
        return attend_over_mesh(q, k, v, mask, options).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()


def test_transfers_are_under_way_while_a_block_is_worked_on(program):
    """In the two loops over rounds, forward and backward: the keys' transfers begin, a loop over
    blocks runs, they end.
    """
    rounds = 0
    for computation in re.split(r"\n(?=\S)", program):
        events = re.findall(
            r"%(collective-permute-start|collective-permute-done|while)[.\w]* = ", computation
        )
        if (
            {"collective-permute-start", "while"} <= set(events)
            and "ROOT %tuple" in computation
            and not computation.startswith("ENTRY")
        ):
            work = events.index("while", events.index("collective-permute-start"))
            assert events[:work].count("collective-permute-done") == 0
            assert events[work:].count("collective-permute-start") == 0
            rounds += 1
    assert rounds >= 2
    assert " collective-permute(" not in program  # none that waits
