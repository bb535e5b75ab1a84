"""cuDNN's attention on a GPU against float64 written out, forward and backward: whole sequences,
documents, prompts of a cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by
from model.test_conformance import EQUAL, LENGTH, MASKS, ROWS, documents_of
from support import TINY, random_parameters, random_tokens

from llama_jax.generation.generate import Generator
from llama_jax.model.cudnn import cudnn_attention
from llama_jax.model.llama import logits
from llama_jax.parallel.sharding import TRAINING

pytestmark = pytest.mark.gpu
_ERROR = 1e-2  # of the norm: bfloat16 has 8 bits


def draw(length, width, heads=8, kv_heads=2, batch=2, seed=0):
    """q, k, v and the gradient of the output, bfloat16."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=(batch, n, length, width)), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def documents(kind, batch, length, rng=None):
    """Document numbers of packed sequences."""
    rng = np.random.default_rng(1) if rng is None else rng
    if kind == "one":
        return np.ones((batch, length), np.int32)
    if kind == "two places":  # a document goes on behind another
        return np.tile(
            np.repeat([1, 2, 1], [length // 4, length // 4, length - length // 2]), (batch, 1)
        ).astype(np.int32)
    count = {"few": 5, "uneven": 2, "too many": length // 4}[kind]
    sequences = [np.sort(rng.integers(1, count + 1, length)) for _ in range(batch)]
    sequences = np.stack(sequences).astype(np.int32)
    if (
        kind == "uneven"
    ):  # sequences with one document and with many, and padding behind the last one
        sequences[0] = 1
        sequences[1, -7:] = 0
    return sequences


def error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


def check(run, arrays, seen):
    out, pull = jax.vjp(jax.jit(run), *arrays[:3])
    theirs = float64_attention(*arrays, seen)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *pull(arrays[3])), theirs):
        assert error(a, b) < _ERROR, name


@pytest.mark.parametrize(("length", "width"), [(512, 64), (1024, 128), (1000, 64)])
def test_whole_sequences_equal_float64(length, width):
    arrays = draw(length, width)
    check(
        lambda q, k, v: cudnn_attention(q, k, v, None, TRAINING),
        arrays,
        seen_by(np.arange(length), None),
    )


@pytest.mark.parametrize("kind", ["one", "few", "uneven", "too many", "two places"])
@pytest.mark.parametrize(("length", "width"), [(512, 64), (1024, 128)])
def test_documents_equal_float64(length, width, kind):
    arrays, numbers = draw(length, width), documents(kind, 2, length)
    seen = seen_by(np.arange(length), numbers)
    check(lambda q, k, v: cudnn_attention(q, k, v, jnp.asarray(numbers), TRAINING), arrays, seen)


@pytest.mark.parametrize("mask", MASKS[:4])
def test_the_row_of_the_table_is_right(mask):
    """`tests/model/test_conformance.py` shows it."""
    assert ROWS["cudnn"][MASKS.index(mask)] == EQUAL
    arrays, numbers = draw(LENGTH, 128), documents_of(mask)
    given = None if numbers is None else jnp.asarray(numbers)
    check(
        lambda q, k, v: cudnn_attention(q, k, v, given, TRAINING),
        arrays,
        seen_by(np.arange(LENGTH), numbers),
    )


def test_prompts_and_new_tokens_equal_the_forward_pass_of_the_whole():
    """The kernel fills the cache, sums read it: logits as from one pass over prompt and answer
    without any of them.
    """
    config = dataclasses.replace(TINY, head_dim=64, context_length=1024)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_parameters(config))
    prompts = random_tokens(config, (2, 700)).tolist()
    generator = Generator(params, config, dtype="bfloat16")
    assert generator.programs.model.options.attention == "cudnn"
    for prompt, answer in zip(prompts, generator.generate(prompts, 5, logprobs=0)):
        whole = jnp.asarray([prompt + answer.token_ids])
        expected = jax.nn.log_softmax(
            logits(params, whole, config, dtype="bfloat16", attention="reference")
        )[0, 699:-1]
        theirs = np.take_along_axis(np.asarray(expected), np.asarray(answer.token_ids)[:, None], 1)[
            :, 0
        ]
        np.testing.assert_allclose(answer.logprobs, theirs, atol=0.05)
