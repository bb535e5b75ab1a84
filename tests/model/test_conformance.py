"""Backends of attention against float64, mask by mask, forward and backward; docs/performance.md shows the same table.

`python tests/model/test_conformance.py` prints the table. Its row of GPUs is checked on one by tests/gpu/test_gpu_attention.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by

from llama_jax.errors import InputError
from llama_jax.model.attention import Scales, attend
from llama_jax.model.cache import quantise_heads
from llama_jax.model.context import attend_over_mesh
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.model.splash import splash_attention
from llama_jax.parallel.context import balanced_positions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 512, 64
MASKS = ("whole rows", "documents", "padding behind", "document in two places", "cache, rows of unequal length", "8-bit cache")
EQUAL, REFUSED, AUTO = "equal", "refused", "as auto"
ROWS = {
    "reference": [EQUAL] * 6,
    "chunked": [EQUAL] * 6,
    "gathered over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "ring over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "splash": [EQUAL] * 4 + [AUTO] * 2,
    "splash over 2 devices": [EQUAL] * 4 + [REFUSED] * 2,
    "cudnn": [EQUAL] * 4 + [AUTO] * 2,
}
WHERE = {
    "splash": "CPU, the kernel's program step by step; compiled for TPUs, not run on one",
    "splash over 2 devices": "CPU, the kernel's program step by step",
    "cudnn": "one NVIDIA H200, jax 0.11.2 (`make test-gpu`); lowered for GPUs in every run of the tests",
}


def table() -> str:
    head = ["backend", *MASKS, "where"]
    rows = [[name, *cells, WHERE.get(name, "CPU")] for name, cells in ROWS.items()]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *[f"| {' | '.join(row)} |" for row in rows]])


def documents_of(mask: str) -> np.ndarray | None:
    third = LENGTH // 3
    numbers = {
        "documents": [1] * third + [2] * 5 + [3] * (LENGTH - third - 5),
        "padding behind": [1] * third + [2] * third + [0] * (LENGTH - 2 * third),
        "document in two places": [1] * third + [2] * third + [1] * (LENGTH - 2 * third),
    }.get(mask)
    return None if numbers is None else np.stack([np.array(numbers), np.roll(numbers, 7)]).astype(np.int32)


def drawn(seed: int = 0) -> list[np.ndarray]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(BATCH, n, LENGTH, WIDTH)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def over_devices(**options):
    """Runs rows cut over two devices, in the order of balanced work."""
    order = balanced_positions(LENGTH, 2)
    back = np.argsort(order)

    def run(q, k, v, documents):
        """In the order of the row."""
        places, numbers = jnp.asarray(order), None if documents is None else documents[:, order]
        mask = Mask(documents=numbers, positions=places, key_positions=places, key_documents=numbers)
        moved = [x[:, :, order] for x in (q, k, v)]
        if options.get("attention") == "splash":
            return splash_attention(*moved, mask.documents, TRAINING, interpret=True)[:, :, back]
        return attend_over_mesh(*moved, mask, ModelOptions(**options))[:, :, back]

    return run


RUNS = {
    "reference": lambda q, k, v, documents: attend(q, k, v, Mask(documents=documents), backend="reference"),
    "chunked": lambda q, k, v, documents: attend(q, k, v, Mask(documents=documents), backend="chunked"),
    "gathered over 2 devices": over_devices(context_attention="gathered"),
    "ring over 2 devices": over_devices(context_attention="ring"),
    "splash": lambda q, k, v, documents: splash_attention(q, k, v, documents, TRAINING, interpret=True),
    "splash over 2 devices": over_devices(attention="splash"),
}


@pytest.mark.parametrize("mask", MASKS[:4])
@pytest.mark.parametrize("backend", RUNS)
def test_rows_equal_float64(backend, mask):
    arrays, documents = drawn(), documents_of(mask)
    sizes = {"context": 2, "fsdp": 1} if "2 devices" in backend else {"fsdp": 1}
    given = None if documents is None else jnp.asarray(documents)
    with jax.set_mesh(make_mesh(**sizes, devices=jax.devices()[: sizes.get("context", 1)])):
        out, pull = jax.vjp(jax.jit(lambda q, k, v: RUNS[backend](q, k, v, given)), *arrays[:3])
        ours = (out, *pull(arrays[3]))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, float64_attention(*arrays, seen_by(np.arange(LENGTH), documents))):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert ROWS[backend][MASKS.index(mask)] == EQUAL


@pytest.mark.parametrize("mask", MASKS[4:])
@pytest.mark.parametrize("backend", ["reference", "chunked", "splash", "cudnn"])
def test_tokens_behind_a_cache_equal_float64(backend, mask):
    q, k, v, _ = drawn()
    few, starts = 24, np.array([7, 300], np.int32)
    q, scales = q[:, :, :few], None
    keys, values = k, v
    if mask == "8-bit cache":
        (keys, key_scales), (values, value_scales) = quantise_heads(k), quantise_heads(v)
        scales = Scales(key_scales, value_scales)
        k, v = (x.astype(jnp.float32) * scale[..., None] for x, scale in ((keys, key_scales), (values, value_scales)))
    options = ModelOptions(attention=backend)
    out = attend_over_mesh(q, keys, values, Mask(start=jnp.asarray(starts)), options, scales)
    seen = np.arange(LENGTH)[None, None] <= starts[:, None, None] + np.arange(few)[None, :, None]
    np.testing.assert_allclose(out, float64_attention(q, k, v, np.zeros(q.shape), seen)[0], atol=1e-5)
    assert ROWS[backend][MASKS.index(mask)] == (EQUAL if backend in ("reference", "chunked") else AUTO)


@pytest.mark.parametrize(
    "options", [{"context_attention": "gathered"}, {"context_attention": "ring"}, {"attention": "splash"}], ids=str
)
def test_a_cache_on_devices_that_share_rows_is_refused(options):
    q, k, v, _ = drawn()
    with (
        jax.set_mesh(make_mesh(fsdp=1, context=2, devices=jax.devices()[:2])),
        pytest.raises(InputError, match="a cache was given"),
    ):
        attend_over_mesh(q, k, v, Mask(start=jnp.zeros(BATCH, jnp.int32)), ModelOptions(**options))


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_tokens_in_another_order_go_the_way_of_auto(kernel):
    q, k, v, _ = drawn()
    order = jnp.asarray(np.random.default_rng(0).permutation(LENGTH), jnp.int32)
    out = attend_over_mesh(q, k, v, Mask(positions=order, key_positions=order), ModelOptions(attention=kernel))
    seen = np.broadcast_to(order[None, :] <= order[:, None], (BATCH, LENGTH, LENGTH))
    np.testing.assert_allclose(out, float64_attention(q, k, v, np.zeros(q.shape), seen)[0], atol=1e-5)


def test_the_table_is_shown():
    assert table() in (pathlib.Path(__file__).parents[2] / "docs/performance.md").read_text()


if __name__ == "__main__":
    print(table())
