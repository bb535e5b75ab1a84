"""Sampling: which tokens may be drawn and how often, against float64; sequences that know nothing
of each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.generation.sampling import (
    Sampling,
    adjust,
    begin_history,
    make_sampling,
    remember,
    restrict,
    sample,
)

MIXTURE = [  # temperature, top_k, top_p
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (3.0, 5, 1.0),
    (1.0, 1, 1.0),
    (1.0, 0, 0.9),
    (0.5, 0, 0.3),
    (1.0, 0, 0.0),
    (1.3, 20, 0.8),
    (0.1, 3, 0.5),
    (1.0, 10_000, 0.99),
    (0.01, 7, 1.0),
    (20.0, 0, 0.75),
]


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens may be drawn, most probable first: the definitions in float64, one after the
    other.
    """
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    reached = np.cumsum(weights[order] / weights[order].sum())
    return order[: int(np.searchsorted(reached, top_p)) + 1] if top_p < 1 else order


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Every token's probability."""
    weights = np.zeros(len(logits))
    tokens = kept(logits, temperature, top_k, top_p)
    weights[tokens] = np.exp((logits[tokens] - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


_sample, _restrict = jax.jit(sample), jax.jit(restrict)


def settings(mixture) -> Sampling:
    return make_sampling(len(mixture), *(list(column) for column in zip(*mixture)))


@pytest.mark.parametrize("vocab", [5, 300, 50_000])
def test_restrict_equals_the_definitions(vocab):
    logits = np.random.default_rng(vocab).normal(0, 3, (len(MIXTURE), vocab)).astype(np.float32)
    restricted = np.asarray(_restrict(logits, settings(MIXTURE)))
    got = np.exp(restricted - restricted.max(-1, keepdims=True))
    got /= got.sum(-1, keepdims=True)
    for sequence, setting in enumerate(MIXTURE):
        expected = distribution(logits[sequence], *setting)
        if vocab < 1000:  # in a large vocabulary neighbours may lie closer than float32 tells apart
            assert np.flatnonzero(np.isfinite(restricted[sequence])).tolist() == sorted(
                kept(logits[sequence], *setting)
            ), setting
        np.testing.assert_allclose(
            got[sequence], expected, atol=2e-6, rtol=1e-4, err_msg=str(setting)
        )


def test_top_p_of_1_keeps_every_token():
    """However the rounding of 50,000 small numbers adds up."""
    logits = np.random.default_rng(0).normal(0, 6, (len(MIXTURE), 50_000)).astype(np.float32)
    assert np.isfinite(
        _restrict(logits, make_sampling(len(MIXTURE), temperature=1.0, top_p=1.0))
    ).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = np.random.default_rng(0).normal(0, 30, (3, 100)).astype(np.float32)
    restricted = np.asarray(_restrict(logits, make_sampling(3, temperature=temperature)))
    assert not np.isnan(restricted).any()
    drawn = _sample(logits, make_sampling(3, temperature=temperature), np.zeros(3, np.int32))
    assert drawn.tolist() == np.argmax(logits, axis=-1).tolist()


def test_ties_with_the_last_token_kept_stay():
    logits = np.asarray([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(_restrict(logits, make_sampling(1, temperature=1.0, top_k=2))).tolist() == [
        [True, False, True, True, False]
    ]


def within(counts: np.ndarray, expected: np.ndarray, draws: int) -> bool:
    """Whether frequencies lie within 4 standard deviations, and nothing impossible was drawn."""
    sigma = np.sqrt(expected * (1 - expected) / draws)
    return bool((np.abs(counts / draws - expected) <= 4 * sigma + 1e-12).all())


LOGITS = np.array([0.3, -1.0, 2.0, 1.5, 0.0, -3.0, 1.0, 1.9], np.float32)
DRAWS = 20_000


def draw(seeds, positions, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """A token of every seed and position, all from the same logits."""
    sampling = make_sampling(len(seeds), temperature, top_k, top_p, seed=seeds)
    return np.asarray(_sample(np.broadcast_to(LOGITS, (len(seeds), 8)), sampling, positions))


@pytest.mark.parametrize(
    "setting", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (2.0, 6, 0.9)], ids=str
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_frequencies(setting, over):
    many, one = np.arange(DRAWS, dtype=np.int32), np.full(DRAWS, 7, np.int32)
    seeds, positions = (many, one) if over == "seeds" else (one, many)
    temperature, top_k, top_p = setting
    drawn = draw(seeds, positions, temperature, top_k, top_p)
    assert within(np.bincount(drawn, minlength=8), distribution(LOGITS, *setting), DRAWS)


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 1), (1, 0), (1, -1)], ids=["position", "seed", "seed+1 position-1"]
)
def test_neighbouring_draws_are_independent(seed, position):
    """Pairs of draws whose seed or position (or both, with the same sum) differ by one."""
    seeds, positions = np.arange(DRAWS) * 3, np.full(DRAWS, 9, np.int32)
    first, second = draw(seeds, positions), draw(seeds + seed, positions + position)
    p = distribution(LOGITS, 1.0, 0, 1.0)
    assert within(np.bincount(first * 8 + second, minlength=64), np.outer(p, p).ravel(), DRAWS)


def test_mixed_batch():
    """Greedy sequences take the most probable token, sampled sequences draw as they would in any
    other batch.
    """
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    positions = np.arange(6, dtype=np.int32)
    mixed = _sample(logits, make_sampling(6, [0.0, 1.0] * 3, seed=list(range(6))), positions)
    sampled = _sample(logits, make_sampling(6, 1.0, seed=list(range(6))), positions)
    greedy = np.argmax(logits, axis=-1)
    assert mixed.tolist() == np.where([True, False] * 3, greedy, sampled).tolist()
    assert _sample(logits, make_sampling(6), positions).tolist() == greedy.tolist()


def keys(*args, **settings) -> list:
    return jax.random.key_data(make_sampling(*args, **settings).key).tolist()


def folded(key, sequence: int) -> list[int]:
    return jax.random.key_data(jax.random.fold_in(key, sequence)).tolist()


def test_keys_of_sequences_are_jax_fold_in():
    five, nine = jax.random.key(5), jax.random.key(9)
    assert (
        keys(3, seed=5)
        == keys(3, seed=five)
        == keys(3, seed=np.int64(5))
        == [folded(five, sequence) for sequence in range(3)]
    )
    assert keys(2, seed=[5, 9]) == [folded(five, 0), folded(nine, 0)]  # each as it would be alone
    assert keys(2, seed=jnp.stack([five, nine])) == [
        jax.random.key_data(key).tolist() for key in (five, nine)
    ]


def test_no_sequence_of_one_seed_is_a_sequence_of_another():
    """A rollout of four samples a step with the step as its seed: two hundred different texts, not
    53.
    """
    together = np.concatenate([keys(4, seed=step) for step in range(50)])
    assert len(np.unique(together, axis=0)) == 200


def test_a_seed_or_a_key_may_be_traced():
    """Row by sequence the keys of a call outside of `jit`, without a compilation for each seed."""
    compiled = jax.jit(lambda seed: make_sampling(3, 1.0, seed=seed).key)
    for seed in (5, 6):
        got = [
            jax.random.key_data(compiled(given)).tolist() for given in (seed, jax.random.key(seed))
        ]
        assert got == [keys(3, seed=seed)] * 2
    assert jax.random.key_data(compiled(jnp.asarray([4, 5, 6]))).tolist() == keys(3, seed=[4, 5, 6])
    assert compiled._cache_size() == 3
    for bad, words in (
        (jnp.zeros(2, jnp.int32), r"shape \[2\] given for 3 sequences"),
        (0.5, "traced numbers of float32 given"),
    ):
        with pytest.raises(InputError, match=f"^seed: {words}[^\n]*expected"):
            compiled(bad)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e3),
        ("temperature", [1.0, -1.0]),
        ("temperature", [1.0]),
        ("temperature", [1.0] * 3),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 1 << 80),
        ("top_k", [1, 2, 3]),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_p", [[0.5, 0.5]]),
        ("top_p", "x"),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", [1.0] * 3),
        ("logit_bias", [{1: 2.0}]),
        ("logit_bias", {-1: 2.0}),
        ("logit_bias", {1: float("nan")}),
        ("temperature", True),
        ("temperature", [True]),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: True}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "much"}),
        ("logit_bias", {1 << 40: 1.0}),
        ("seed", -1),
        ("seed", 1 << 31),
        ("seed", 1 << 80),
        ("seed", 0.5),
        ("seed", [1]),
        ("seed", "x"),
        ("seed", jax.random.PRNGKey(0)),
        ("seed", jax.random.split(jax.random.key(0), 3)),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(InputError, match=f"^{setting}: [^\n]*expected[^\n]*$"):
        make_sampling(2, **{setting: value})


