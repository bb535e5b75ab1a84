"""Backends of attention against float64, mask by mask, forward and backward; docs/performance.md
shows the same table.

`python tests/model/test_conformance.py` prints the table. Its row of GPUs is checked on one by
tests/gpu/test_gpu_attention.py.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by

from llama_jax.errors import InputError
from llama_jax.model.attention import Scales, attend
from llama_jax.model.cache import quantise_heads
from llama_jax.model.context_parallel import attend_over_mesh
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.model.splash import splash_attention
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, balanced_positions

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 512, 64
MASKS = (
    "whole sequences",
    "documents",
    "padding behind",
    "document in two places",
    "cache, sequences of unequal length",
    "8-bit cache",
)
EQUAL, REFUSED, AUTO = "equal", "refused", "as auto"
ROWS = {
    "reference": [EQUAL] * 6,
    "blockwise": [EQUAL] * 6,
    "gathered over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "ring over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "splash": [EQUAL] * 4 + [AUTO] * 2,
    "splash over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "cudnn": [EQUAL] * 4 + [AUTO] * 2,
}
WHERE = {
    "splash": "CPU, the kernel's program step by step; compiled for TPUs, not run on one",
    "splash over 2 devices": "CPU, the kernel's program step by step",
    "cudnn": "one NVIDIA H200, jax 0.11.2 (`make test-gpu`); lowered for GPUs in every run of the "
    "tests",
}


def table() -> str:
    head = ["backend", *MASKS, "where"]
    rows = [[name, *cells, WHERE.get(name, "CPU")] for name, cells in ROWS.items()]
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *[f"| {' | '.join(row)} |" for row in rows],
        ]
    )


def documents_of(mask: str) -> np.ndarray | None:
    third = LENGTH // 3
    numbers = {
        "documents": [1] * third + [2] * 5 + [3] * (LENGTH - third - 5),
        "padding behind": [1] * third + [2] * third + [0] * (LENGTH - 2 * third),
        "document in two places": [1] * third + [2] * third + [1] * (LENGTH - 2 * third),
    }.get(mask)
    return (
        None
        if numbers is None
        else np.stack([np.array(numbers), np.roll(numbers, 7)]).astype(np.int32)
    )


@functools.cache
def drawn(seed: int = 0) -> list[np.ndarray]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    counts = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [rng.normal(size=(BATCH, n, LENGTH, WIDTH)).astype(np.float32) for n in counts]


@functools.cache
def expected_of(mask: str) -> tuple[np.ndarray, ...]:
    """Output and gradients in float64."""
    return float64_attention(*drawn(), seen_by(np.arange(LENGTH), documents_of(mask)))


def over_devices(**options):
    """Runs sequences cut over two devices, in the order of balanced work."""
    order = balanced_positions(LENGTH, 2)
    back = np.argsort(order)

    def run(q, k, v, documents):
        """In the order of the sequence."""
        places, numbers = jnp.asarray(order), None if documents is None else documents[:, order]
        mask = Mask(
            documents=numbers, positions=places, key_positions=places, key_documents=numbers
        )
        moved = [x[:, :, order] for x in (q, k, v)]
        if options.get("attention") == "splash":
            return splash_attention(*moved, mask.documents, TRAINING, interpret=True)[:, :, back]
        return attend_over_mesh(*moved, mask, ModelOptions(**options))[:, :, back]

    return run


RUNS = {
    "reference": lambda q, k, v, documents: attend(
        q, k, v, Mask(documents=documents), backend="reference"
    ),
    "blockwise": lambda q, k, v, documents: attend(
        q, k, v, Mask(documents=documents), backend="blockwise"
    ),
    "gathered over 2 devices": over_devices(context_attention="all_gather"),
    "ring over 2 devices": over_devices(context_attention="ring"),
    "splash": lambda q, k, v, documents: splash_attention(
        q, k, v, documents, TRAINING, interpret=True
    ),
    "splash over 2 devices": over_devices(attention="splash"),
}


@functools.cache
def program_of(backend: str):
    """Forward and backward; the masks that give documents share a program."""

    def both(q, k, v, d_out, documents):
        out, pull = jax.vjp(lambda q, k, v: RUNS[backend](q, k, v, documents), q, k, v)
        return (out, *pull(d_out))

    return jax.jit(both)


@pytest.mark.parametrize("mask", MASKS[:4])
@pytest.mark.parametrize("backend", RUNS)
def test_rows_equal_float64(backend, mask):
    sizes = {"context": 2, "fsdp": 1} if "2 devices" in backend else {"fsdp": 1}
    with jax.set_mesh(make_mesh(**sizes, devices=jax.devices()[: sizes.get("context", 1)])):
        ours = program_of(backend)(*drawn(), documents_of(mask))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, expected_of(mask)):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert ROWS[backend][MASKS.index(mask)] == EQUAL


@functools.cache
def narrow_heads():
    """Keys and values in 8 bits with their scales."""
    return [tuple(map(np.asarray, jax.jit(quantise_heads)(x))) for x in drawn()[1:3]]


@pytest.mark.parametrize("mask", MASKS[4:])
@pytest.mark.parametrize("backend", ["reference", "blockwise", "splash", "cudnn"])
def test_tokens_behind_a_cache_equal_float64(backend, mask):
    q, k, v, _ = drawn()
    few, starts = 24, np.array([7, 300], np.int32)
    q, scales = q[:, :, :few], None
    keys, values = k, v
    if mask == "8-bit cache":
        (keys, key_scales), (values, value_scales) = narrow_heads()
        scales = Scales(key_scales, value_scales)
        k, v = (x.astype(np.float32) * scale[..., None] for x, scale in narrow_heads())
    options = ModelOptions(attention=backend)
    run = jax.jit(lambda *x: attend_over_mesh(*x[:3], Mask(start=x[3]), options, x[4]))
    out = run(q, keys, values, starts, scales)
    seen = np.arange(LENGTH)[None, None] <= starts[:, None, None] + np.arange(few)[None, :, None]
    np.testing.assert_allclose(
        out, float64_attention(q, k, v, np.zeros(q.shape), seen)[0], atol=1e-5
    )
    assert ROWS[backend][MASKS.index(mask)] == (
        EQUAL if backend in ("reference", "blockwise") else AUTO
    )


@pytest.mark.parametrize(
    "options",
    [{"context_attention": "all_gather"}, {"context_attention": "ring"}, {"attention": "splash"}],
    ids=str,
)
def test_a_cache_on_devices_that_share_sequences_is_refused(options):
    q, k, v, _ = drawn()
    with (
        jax.set_mesh(make_mesh(fsdp=1, context=2, devices=jax.devices()[:2])),
        pytest.raises(InputError, match="a cache was given"),
    ):
        attend_over_mesh(
            *map(jnp.asarray, (q, k, v)),
            Mask(start=jnp.zeros(BATCH, jnp.int32)),
            ModelOptions(**options),
        )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_tokens_in_another_order_go_the_way_of_auto(kernel):
    q, k, v, _ = drawn()
    order = np.random.default_rng(0).permutation(LENGTH).astype(np.int32)
    run = jax.jit(
        lambda q, k, v, at: attend_over_mesh(
            q, k, v, Mask(positions=at, key_positions=at), ModelOptions(attention=kernel)
        )
    )
    out = run(q, k, v, order)
    seen = np.broadcast_to(order[None, :] <= order[:, None], (BATCH, LENGTH, LENGTH))
    np.testing.assert_allclose(
        out, float64_attention(q, k, v, np.zeros(q.shape), seen)[0], atol=1e-5
    )


def test_the_table_is_shown():
    assert table() in (pathlib.Path(__file__).parents[2] / "docs/performance.md").read_text()


if __name__ == "__main__":
    print(table())
