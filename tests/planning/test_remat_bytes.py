"""What a layer keeps: what differentiation itself keeps of it, array by array; what is computed
again: counted by XLA.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from support import TINY

from llama_jax.errors import InputError
from llama_jax.model.attention import Mask
from llama_jax.model.layers import layer_class
from llama_jax.model.options import ModelOptions
from llama_jax.model.remat import REMAT_POLICIES, layer_parts, saved_names
from llama_jax.model.rope import rotation
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.memory import (
    all_saved_bytes,
    hosted_bytes,
    recomputed_flops,
    saved_bytes,
    score_bytes,
)

CONFIG = dataclasses.replace(TINY, dim=192, heads=6, kv_heads=2, head_dim=40, ffn_dim=448)
ROWS, LENGTH = 4, 256  # no other axis has as many as there are sequences


def kept_by_differentiation(remat: str, dtype: str, attention: str) -> float:
    """Bytes a token that the backward pass of a layer is handed, without weights and what all
    sequences and layers share.

    On a mesh: on one device each product has its input flattened, which tracing takes for an array
    of its own.
    """
    options = ModelOptions(dtype=dtype, remat=remat, attention=attention)
    layer, positions = (
        layer_class(options)(CONFIG, options),
        jnp.arange(LENGTH, dtype=jnp.int32)[None],
    )

    def forward(params, x):
        return layer.apply({"params": params}, x, None, rotation(positions, CONFIG), Mask())[0]

    x = jax.ShapeDtypeStruct((ROWS, LENGTH, CONFIG.dim), jnp.dtype(dtype))
    params = jax.eval_shape(
        lambda x: layer.init(jax.random.key(0), x, None, rotation(positions, CONFIG), Mask())[
            "params"
        ],
        x,
    )
    with jax.set_mesh(make_mesh(1, ROWS, 1, jax.devices()[:ROWS])):
        leaves = jax.tree.leaves(
            jax.eval_shape(lambda params, x: jax.vjp(forward, params, x)[1], params, x)
        )
    per_token = [leaf for leaf in leaves if ROWS in leaf.shape and leaf.size % (ROWS * LENGTH) == 0]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in per_token) / ROWS / LENGTH


WIDE = [
    pytest.param(remat, "float32", marks=[pytest.mark.slow] * (remat not in ("none", "attention")))
    for remat in REMAT_POLICIES
]


@pytest.mark.parametrize(
    ("remat", "dtype"), [*((remat, "bfloat16") for remat in REMAT_POLICIES), *WIDE]
)
def test_bytes_are_those_that_differentiation_keeps(remat, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    assert saved_bytes(CONFIG, remat, itemsize) == kept_by_differentiation(
        remat, dtype, "blockwise"
    )


def test_short_sequences_keep_their_scores():
    kept = kept_by_differentiation("none", "bfloat16", "reference")
    planned = saved_bytes(CONFIG, "none", 2) + score_bytes(CONFIG, LENGTH)
    assert kept <= planned == pytest.approx(kept, rel=0.12)
    assert score_bytes(CONFIG, 4096) == 0


def test_the_ladder_goes_down_in_bytes_and_up_in_flops():
    for above, below in itertools.pairwise(REMAT_POLICIES):
        assert saved_bytes(CONFIG, below, 2) < saved_bytes(CONFIG, above, 2)
        assert recomputed_flops(CONFIG, below, 512) >= recomputed_flops(CONFIG, above, 512)
    assert (
        recomputed_flops(CONFIG, "none", 512)
        == recomputed_flops(CONFIG, REMAT_POLICIES[1], 512)
        == 0
    )


def test_full_recomputes_all_products_but_the_last():
    """Of 8 products forward, all but `down`; attention causal: two products with half of the keys
    each.
    """
    query, key, dim, ffn = 240, 80, 192, 448
    one = 2 * (dim * query + 2 * dim * key + query * dim + 2 * dim * ffn) + 2 * (
        2 * query * 1000 / 2
    )
    assert recomputed_flops(CONFIG, "full", 1000) == CONFIG.layers * one


def test_a_split_is_the_sum_of_its_layers():
    rungs, layers = ("all", "attention"), CONFIG.layers
    each = [saved_bytes(CONFIG, rung, 2) for rung in rungs]
    again = [recomputed_flops(CONFIG, rung, 512) // layers for rung in rungs]
    assert all_saved_bytes(CONFIG, "1*all+attention", 2) == each[0] + (layers - 1) * each[1]
    assert recomputed_flops(CONFIG, "1*all+attention", 512) == again[0] + (layers - 1) * again[1]
    assert all_saved_bytes(CONFIG, "attention", 2) == layers * each[1]


def test_what_the_host_keeps_is_no_part_of_the_device():
    """Neither kept there nor computed again."""
    here, hosted = "1*all+q+k+v+gate", "1*all+q+k+v+context@host+gate+middle@host"
    assert all_saved_bytes(CONFIG, hosted, 2) == all_saved_bytes(CONFIG, here, 2)
    per_layer = 240 * 2 + 6 * 4 + 192 * 2  # context with its logsumexp, and middle
    assert hosted_bytes(CONFIG, hosted, 2) == (CONFIG.layers - 1) * per_layer
    assert (
        recomputed_flops(CONFIG, hosted, 512)
        == (CONFIG.layers - 1) * 2 * CONFIG.dim * CONFIG.ffn_dim
    )  # up


@pytest.mark.parametrize(
    ("remat", "words"),
    [
        ("2*none+full", "'none' in a split"),
        ("2*q+k", "'q' in a split"),
        ("2*all+none", "'none' in a split"),
        ("0*all+full", "'0.all' is unknown"),
        ("2*all", "'2.all' is unknown"),
        ("2*all+", "'2.all' is unknown"),
        ("3*all+full", "3 of 3 layers"),
    ],
)
def test_what_is_no_split_is_refused(remat, words):
    with pytest.raises(InputError, match=words):
        layer_parts(remat, 3)


@pytest.mark.parametrize("remat", ["q+w", "some", "", "none+q", "auto", "all@host", "q@disk"])
def test_unknown_names_are_refused(remat):
    with pytest.raises(InputError, match=r"remat .* is unknown; none, all, .*full, or some of q"):
        saved_names(remat)
