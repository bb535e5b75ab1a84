"""Decoding as pure functions: step by step equals all at once, rows end when they should, and so does the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, VARIANTS, random_parameters, random_tokens

from llama_jax.errors import InputError
from llama_jax.generation import decode
from llama_jax.generation.decode import NOTHING, advance, begin, generate_tokens, prefill
from llama_jax.generation.generate import Generator
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import Llama, logits
from llama_jax.model.options import ModelOptions
from llama_jax.weights.forms import unstack

LENGTHS = jnp.asarray([1, 7, 12, 20], jnp.int32)
STEPS = 12
NO_STOP = jnp.zeros((4, 0), jnp.int32)


def in_form(params, scan: bool):
    return params if scan else unstack(params)


@pytest.mark.parametrize(("variant", "scan"), [
    ("gqa-untied", True), ("gqa-untied", False), ("llama3-factor8", True), ("mqa-tied", False), ("wide-head", False),
])  # fmt: skip
def test_decoding_equals_the_full_pass(variant, scan):
    """Logits after a prefill of unequal prompts and after each step, for every row."""
    config = VARIANTS[variant]
    params = random_parameters(config)
    model = Llama(config, ModelOptions(scan=scan))
    texts = random_tokens(config, (4, 20 + STEPS))
    expected = np.asarray(logits(params, texts, config, attention="reference"))
    rows = np.arange(4)
    padding = random_tokens(config, (4, 24), seed=1)
    prompts = jnp.where(jnp.arange(24) < LENGTHS[:, None], texts[:, :24], padding)
    cache = init_cache(config, 4, 40, scan=scan)
    got, cache = jax.jit(functools.partial(prefill, model))(in_form(params, scan), prompts, LENGTHS, cache)
    np.testing.assert_allclose(got, expected[rows, LENGTHS - 1], atol=1e-4, rtol=0)
    step = jax.jit(functools.partial(decode.decode, model))
    for i in range(STEPS):
        got, cache = step(in_form(params, scan), texts[rows, LENGTHS + i], cache)
        np.testing.assert_allclose(got, expected[rows, LENGTHS + i], atol=1e-4, rtol=0)
    assert cache.lengths.tolist() == (LENGTHS + STEPS).tolist()


@pytest.fixture(scope="module")
def tiny():
    """(model, unrolled parameters, prompts, lengths) of a tiny LLaMA."""
    return (
        Llama(TINY, ModelOptions(scan=False)),
        unstack(random_parameters(TINY)),
        random_tokens(TINY, (4, 20), seed=2),
        LENGTHS,
    )


@functools.partial(jax.jit, static_argnums=0)
def _start(model, params, prompts, lengths, budget):
    logits, cache = prefill(model, params, prompts, lengths, init_cache(TINY, 4, 64))
    return begin(logits, cache, make_sampling(4, 1.0), NO_STOP, budget, None)


def start(tiny, budget):
    progress, drawn = _start(*tiny, jnp.asarray(budget, jnp.int32))
    return progress, drawn.token


def test_first_token_and_budget(tiny):
    progress, drawn = start(tiny, [0, 1, 2, 9])
    assert drawn[0] == NOTHING
    assert (drawn[1:] >= 0).all()
    assert progress.done.tolist() == [True, True, False, False]
    assert progress.cache.lengths.tolist() == LENGTHS.tolist()


@pytest.mark.parametrize(("budget", "steps", "iterations"), [
    ([1, 3, 5, 2], 30, 4), ([1, 1, 1, 1], 30, 0), ([9, 20, 0, 1], 6, 6),
])  # fmt: skip
def test_the_loop_ends_with_the_last_row(tiny, monkeypatch, budget, steps, iterations):
    """Counted where every iteration must pass: the forward pass of one token."""
    count = []
    real = decode.decode

    def counted(*args):
        jax.debug.callback(lambda: count.append(1))
        return real(*args)

    monkeypatch.setattr(decode, "decode", counted)
    progress, first = start(tiny, budget)
    progress, out = advance(tiny[0], tiny[1], progress, make_sampling(4, 1.0), NO_STOP, steps, room=32)
    jax.effects_barrier()
    assert len(count) == iterations
    tokens = np.concatenate([first[:, None], out.token], axis=1)
    assert (tokens != NOTHING).sum(axis=1).tolist() == [min(b, steps + 1) for b in budget]
    assert progress.cache.lengths.tolist() == [int(n) + max(0, min(b - 1, steps)) for n, b in zip(LENGTHS, budget)]


def test_rows_end_at_their_own_stop_token(tiny):
    """Each row is what it is without stop tokens, cut behind the first of them."""
    run = jax.jit(generate_tokens, static_argnums=(0, 6))
    free = np.asarray(run(*tiny, make_sampling(4, 1.0), jnp.full((3,), NOTHING), 24).tokens)
    stops = [int(free[0, 3]), int(free[1, 15]), int(free[2, 0])]
    got = np.asarray(run(*tiny, make_sampling(4, 1.0), jnp.asarray(stops), 24).tokens)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), 24) for row in free.tolist()]
    assert len(set(ends)) >= 3
    assert got.tolist() == [row[:end] + [NOTHING] * (24 - end) for row, end in zip(free.tolist(), ends)]


def test_inside_a_larger_program(tiny):
    """`generate_tokens` under another function's jit gives what the generator gives."""
    model, params, prompts, lengths = tiny
    sampling = make_sampling(4, [0.0, 1.0, 0.0, 0.7], seed=3)

    @jax.jit
    def reward(params, prompts, lengths):
        tokens = generate_tokens(model, params, prompts, lengths, sampling, NO_STOP, 10).tokens
        return tokens, (tokens > 50).sum()

    tokens, count = reward(params, prompts, lengths)
    lists = [row[:length] for row, length in zip(prompts.tolist(), lengths.tolist())]
    expected = [row.token_ids for row in Generator(params, TINY).generate(lists, 10, sampling)]
    assert tokens.tolist() == expected
    assert count == (np.asarray(expected) > 50).sum()


