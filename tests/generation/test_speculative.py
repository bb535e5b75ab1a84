"""Speculative decoding: whatever is proposed, the tokens are those of the model alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_parameters

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator, Speculation
from llama_jax.generation.sampling import make_sampling
from llama_jax.generation.speculative import Draft, judge, look_up
from llama_jax.weights.forms import unstack

CONFIG = dataclasses.replace(TINY, layers=2, context_length=256)
PARAMS = unstack(random_parameters(CONFIG))
PROMPTS = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in (6, 17, 40)] + [[3, 4, 5] * 8]


@pytest.fixture(scope="module")
def generator():
    return Generator(PARAMS, CONFIG)


def drafts():
    """A draft model that knows nothing, one that is nearly the model, and the model itself."""
    near = jax.tree.map(lambda x: x * 1.02, PARAMS)
    other = dataclasses.replace(CONFIG, layers=1, dim=24, context_length=64)
    stranger = Generator(unstack(random_parameters(other, seed=8)), other)
    return {"look-up": None, "stranger": stranger, "near": Generator(near, CONFIG), "itself": Generator(PARAMS, CONFIG)}


@pytest.mark.parametrize(("kind", "tokens"), [("look-up", 1), ("look-up", 4), ("stranger", 3), ("near", 4)])
def test_greedy_text_is_the_same(generator, kind, tokens):
    """With stop tokens, limits a row, log-probabilities and a growing cache; at temperature 0 exactly."""
    free = generator.generate(PROMPTS, 70, logprobs=2)  # one cache to begin with, one that has grown
    stops = [free[0].token_ids[5], free[1].token_ids[60]]
    plain = generator.generate(PROMPTS, 70, stop_ids=stops, logprobs=2)
    got = generator.generate(PROMPTS, 70, stop_ids=stops, logprobs=2, speculation=Speculation(tokens, drafts()[kind]))
    for mine, expected in zip(got, plain):
        assert mine.token_ids == expected.token_ids
        assert mine.stop_reason == expected.stop_reason
        np.testing.assert_allclose(mine.logprobs, expected.logprobs, atol=1e-4)
        assert [[token for token, _ in best] for best in mine.top_logprobs] == [
            [token for token, _ in best] for best in expected.top_logprobs
        ]


def rounds(generator, speculation, new=60) -> int:
    """Passes of the model that a text of one prompt takes."""
    session = generator.start(PROMPTS[3:], new, make_sampling(1, 0.0), speculation=speculation)
    return sum(1 for _ in session.stream(1))


def test_good_proposals_save_passes(generator):
    plain = rounds(generator, None)
    assert rounds(generator, Speculation(4, drafts()["itself"])) <= plain / 5 + 3
    assert rounds(generator, Speculation(4, drafts()["stranger"])) <= plain


V = 12
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.8)])
@pytest.mark.parametrize("kind", ["drawn", "one"])
def test_the_first_token_is_distributed_as_without(kind, temperature, top_k, top_p):
    """Proposals from another distribution, or always the same: the frequencies of what is drawn are the model's own."""
    draws = 20_000
    logits, guess = RNG.normal(0, 1.5, (2, V)), RNG.normal(0, 1.5, V)
    sampling = make_sampling(draws, temperature, top_k, top_p, seed=list(range(draws)))
    p = np.exp(logits[0] / temperature)
    order = np.argsort(-p)
    p[order[top_k or V :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    q = np.exp(guess) / np.exp(guess).sum()
    proposed = RNG.choice(V, size=(draws, 1), p=q) if kind == "drawn" else np.full((draws, 1), order[0])
    probabilities = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (draws, 1, V)) if kind == "drawn" else None
    every = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 2, V))
    tokens, count = jax.jit(judge)(every, Draft(jnp.asarray(proposed), probabilities), sampling, jnp.full(draws, 5))
    first = np.bincount(tokens[:, 0], minlength=V) / draws
    assert (np.abs(first - p) <= 4 * np.sqrt(p * (1 - p) / draws) + 1e-12).all()
    kept = np.asarray(count) == 2
    overlap = np.minimum(p, q).sum() if kind == "drawn" else p[order[0]]
    assert abs(kept.mean() - overlap) <= 4 * np.sqrt(0.25 / draws)  # as many as any scheme can keep (arXiv:2211.17192)


def test_texts_are_distributed_as_without(generator):
    """Two tokens of the real loop at temperature 1, with a draft that is near: pairs against the model's own."""
    config = dataclasses.replace(CONFIG, vocab_size=5)
    params = unstack(random_parameters(config, std=0.4))
    near = Generator(jax.tree.map(lambda x: x * 0.9, params), config)
    model, rows = Generator(params, config), 2000
    counts = []
    for seed, speculation in ((0, None), (5000, Speculation(2, near)), (9000, Speculation(2))):
        texts = model.generate([[1, 2]], 4, make_sampling(rows, 1.0, seed=seed), samples=rows, speculation=speculation)
        last = np.asarray([row.token_ids for row in texts])
        counts.append(np.bincount(last[:, 1] * 25 + last[:, 2] * 5 + last[:, 3], minlength=125) / rows)
    for other in counts[1:]:
        error = np.sqrt((counts[0] + other) / rows)
        assert (np.abs(other - counts[0]) <= 4.5 * error + 2 / rows).all()
        assert np.abs(other - counts[0]).sum() < 0.25


def test_look_up():
    """The latest of the longest matches; a repetition goes on; nothing found proposes something all the same."""
    rows = [[1, 2, 3, 9, 1, 2, 3, 0, 0, 0], [7, 7, 7, 0, 0, 0, 0, 0, 0, 0], [1, 2, 1, 2, 1, 0, 0, 0, 0, 0],
            [5, 1, 2, 8, 3, 2, 4, 1, 2, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0]]  # fmt: skip
    found = look_up(jnp.asarray(rows), jnp.asarray([6, 2, 4, 8, 5]), 4)
    assert found[:4].tolist() == [[9, 1, 2, 3], [7, 7, 7, 7], [2, 1, 2, 1], [8, 3, 2, 4]]


def test_what_cannot_be_done(generator):
    with pytest.raises(InputError, match=r"speculation.tokens: 0 given; 1 or more expected"):
        generator.generate([[1]], 3, speculation=Speculation(0))
    with pytest.raises(InputError, match="penalties given together with speculation"):
        generator.generate([[1]], 3, make_sampling(1, repetition_penalty=1.2), speculation=Speculation(3))
    other = dataclasses.replace(CONFIG, vocab_size=50)
    with pytest.raises(InputError, match="the draft model has 50 tokens and the model 97"):
        generator.generate([[1]], 3, speculation=Speculation(3, Generator(unstack(random_parameters(other)), other)))
