"""Speculative decoding: whatever is proposed, the tokens are those of the model alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support import (
    TINY,
    float64_logits,
    float64_logprobs,
    greedy_continues,
    random_parameters,
    unrolled_parameters,
)

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator, Speculation
from llama_jax.generation.sampling import make_sampling
from llama_jax.generation.speculative import Draft, judge, look_up

CONFIG = dataclasses.replace(TINY, layers=2, context_length=320)
PARAMS = random_parameters(CONFIG)
PROMPTS = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in (6, 17, 40)] + [
    [3, 4, 5] * 8
]


@pytest.fixture(scope="module")
def generator():
    return Generator(PARAMS, CONFIG)


def drafts():
    """A draft model that knows nothing, one that is nearly the model, and the model itself."""
    near = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.02), PARAMS)
    other = dataclasses.replace(CONFIG, layers=1, dim=24, context_length=64)
    stranger = Generator(unrolled_parameters(other, seed=8), other)
    return {
        "look-up": None,
        "stranger": stranger,
        "near": Generator(near, CONFIG),
        "itself": Generator(PARAMS, CONFIG),
    }


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        pytest.param("look-up", 1, marks=pytest.mark.slow),
        ("look-up", 4),
        ("stranger", 3),
        ("near", 4),
        ("itself", 4),
    ],
)
def test_greedy_text_is_the_same(generator, kind, tokens):
    """With stop tokens of two sequences, limits and log-probabilities; at temperature 0 exactly.
    Good proposals save passes.
    """
    stops = [[60], [77], [], []]
    speculation = Speculation(tokens, drafts()[kind])
    session = generator.start(PROMPTS, 70, stop_ids=stops, logprobs=2, speculation=speculation)
    steps = sum(1 for _ in session.stream(1))
    sequences = [session.tokens(sequence) for sequence in range(4)]
    assert [len(sequence.token_ids) for sequence in sequences] == [6, 57, 70, 70]
    assert [sequence.stop_reason for sequence in sequences] == ["stop", "stop", "length", "length"]
    for prompt, sequence, stop in zip(PROMPTS, sequences, stops):
        every = float64_logprobs(PARAMS, prompt + sequence.token_ids, CONFIG)[len(prompt) - 1 : -1]
        assert sequence.token_ids == every.argmax(-1).tolist()
        assert not set(stop) & set(sequence.token_ids[:-1])
        np.testing.assert_allclose(
            sequence.logprobs, every[np.arange(len(every)), sequence.token_ids], atol=1e-4
        )
        assert [[token for token, _ in best] for best in sequence.top_logprobs] == np.argsort(
            -every
        )[:, :2].tolist()
    # Without speculation a pass a token, and one to see that all is done; the model itself is never
    # wrong about the next five.
    assert steps <= (70 / 5 + 3 if kind == "itself" else 71)


@pytest.mark.parametrize("kind", ["look-up", pytest.param("near", marks=pytest.mark.slow)])
def test_a_growing_cache_changes_nothing(generator, kind):
    """Nor does a text that has to grow with it, nor a draft model's own cache."""
    session = generator.start(PROMPTS[:1], 310, speculation=Speculation(4, drafts()[kind]))
    before = session._progress.cache.slots
    list(session.stream(32))
    assert session._progress.cache.slots > before
    text = session.tokens(0).token_ids
    assert len(text) == 310
    assert greedy_continues(PARAMS, PROMPTS[0], text, CONFIG)


