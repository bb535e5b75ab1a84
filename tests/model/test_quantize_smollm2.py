"""What narrower weights and a narrower cache cost a real model: bits per byte of a text, and bytes
in memory.
"""

import math
import pydoc_data.topics

import jax
import jax.numpy as jnp
import pytest

from llama_jax.model.cache import Cache, init_cache
from llama_jax.model.llama import apply, model_for
from llama_jax.model.quantize import parameter_bytes, quantize
from llama_jax.weights.assemble import stack

pytestmark = pytest.mark.smollm2

ROWS, LENGTH, PIECE = 2, 256, 64  # pieces go through the cache one after the other, as in decoding


@pytest.fixture(scope="module")
def text(smollm2_model):
    """About 2 KB of Python's own help as rows of tokens, and its bytes."""
    words = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "typesseq"))
    ids = smollm2_model.tokenizer.encode(words)[: ROWS * LENGTH]
    return jnp.asarray(ids).reshape(ROWS, LENGTH), len(smollm2_model.tokenizer.decode(ids).encode())


def bits_per_byte(params, config, text, **options) -> float:
    """Of every token after the first of its row, given those before it in the row."""
    tokens, size = text
    model = model_for(params, config, **options)
    slots = (ROWS, LENGTH, model.options.resolved_cache_dtype, model.options.scan)

    @jax.jit
    def piece(params, cache, now, targets):
        features = apply(model, params, now, None, cache, method="features")
        found = jax.nn.log_softmax(apply(model, params, features.last, method="unembed"))
        lengths = cache.lengths + PIECE
        return jnp.sum(
            jnp.take_along_axis(found, targets[..., None], -1)[..., 0] * (targets >= 0)
        ), Cache(features.cache.layers, lengths)

    total, cache = 0.0, init_cache(config, *slots)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    for at in range(0, LENGTH, PIECE):
        part, cache = piece(params, cache, tokens[:, at : at + PIECE], targets[:, at : at + PIECE])
        total -= float(part)
    return total / math.log(2) / size


def test_cost_of_narrow_weights_and_caches(smollm2_model, text):
    config, params = (
        smollm2_model.config,
        stack(smollm2_model.params),
    )  # so that one layer is compiled, and not thirty
    narrow = {"int8": quantize(params, 8), "int4": quantize(params, 4)}
    exact = bits_per_byte(params, config, text)
    cost = {name: bits_per_byte(held, config, text) / exact - 1 for name, held in narrow.items()}
    cost["int8 cache"] = bits_per_byte(params, config, text, cache_dtype="int8") / exact - 1
    print(
        f"float32: {exact:.4f} bits per byte of {text[1]} bytes;",
        {k: f"{100 * v:+.2f} %" for k, v in cost.items()},
    )
    assert 0.5 < exact < 2  # a model that reads
    assert abs(cost["int8"]) < 0.005
    assert abs(cost["int8 cache"]) < 0.005
    assert 0 < cost["int4"] < 0.08
    table = config.vocab_size * config.dim + 4 * config.vocab_size
    norms = 4 * config.dim * (2 * config.layers + 1)
    matrices = (
        sum(leaf.size for leaf in jax.tree.leaves(smollm2_model.params) if leaf.ndim == 2)
        - config.vocab_size * config.dim
    )
    channels = config.layers * (
        2 * config.heads * config.head_dim
        + 2 * config.kv_heads * config.head_dim
        + 2 * config.ffn_dim
        + config.dim
    )
    assert parameter_bytes(narrow["int8"]) == table + norms + matrices + 4 * channels
    assert parameter_bytes(narrow["int4"]) == table + norms + matrices * 17 // 32 + 4 * channels
