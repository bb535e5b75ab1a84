"""What is handed to cuDNN, on a machine without a GPU: ranges of documents, the lowered program,
and who is refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.model import cudnn
from llama_jax.model.attention import attend, choose_backend
from llama_jax.model.mask import Mask
from llama_jax.parallel.sharding import TRAINING


def pretend(monkeypatch, capability: float) -> None:
    """JAX takes cuDNN to be there, on a GPU of a compute capability."""
    from jax._src.cudnn import fused_attention_stablehlo as module

    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(
        module, "check_compute_capability", lambda least: capability >= float(least)
    )
    cudnn._kernel.cache_clear()


@pytest.fixture
def present(monkeypatch):
    """A Hopper GPU, which has the kernel for packed sequences."""
    pretend(monkeypatch, 9.0)
    yield
    cudnn._kernel.cache_clear()


_ranges = jax.jit(cudnn.ranges, static_argnums=1)


def test_ranges_are_those_of_a_loop():
    sequences = np.array([[1, 1, 2, 3, 3, 3, 0, 0], [4] * 8, [1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
    found = _ranges(sequences, 5)
    assert found.lengths.tolist() == [[2, 1, 3, 2, -1], [8, -1, -1, -1, -1], [3, 5, -1, -1, -1]]
    assert found.offsets.tolist() == [
        [0, 2, 3, 6, -1, -1],
        [0, -1, -1, -1, -1, -1],
        [0, 3, -1, -1, -1, -1],
    ]
    assert found.way == 1


@pytest.mark.parametrize(
    ("sequence", "way"),
    [([2, 2, 2, 2], 0), ([3, 3, 2, 1], 1), ([1, 2, 3, 4], 2), ([1, 2, 2, 1], 2)],
)
def test_rows_go_the_way_that_takes_them(sequence, way):
    """One document, up to three, four, one in two places; a second sequence has one."""
    assert _ranges(np.asarray([sequence, [1] * 4], np.int32), 3).way == way


def lowered(documents):
    shapes = [jax.ShapeDtypeStruct((2, n, 512, 64), jnp.bfloat16) for n in (8, 2, 2)]

    def loss(q, k, v, documents):
        """A number to differentiate."""
        return cudnn.cudnn_attention(q, k, v, documents, TRAINING).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, documents)
    return program.lower(lowering_platforms=("cuda",)).as_text()


def test_whole_sequences_run_each_kernel_once(present):
    text = lowered(None)
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert "PADDING_CAUSAL" not in text
    assert "stablehlo.case" not in text


def test_documents_are_ranges_with_a_way_out(present):
    text = lowered(jax.ShapeDtypeStruct((2, 512), jnp.int32))
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward") == 2
    assert text.count("PADDING_CAUSAL") == text.count("stablehlo.case") == 2


def test_gpus_before_hopper_take_documents_in_blocks(present, monkeypatch):
    pretend(monkeypatch, 8.0)
    text = lowered(jax.ShapeDtypeStruct((2, 512), jnp.int32))
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert "PADDING_CAUSAL" not in text
    pretend(monkeypatch, 7.5)
    assert not cudnn.fits_cudnn(64, "bfloat16")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_kept_statistics_save_the_kernel_from_running_again(present, kept, packed):
    numbers = jnp.ones((2, 512), jnp.int32) if packed else None
    ways = 2 if packed else 1  # for whole sequences, and for packed ones
    policy = jax.checkpoint_policies.save_only_these_names(*(["context"] if kept else []))
    shapes = [jax.ShapeDtypeStruct((2, n, 512, 64), jnp.bfloat16) for n in (8, 2, 2)]
    run = jax.checkpoint(
        lambda q, k, v: cudnn.cudnn_attention(q, k, v, numbers, TRAINING), policy=policy
    )
    program = jax.make_jaxpr(
        jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    )(*shapes)
    assert str(program).count("dot_product_attention_fwd_wrapper[") == (ways if kept else 2 * ways)


def test_rules_that_ask_for_anything_unknown_are_not_used(present, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as module

    rule = module._dot_product_attention_fwd_rule
    monkeypatch.setattr(
        module, "_dot_product_attention_fwd_rule", lambda query, key, value, sink: rule
    )
    cudnn._kernel.cache_clear()
    assert not cudnn.fits_cudnn(64, "bfloat16")


def test_auto_takes_it_on_gpus_only_and_for_what_it_takes(present):
    assert choose_backend("auto", 4096, 4096, "gpu", 128, 1, "bfloat16") == "cudnn"
    assert choose_backend("auto", 64, 64, "gpu", 64, 1, "float16") == "cudnn"
    for place in [
        ("gpu", 128, 2, "bfloat16"),
        ("gpu", 100, 1, "bfloat16"),
        ("gpu", 128, 1, "float32"),
        ("cpu", 128, 1, "bfloat16"),
    ]:
        assert choose_backend("auto", 4096, 4096, *place) == "blockwise"


def test_without_a_gpu_it_is_refused():
    q = jnp.zeros((1, 2, 8, 64), jnp.bfloat16)
    with pytest.raises(
        InputError,
        match=r"heads of 64 in bfloat16 on 1 device\(s\) a sequence given, 8 tokens; .* a GPU with cuDNN expected",
    ):
        cudnn.cudnn_attention(q, q, q, None, TRAINING)
    with pytest.raises(InputError, match="attention backend cudnn given for one call"):
        attend(q, q, q, Mask(), backend="cudnn")