V = 12
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.8)]
)
@pytest.mark.parametrize("kind", ["drawn", "one"])
def test_the_first_token_is_distributed_as_without(kind, temperature, top_k, top_p):
    """DraftState from another distribution, or always the same: the frequencies of what is drawn
    are the model's own.
    """
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
    proposed = (
        RNG.choice(V, size=(draws, 1), p=q) if kind == "drawn" else np.full((draws, 1), order[0])
    )
    probabilities = (
        np.broadcast_to(q.astype(np.float32), (draws, 1, V)) if kind == "drawn" else None
    )
    every = np.broadcast_to(logits.astype(np.float32), (draws, 2, V))
    tokens, count = jax.jit(judge)(
        every,
        Draft(proposed.astype(np.int32), probabilities),
        sampling,
        np.full(draws, 5, np.int32),
    )
    first = np.bincount(np.asarray(tokens)[:, 0], minlength=V) / draws
    assert (np.abs(first - p) <= 4 * np.sqrt(p * (1 - p) / draws) + 1e-12).all()
    kept = np.asarray(count) == 2
    overlap = np.minimum(p, q).sum() if kind == "drawn" else p[order[0]]
    assert abs(kept.mean() - overlap) <= 4 * np.sqrt(
        0.25 / draws
    )  # as many as any scheme can keep (arXiv:2211.17192)


def test_texts_are_distributed_as_without():
    """Four tokens of the real loop at temperature 1, with a draft that is near: how often each
    triple, by its probability.
    """
    config, sequences = dataclasses.replace(CONFIG, vocab_size=5, layers=1), 2000
    params = unrolled_parameters(config, std=0.4)
    texts = np.asarray(list(itertools.product(range(5), repeat=4)))
    behind = np.concatenate([np.tile([1, 2], (len(texts), 1)), texts], axis=1)
    every = np.exp(float64_logits(params, behind, config)[:, 1:-1])
    every /= every.sum(-1, keepdims=True)
    chosen = np.take_along_axis(every, texts[..., None], -1)[..., 0]
    p = chosen.prod(-1).reshape(5, 125).sum(0)
    np.testing.assert_allclose(p.sum(), 1.0)
    near = Generator(jax.tree.map(lambda x: np.asarray(x) * np.float32(0.9), params), config)
    model = Generator(params, config)
    for seed, speculation in ((5000, Speculation(2, near)), (9000, Speculation(2))):
        texts = model.generate(
            [[1, 2]],
            4,
            make_sampling(sequences, 1.0, seed=seed),
            samples=sequences,
            speculation=speculation,
        )
        last = np.asarray([sequence.token_ids for sequence in texts])
        found = (
            np.bincount(last[:, 1] * 25 + last[:, 2] * 5 + last[:, 3], minlength=125) / sequences
        )
        assert (np.abs(found - p) <= 4.5 * np.sqrt(p / sequences) + 2 / sequences).all()
        assert np.abs(found - p).sum() < 0.25


def test_look_up():
    """The latest of the longest matches; a repetition goes on; nothing found proposes something all
    the same.
    """
    sequences = [
        [1, 2, 3, 9, 1, 2, 3, 0, 0, 0],
        [7, 7, 7, 0, 0, 0, 0, 0, 0, 0],
        [1, 2, 1, 2, 1, 0, 0, 0, 0, 0],
        [5, 1, 2, 8, 3, 2, 4, 1, 2, 0],
        [1, 2, 3, 4, 5, 6, 0, 0, 0, 0],
    ]
    found = jax.jit(look_up, static_argnums=2)(
        np.asarray(sequences), np.asarray([6, 2, 4, 8, 5]), 4
    )
    assert found[:4].tolist() == [[9, 1, 2, 3], [7, 7, 7, 7], [2, 1, 2, 1], [8, 3, 2, 4]]


def test_what_cannot_be_done(generator):
    with pytest.raises(InputError, match=r"speculation.tokens: 0 given; 1 or more expected"):
        generator.generate([[1]], 3, speculation=Speculation(0))
    with pytest.raises(InputError, match="penalties given together with speculation"):
        generator.generate(
            [[1]], 3, make_sampling(1, repetition_penalty=1.2), speculation=Speculation(3)
        )
    other = dataclasses.replace(CONFIG, vocab_size=50)
    with pytest.raises(InputError, match="the draft model has 50 tokens and the model 97"):
        generator.generate(
            [[1]], 3, speculation=Speculation(3, Generator(random_parameters(other), other))
        )