@pytest.mark.parity
def test_every_step_equals_transformers():
    """Bias, penalties, temperature, top-k, top-p and min-p of sequences with settings of their own,
    in transformers' order.
    """
    torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
    from transformers.generation import logits_process as peer

    rng = np.random.default_rng(3)
    vocab, settings = (
        120,
        [  # bias, repetition, temperature, top-k, top-p, min-p
            ({}, 1.0, 1.0, 0, 1.0, 0.1),
            ({3: 4.0, 7: -2.5}, 1.4, 0.7, 0, 1.0, 0.0),
            ({5: 1.0}, 0.8, 1.3, 20, 0.9, 0.05),
            ({}, 1.2, 0.9, 0, 0.6, 0.0),
            ({119: -100.0}, 1.0, 2.0, 7, 1.0, 0.3),
            ({}, 1.0, 1.0, 0, 1.0, 1.0),
        ],
    )
    sequences = len(settings)
    logits = rng.normal(0, 3, (sequences, vocab)).astype(np.float32)
    prompts, lengths = rng.integers(0, vocab, (sequences, 9)), np.asarray([9, 4, 7, 9, 1, 5])
    answers = rng.integers(0, vocab, (sequences, 6))
    bias, repetition, temperature, top_k, top_p, min_p = (list(column) for column in zip(*settings))
    sampling = make_sampling(
        sequences, temperature, top_k, top_p, min_p, repetition_penalty=repetition, logit_bias=bias
    )

    @jax.jit
    def run(logits, sampling, prompts, lengths, answers):
        history = begin_history(prompts, lengths, vocab)
        for at in range(answers.shape[1]):
            history = remember(history, answers[:, at], jnp.ones(sequences, bool))
        return jax.nn.softmax(restrict(adjust(logits, sampling, history), sampling))

    got = np.asarray(run(logits, sampling, prompts, lengths, answers))
    for sequence, setting in enumerate(settings):
        ids = torch.tensor([[*prompts[sequence, : lengths[sequence]], *answers[sequence]]])
        biases = {(token,): value for token, value in setting[0].items()}
        processors = [
            *([peer.SequenceBiasLogitsProcessor(biases)] if biases else []),
            peer.RepetitionPenaltyLogitsProcessor(setting[1]),
            peer.TemperatureLogitsWarper(setting[2]),
            *([peer.TopKLogitsWarper(setting[3])] if setting[3] else []),
            peer.TopPLogitsWarper(setting[4]),
            peer.MinPLogitsWarper(setting[5]),
        ]
        scores = torch.tensor(logits[sequence : sequence + 1])
        for processor in processors:
            scores = processor(ids, scores)
        np.testing.assert_allclose(
            got[sequence], torch.softmax(scores, -1)[0].numpy(), atol=1e-6, err_msg=str(setting)
        )


