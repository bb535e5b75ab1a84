"""Scores of continuations: against the full pass, against transformers, and split as the tokenizer
splits.
"""

import dataclasses

import numpy as np
import pytest
from support import TINY, float64_logprobs, shallow, unrolled_parameters

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator
from llama_jax.generation.score import encode_pair, score, score_tokens
from llama_jax.weights.load import load

CONFIG = dataclasses.replace(TINY, layers=2)
PARAMS = unrolled_parameters(CONFIG)
RNG = np.random.default_rng(4)
PAIRS = [
    (RNG.integers(0, 97, a).tolist(), RNG.integers(0, 97, b).tolist())
    for a, b in [(5, 3), (40, 1), (1, 60), (9, 9)]
]


@pytest.fixture(scope="module")
def generator():
    return Generator(PARAMS, CONFIG)


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return shallow(load(tiny_directory))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_the_full_pass(generator, monkeypatch, batch_size):
    monkeypatch.setattr("llama_jax.generation.programs._BLOCK", 16)
    got = score_tokens(generator, *zip(*PAIRS), batch_size=batch_size)
    for (prompt, continuation), result in zip(PAIRS, got):
        every = float64_logprobs(PARAMS, prompt + continuation, CONFIG)[len(prompt) - 1 : -1]
        expected = every[np.arange(len(continuation)), np.asarray(continuation)]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
        assert result.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert result.greedy == (np.argmax(every, axis=-1) == np.asarray(continuation)).all()
        assert result.token_ids == continuation


def test_what_greedy_decoding_writes_is_greedy(generator):
    prompts = [prompt for prompt, _ in PAIRS]
    written = [sequence.token_ids for sequence in generator.generate(prompts, 12)]
    assert all(result.greedy for result in score_tokens(generator, prompts, written))
    other = [[*tokens[:-1], (tokens[-1] + 1) % 97] for tokens in written]
    assert not any(result.greedy for result in score_tokens(generator, prompts, other))


@pytest.mark.parametrize(
    ("prompts", "continuations", "words"),
    [
        ([[1]], [], "1 prompts and 0 continuations"),
        ([[1]], [[]], "pair 1: no tokens"),
        ([[1], []], [[1], [2]], "pair 2: no tokens"),
        ([[1] * 100], [[2] * 30], "129 tokens; 1 to 128"),
        ([[1]], [[97]], "token 97"),
        ([[-1]], [[5]], "token -1"),
    ],
)
def test_what_cannot_be_scored(generator, prompts, continuations, words):
    with pytest.raises(InputError, match=words):
        score_tokens(generator, prompts, continuations)


def test_the_last_token_may_lie_behind_the_context(generator):
    assert len(score_tokens(generator, [[1] * 100], [[2] * 29])[0].logprobs) == 29
    assert score_tokens(generator, [], []) == []


@pytest.mark.smollm2
def test_pairs_are_split_where_the_tokenizer_splits(smollm2_model):
    tokenizer = smollm2_model.tokenizer
    pairs = [
        ("The cat", " sat"),
        ("The cat ", "sat"),
        ("1+1=", "2"),
        ("", "Hello"),
        ("A\n\n", "B"),
        ("The ca", "t sat on the mat"),
        ("Hello wor", "ld, hello"),
        ("A house by the se", "a"),
    ]
    for prompt, continuation in pairs:
        before, after = encode_pair(tokenizer, prompt, continuation)
        assert tokenizer.decode(before) + tokenizer.decode(after) == prompt + continuation
        assert tokenizer.decode(after).endswith(continuation)
    assert encode_pair(tokenizer, "The cat ", "sat") == encode_pair(tokenizer, "The cat", " sat")


def test_a_continuation_that_changes_the_first_token_is_scored_from_the_start(tiny):
    model = tiny
    whole, prompt = model.tokenizer.encode("The"), model.tokenizer.encode("Th")
    assert whole[0] != prompt[0]  # else this shows nothing
    before, after = encode_pair(model.tokenizer, "Th", "e")
    assert (len(before), after) == (1, whole)
    assert score(model, ["Th"], ["e"])[0].token_ids == whole


@pytest.mark.smollm2
@pytest.mark.parity
def test_scores_equal_transformers(smollm2_model, smollm2_torch):
    torch = pytest.importorskip("torch")
    prompts = ["The capital of France is", "The capital of France is", "def add(a, b):\n    return"]
    continuations = [" Paris", " a banana", " a + b"]
    results = score(smollm2_model, prompts, continuations)
    for prompt, continuation, result in zip(prompts, continuations, results):
        before, after = encode_pair(smollm2_model.tokenizer, prompt, continuation)
        with torch.no_grad():
            every = torch.log_softmax(smollm2_torch(torch.tensor([before + after])).logits[0], -1)
        expected = [float(every[len(before) - 1 + i, token]) for i, token in enumerate(after)]
        np.testing.assert_allclose(result.logprobs, expected, atol=2e-4)
    assert results[0].logprob > results[1].logprob
    assert results[0].greedy


@pytest.mark.parametrize(
    ("prompts", "continuations", "name"),
    [
        ("abc", "def", "prompts"),
        (["abc"], "d", "continuations"),
        (["a"], [1], "continuations"),
        (None, ["a"], "prompts"),
    ],
)
def test_lists_of_texts_are_expected(tiny, prompts, continuations, name):
    with pytest.raises(InputError, match=f"{name}: .* given; a list of texts expected"):
        score(tiny, prompts, continuations)


def test_a_generator_of_another_model_is_refused(tiny, generator):
    with pytest.raises(InputError, match="generator: one of another model given"):
        score(tiny, ["a"], ["b"], generator)
