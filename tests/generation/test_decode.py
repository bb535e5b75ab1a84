"""Decoding as pure functions: step by step equals all at once, sequences end when they should, and
so does the loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    TINY,
    VARIANTS,
    float64_logits,
    float64_logprobs,
    random_parameters,
    random_tokens,
    unrolled_parameters,
)

from llama_jax.errors import InputError
from llama_jax.generation import decode
from llama_jax.generation.decode import NOTHING, advance, begin, generate_tokens, prefill
from llama_jax.generation.generate import Generator
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions

CONFIG = dataclasses.replace(TINY, layers=2)
LENGTHS = jnp.asarray([1, 7, 12, 20], jnp.int32)
STEPS = 12
NO_STOP = jnp.zeros((4, 0), jnp.int32)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "scan"),
    [
        ("llama3-factor8", True),
        ("mqa-tied", False),
        pytest.param("gqa-untied", True, marks=slow),
        pytest.param("gqa-untied", False, marks=slow),
        pytest.param("wide-head", False, marks=slow),
    ],
)
def test_decoding_equals_the_full_pass(variant, scan):
    """Logits after a prefill of unequal prompts and after each step, for every sequence."""
    config = dataclasses.replace(VARIANTS[variant], layers=2)
    params = random_parameters(config) if scan else unrolled_parameters(config)
    model = Llama(config, ModelOptions(scan=scan))
    texts, padding = (
        np.asarray(random_tokens(config, *how)) for how in (((4, 20 + STEPS),), ((4, 24), 1))
    )
    expected = float64_logits(params, texts, config)
    sequences, lengths = np.arange(4), np.asarray(LENGTHS)
    prompts = np.where(np.arange(24) < lengths[:, None], texts[:, :24], padding)
    start = jax.jit(
        lambda params, *prompts: prefill(
            model, params, *prompts, init_cache(config, 4, 40, scan=scan)
        )
    )
    got, cache = start(params, prompts, lengths)
    np.testing.assert_allclose(got, expected[sequences, lengths - 1], atol=1e-4, rtol=0)
    step = jax.jit(functools.partial(decode.decode, model))
    for i in range(STEPS):
        got, cache = step(params, texts[sequences, lengths + i], cache)
        np.testing.assert_allclose(got, expected[sequences, lengths + i], atol=1e-4, rtol=0)
    assert cache.lengths.tolist() == (lengths + STEPS).tolist()


@pytest.fixture(scope="module")
def tiny():
    """(model, unrolled parameters, prompts, lengths) of a tiny LLaMA."""
    params, prompts = unrolled_parameters(CONFIG), random_tokens(CONFIG, (4, 20), seed=2)
    return Llama(CONFIG, ModelOptions(scan=False)), params, prompts, LENGTHS


@functools.partial(jax.jit, static_argnums=0)
def _start(model, params, prompts, lengths, budget):
    logits, cache = prefill(model, params, prompts, lengths, init_cache(CONFIG, 4, 64))
    return begin(logits, cache, make_sampling(4, 1.0), NO_STOP, budget, None)


def start(tiny, budget):
    progress, drawn = _start(*tiny, np.asarray(budget, np.int32))
    return progress, np.asarray(drawn.token)


def test_first_token_and_budget(tiny):
    progress, drawn = start(tiny, [0, 1, 2, 9])
    assert drawn[0] == NOTHING
    assert (drawn[1:] >= 0).all()
    assert progress.done.tolist() == [True, True, False, False]
    assert progress.cache.lengths.tolist() == LENGTHS.tolist()


def test_the_loop_ends_with_the_last_sequence(tiny, monkeypatch):
    """Counted where every iteration must pass: the forward pass of one token."""
    count = []
    real = decode.decode

    def counted(*args):
        jax.debug.callback(lambda: count.append(1))
        return real(*args)

    monkeypatch.setattr(decode, "decode", counted)
    run = jax.jit(
        lambda *args: advance(
            tiny[0], args[0], args[1], make_sampling(4, 1.0), NO_STOP, args[2], room=32
        )
    )
    for budget, steps, iterations in (
        ([1, 3, 5, 2], 30, 4),
        ([1, 1, 1, 1], 30, 0),
        ([9, 20, 0, 1], 6, 6),
    ):
        count.clear()
        progress, first = start(tiny, budget)
        progress, out = run(tiny[1], progress, steps)
        jax.effects_barrier()
        assert len(count) == iterations
        tokens = np.concatenate([first[:, None], np.asarray(out.token)], axis=1)
        assert (tokens != NOTHING).sum(axis=1).tolist() == [min(b, steps + 1) for b in budget]
        ends = [int(n) + max(0, min(b - 1, steps)) for n, b in zip(LENGTHS.tolist(), budget)]
        assert progress.cache.lengths.tolist() == ends


NEW = 20


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def rollout(model, params, prompts, lengths, sampling, stop_ids, new, samples=1):
    """`generate_tokens` inside a larger program; most tests run it with the same shapes."""
    found = generate_tokens(model, params, prompts, lengths, sampling, stop_ids, new, samples)
    return found, (found.tokens > 50).sum()


def penalised(sequences, seed):
    """With all that a draw looks at."""
    return make_sampling(
        sequences,
        [0.0, 1.0, 0.0, 0.7][:sequences] * (sequences // 4),
        top_k=20,
        repetition_penalty=1.3,
        seed=seed,
    )


def tokens_of(tiny, sampling, stops=(NOTHING,) * 3):
    return np.asarray(rollout(*tiny, sampling, np.asarray(stops, np.int32), NEW)[0].tokens)


def test_rows_end_at_their_own_stop_token(tiny):
    """Each sequence is what it is without stop tokens, cut behind the first of them; the stops in
    an array or in a list.
    """
    sampling = penalised(4, 0)
    free = tokens_of(tiny, sampling)
    stops = [int(free[0, 3]), int(free[1, 12]), int(free[2, 0])]
    ends = [
        next((i + 1 for i, token in enumerate(sequence) if token in stops), NEW)
        for sequence in free.tolist()
    ]
    assert len(set(ends)) >= 3
    expected = [
        sequence[:end] + [NOTHING] * (NEW - end) for sequence, end in zip(free.tolist(), ends)
    ]
    assert tokens_of(tiny, sampling, stops).tolist() == expected
    in_a_list = jax.jit(lambda *args: generate_tokens(tiny[0], *args, stops, NEW).tokens)
    assert in_a_list(*tiny[1:], sampling).tolist() == expected


def test_inside_a_larger_program(tiny):
    """`generate_tokens` under another function's jit gives what the generator gives."""
    _, params, prompts, lengths = tiny
    sampling = penalised(4, 3)
    found, count = rollout(*tiny, sampling, np.full(3, NOTHING, np.int32), NEW)
    lists = [sequence[:length] for sequence, length in zip(prompts.tolist(), lengths.tolist())]
    expected = [
        sequence.token_ids for sequence in Generator(params, CONFIG).generate(lists, NEW, sampling)
    ]
    assert found.tokens.tolist() == expected
    assert count == (np.asarray(expected) > 50).sum()