def test_presence_and_frequency():
    """Off the tokens of the answer, not of the prompt: once, and once for each time."""
    sampling = make_sampling(2, presence_penalty=[0.5, 0.0], frequency_penalty=[0.25, 0.0])
    history = jax.jit(begin_history, static_argnums=2)(
        np.asarray([[4, 1, 9], [4, 1, 9]]), np.asarray([2, 2]), 10
    )
    for token, drawn in (([1, 1], [True, True]), ([2, 2], [True, True]), ([1, 3], [True, False])):
        history = jax.jit(remember)(history, np.asarray(token), np.asarray(drawn))
    logits = np.random.default_rng(0).normal(size=(2, 10)).astype(np.float32)
    expected = logits.copy()
    expected[0, 1] -= 0.5 + 2 * 0.25
    expected[0, 2] -= 0.5 + 0.25
    np.testing.assert_allclose(jax.jit(adjust)(logits, sampling, history), expected, atol=1e-6)
    assert np.asarray(history.counts).sum(axis=1).tolist() == [3, 2]


def test_settings_that_do_nothing_cost_nothing():
    assert (
        make_sampling(2, 1.0, repetition_penalty=[1.0, 1.0], presence_penalty=0.0).penalties is None
    )
    assert make_sampling(2, logit_bias=[{}, {}]).bias is None
    assert make_sampling(2, logit_bias=[{1: 2.0, 3: 1.0, 4: 0.5}, {}]).bias.tokens.shape == (2, 4)


def test_a_bias_can_force_and_ban():
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    sampling = make_sampling(
        3, [0.0, 1.0, 0.0], logit_bias=[{7: 1e4}, {7: 1e4}, {int(np.argmax(logits[2])): -1e4}]
    )
    drawn = jax.jit(
        lambda logits, sampling, at: sample(adjust(logits, sampling, None), sampling, at)
    )(logits, sampling, np.arange(3))
    assert drawn.tolist() == [7, 7, int(np.argsort(-logits[2])[1])]


def test_numbers_of_numpy_are_numbers():
    bias = make_sampling(1, logit_bias={np.int64(3): np.float32(2)}).bias
    assert (bias.tokens.tolist(), bias.values.tolist()) == ([[3]], [[2.0]])
    assert make_sampling(1, logit_bias=None).bias is None