@pytest.mark.parametrize("new", [0, 1])
def test_few_new_tokens(tiny, new):
    rollout = jax.jit(generate_tokens, static_argnums=(0, 6))(*tiny, make_sampling(4), NO_STOP, new)
    assert rollout.tokens.shape == rollout.logprobs.shape == (4, new)
    assert (rollout.tokens != NOTHING).all()


def test_a_negative_limit_is_named(tiny):
    with pytest.raises(InputError, match="max_new_tokens: -1 given; 0 or more expected"):
        generate_tokens(*tiny, make_sampling(4), NO_STOP, -1)


def test_a_limit_beyond_the_context_is_named(tiny):
    """The shapes tell, so that no rotary angle beyond the context is ever taken."""
    length, context = tiny[2].shape[1], TINY.context_length
    run = jax.jit(generate_tokens, static_argnums=(0, 6))
    with pytest.raises(InputError, match=rf"prompts of {length} tokens with max_new_tokens {context - length + 1} given; 128"):
        run(*tiny, make_sampling(4), NO_STOP, context - length + 1)
    assert run(*tiny, make_sampling(4), NO_STOP, context - length).tokens.shape == (4, context - length)
    with pytest.raises(InputError, match=r"max_new_tokens: 2\.5 given; a whole number expected"):
        run(*tiny, make_sampling(4), NO_STOP, 2.5)


def test_stop_tokens_in_a_list(tiny):
    free = np.asarray(generate_tokens(*tiny, make_sampling(4), NO_STOP, 6).tokens)
    stops = [int(free[0, 2])], jnp.asarray(free[0, 2:3])
    got, expected = (generate_tokens(*tiny, make_sampling(4), ends, 6).tokens.tolist() for ends in stops)
    assert got == expected != free.tolist()


def test_log_probabilities_are_those_of_the_full_pass(tiny):
    """Of the model itself, whatever the temperature and the limits; 0 behind a row's end."""
    _, params, prompts, lengths = tiny
    sampling = make_sampling(8, 0.7, top_k=20, repetition_penalty=1.3, seed=2)
    free = jax.jit(generate_tokens, static_argnums=(0, 6, 7))(*tiny, sampling, NO_STOP[:1], 10, 2)
    stop = free.tokens[0, 4]
    rollout = jax.jit(generate_tokens, static_argnums=(0, 6, 7))(*tiny, sampling, stop[None], 10, 2)
    for row, (tokens, logprobs) in enumerate(zip(rollout.tokens.tolist(), rollout.logprobs)):
        new = [token for token in tokens if token != NOTHING]
        prompt = prompts[row // 2, : lengths[row // 2]].tolist()
        every = jax.nn.log_softmax(logits(params, jnp.asarray([prompt + new]), TINY)[0].astype(jnp.float32))
        expected = every[np.arange(len(prompt) - 1, len(prompt) + len(new) - 1), np.asarray(new)]
        np.testing.assert_allclose(logprobs[: len(new)], expected, atol=1e-4)
        assert (logprobs[len(new) :] == 0).all()
    assert (rollout.tokens[0] == NOTHING).sum() == 5


def test_samples_of_one_prompt_share_its_prefill(tiny):
    """What each is does not depend on it: the same as prompts given again and again."""
    model, params, prompts, lengths = tiny
    sampling = make_sampling(12, 1.0, seed=7)
    run = jax.jit(generate_tokens, static_argnums=(0, 6, 7))
    together = run(*tiny, sampling, NO_STOP[:1], 8, 3)
    origin = jnp.repeat(jnp.arange(4), 3)
    apart = run(model, params, prompts[origin], lengths[origin], sampling, NO_STOP[:1], 8, 1)
    assert together.tokens.tolist() == apart.tokens.tolist()
    assert len({tuple(row) for row in together.tokens.tolist()}) == 12
