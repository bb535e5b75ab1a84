"""What a caller of the library gets wrong is answered in one sentence: what was given, what was
expected, what to do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_parameters, unrolled_parameters

import llama_jax
from llama_jax.errors import InputError
from llama_jax.model.lora import combine, init_adapters, merge
from llama_jax.parallel.sharding import TRAINING, tree_shardings

CONFIG = dataclasses.replace(TINY, layers=1, vocab_size=98)
STACKED, UNROLLED = random_parameters(CONFIG), unrolled_parameters(CONFIG)
TOKENS, LENGTHS = jnp.zeros((1, 4), jnp.int32), jnp.asarray([4])
ADAPTERS = init_adapters(jax.random.key(0), CONFIG, 2, ("wq",))
MODULE = llama_jax.Llama(CONFIG)


def rollout(sampling, lengths=LENGTHS):
    return llama_jax.generate_tokens(MODULE, STACKED, TOKENS, lengths, sampling, (), 3, 2)


def to_nnx():
    from flax import nnx

    return nnx.bridge.ToNNX(MODULE, rngs=nnx.Rngs(0))


CASES = [
    (
        lambda: llama_jax.quantize(combine(STACKED, ADAPTERS, 1.0)),
        "parameters with adapters over them given",
    ),
    (
        lambda: combine(UNROLLED, ADAPTERS, 1.0),
        "adapters of layers/attention/wq given .*; both stacked",
    ),
    (
        lambda: merge(UNROLLED, ADAPTERS, 1.0),
        "adapters of layers/attention/wq given .*; both stacked",
    ),
    (
        lambda: MODULE.apply({"params": UNROLLED}, TOKENS),
        r"unrolled parameters given .* llama_jax.stack\(params\)",
    ),
    (
        lambda: llama_jax.logits(STACKED, [[1, 2]], CONFIG),
        r"inputs: a list given; an array of token ids",
    ),
    (
        lambda: llama_jax.logits(STACKED, TOKENS[0], CONFIG),
        r"inputs: int32 of shape \[4\] .*inputs\[None\]",
    ),
    (
        lambda: llama_jax.logits(STACKED, jnp.zeros((4, 48)), CONFIG),
        r"inputs: float32 of shape \[4, 48\] .*\[B, T, D\]",
    ),
    (
        lambda: llama_jax.hidden_states(STACKED, np.zeros(4, int), CONFIG),
        r"inputs: int64 of shape \[4\] given",
    ),
    (lambda: llama_jax.mean_loss(STACKED, [[1, 2]], CONFIG), "inputs: a list given"),
    (
        lambda: llama_jax.mean_loss(STACKED, jnp.zeros((1, 4, 48)), CONFIG),
        "tokens: float32 given; token ids",
    ),
    (
        lambda: llama_jax.logits(STACKED, TOKENS, CONFIG, dtyp="bfloat16"),
        "option 'dtyp' is unknown; the nearest is dtype",
    ),
    (
        lambda: llama_jax.Generator(STACKED, CONFIG, scan=True),
        "option scan given; stacked or unrolled parameters say it",
    ),
    (
        lambda: llama_jax.logits({"params": STACKED}, TOKENS, CONFIG),
        "params: a tree of params given; .* load",
    ),
    (
        lambda: to_nnx()(TOKENS),
        r"no parameters given; .* after ToNNX\(...\) first .lazy_init\(tokens\)",
    ),
    (
        lambda: rollout(llama_jax.make_sampling(1)),
        r"sampling for 1 sequences given .* make_sampling\(2, ...\)",
    ),
    (
        lambda: llama_jax.logits(STACKED, TOKENS, dataclasses.replace(CONFIG, dim=24)),
        r"params: an embedding of shape \[98, 48\] given with a config of \[98, 24\]",
    ),
    (
        lambda: llama_jax.logits(STACKED, jnp.zeros((1, 4, 7)), CONFIG),
        r"inputs: float32 of shape \[1, 4, 7\] given; embeddings \[B, T, 48\] expected",
    ),
    (
        lambda: MODULE.apply({"params": STACKED}, TOKENS[0]),
        r"inputs: int32 of shape \[4\] .*inputs\[None\]",
    ),
    (lambda: llama_jax.embed(STACKED, [[1]]), "inputs: a list given"),
    (lambda: llama_jax.embed(STACKED, jnp.zeros((1, 4, 48))), "tokens: float32 given"),
    (
        lambda: llama_jax.generate_tokens(
            MODULE, STACKED, [[1, 2]], LENGTHS, llama_jax.make_sampling(1), (), 3
        ),
        "inputs: a list given",
    ),
    (
        lambda: rollout(llama_jax.make_sampling(2), jnp.asarray([4, 4])),
        r"lengths of shape \[2\] given for 1 prompts",
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_one_sentence_says_what_is_wrong(number):
    call, words = CASES[number]
    with pytest.raises(InputError, match=f"^{words}[^\n]*"):
        call()


def test_rollouts_on_a_mesh_with_context():
    """Rows are kept whole, as by a generator: the same tokens as on one device."""
    run = jax.jit(llama_jax.generate_tokens, static_argnums=(0, 6, 7))
    sampling = llama_jax.make_sampling(2, 1.0, seed=3)
    expected = run(MODULE, STACKED, TOKENS, LENGTHS, sampling, (), 3, 2)
    mesh = llama_jax.make_mesh(fsdp=1, context=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(STACKED, tree_shardings(STACKED, mesh, TRAINING))
        assert (
            run(MODULE, placed, TOKENS, LENGTHS, sampling, (), 3, 2).tokens.tolist()
            == expected.tokens.tolist()
        )


def test_decoding_that_gathers_every_weight_is_said():
    mesh = llama_jax.make_mesh(fsdp=2, devices=jax.devices()[:2])
    with pytest.warns(
        UserWarning, match="a mesh with fsdp 2 given: every decoding step gathers every weight"
    ):
        llama_jax.Generator(STACKED, CONFIG, mesh)