def test_few_new_tokens(tiny):
    """None, one, and as many as the context leaves."""
    run = jax.jit(generate_tokens, static_argnums=(0, 6))
    one = run(*tiny, make_sampling(4), NO_STOP, 1)
    assert one.tokens.shape == one.logprobs.shape == (4, 1)
    assert (np.asarray(one.tokens) != NOTHING).all()
    for new in (0, CONFIG.context_length - 20):
        shapes = jax.eval_shape(
            lambda *args, new=new: run(tiny[0], *args, new), *tiny[1:], make_sampling(4), NO_STOP
        )
        assert shapes.tokens.shape == shapes.logprobs.shape == (4, new)


def test_a_negative_limit_is_named(tiny):
    with pytest.raises(InputError, match="max_new_tokens: -1 given; 0 or more expected"):
        generate_tokens(*tiny, make_sampling(4), NO_STOP, -1)


def test_a_limit_beyond_the_context_is_named(tiny):
    """The shapes tell, so that no rotary angle beyond the context is ever taken."""
    length, context = tiny[2].shape[1], CONFIG.context_length
    run = jax.jit(generate_tokens, static_argnums=(0, 6))
    with pytest.raises(
        InputError,
        match=rf"prompts of {length} tokens with max_new_tokens {context - length + 1} given; 128",
    ):
        run(*tiny, make_sampling(4), NO_STOP, context - length + 1)
    with pytest.raises(InputError, match=r"max_new_tokens: 2\.5 given; a whole number expected"):
        run(*tiny, make_sampling(4), NO_STOP, 2.5)


def test_samples_share_a_prefill_and_log_probabilities_are_those_of_the_full_pass(tiny):
    """What each sample is does not depend on the others: the same as prompts given again and again.

    Log-probabilities are of the model itself, whatever the temperature and the limits; 0 behind a
    sequence's end.
    """
    _, params, prompts, lengths = tiny
    seeds = np.arange(12).reshape(4, 3) + 7
    warm = lambda sequences, seed: make_sampling(
        sequences, 0.9, top_k=20, repetition_penalty=1.3, seed=seed.tolist()
    )
    nothing = np.full(3, NOTHING, np.int32)
    apart = np.stack(
        [tokens_of(tiny, warm(4, seeds[:, sample])) for sample in range(3)], axis=1
    ).reshape(12, NEW)
    assert len({tuple(sequence) for sequence in apart.tolist()}) == 12
    stop = int(apart[0, 4])
    together, _ = rollout(*tiny, warm(12, seeds.ravel()), np.asarray([stop, *nothing[1:]]), NEW, 3)
    ends = [sequence.index(stop) + 1 if stop in sequence else NEW for sequence in apart.tolist()]
    assert ends[0] <= 5
    for sequence, end in enumerate(ends):
        tokens, logprobs = (
            np.asarray(together.tokens)[sequence],
            np.asarray(together.logprobs)[sequence],
        )
        assert tokens.tolist() == apart[sequence, :end].tolist() + [NOTHING] * (NEW - end)
        prompt = np.asarray(prompts)[sequence // 3, : np.asarray(lengths)[sequence // 3]].tolist()
        every = float64_logprobs(params, prompt + tokens[:end].tolist(), CONFIG)
        expected = every[np.arange(len(prompt) - 1, len(prompt) + end - 1), tokens[:end]]
        np.testing.assert_allclose(logprobs[:end], expected, atol=1e-4)
        assert (logprobs[end:] == 0).all()
