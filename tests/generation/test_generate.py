"""The generator: sequences that do not feel each other, few programs, and limits that hold."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, float64_logprobs, greedy_continues, random_parameters, unrolled_parameters

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator
from llama_jax.generation.programs import bucket_sequences, bucket_size, bucket_slots
from llama_jax.generation.sampling import make_sampling
from llama_jax.generation.session import TokenChunk, Tokens, stop_reason
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, tree_shardings

CONFIG = dataclasses.replace(TINY, layers=2, vocab_size=98)  # which meshes divide
PARAMS = unrolled_parameters(CONFIG)
# Most tests run these five, with 12 to 24 new tokens, or the first of them, with 12: the same
# programs.
PROMPTS = [
    np.random.default_rng(length).integers(0, 98, length).tolist() for length in (6, 17, 5, 40, 9)
]


@pytest.fixture(scope="module")
def generator():
    return Generator(PARAMS, CONFIG)


def ids(tokens: list[Tokens]) -> list[list[int]]:
    return [sequence.token_ids for sequence in tokens]


def of_context(context: int, layers: int = 2) -> Generator:
    """Weights of fewer layers, or the same, under another limit; another config also means programs
    of its own.
    """
    config = dataclasses.replace(CONFIG, context_length=context, layers=layers)
    return Generator(PARAMS if layers == 2 else unrolled_parameters(config), config)


def is_greedy(prompt: list[int], answer: list[int]) -> bool:
    return greedy_continues(PARAMS, prompt, answer, CONFIG)


def test_greedy_is_the_most_probable_token_of_the_full_pass(generator):
    for prompt, tokens in zip(PROMPTS, ids(generator.generate(PROMPTS, 12))):
        assert len(tokens) == 12
        assert is_greedy(prompt, tokens)


def test_each_sequence_has_its_own_limit(generator):
    whole = ids(generator.generate(PROMPTS, 12))
    for limits in ([1, 12, 0, 5, 12], np.asarray([1, 12, 0, 5, 12])):
        assert ids(generator.generate(PROMPTS, limits)) == [
            sequence[:limit] for sequence, limit in zip(whole, limits)
        ]
    for bad, words in (
        ([1, 2], "2 values given for 5 sequences; one for all or one a sequence expected"),
        ([1, 2, 3, 4, -1], "-1 given"),
    ):
        with pytest.raises(InputError, match=f"^max_new_tokens: {words}"):
            generator.start(PROMPTS, bad)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_sequence_does_not_depend_on_its_neighbours(generator, temperature):
    """Nor on its place among them, on how far their prompts make its own be padded, or on sequences
    that only fill up.
    """
    seeds = [11, 5, 11, 2, 0]
    together = ids(generator.generate(PROMPTS, 12, make_sampling(5, temperature, seed=seeds)))
    for i in (0, 2, 4):
        alone = generator.generate([PROMPTS[i]], 12, make_sampling(1, temperature, seed=seeds[i]))
        assert ids(alone) == [together[i]]
    back = ids(
        generator.generate(PROMPTS[::-1], 12, make_sampling(5, temperature, seed=seeds[::-1]))
    )
    assert back == together[::-1]
    assert len({tuple(tokens) for tokens in together}) == 5


def test_a_sequence_does_not_depend_on_slots_or_chunks(generator):
    sampling = make_sampling(1, 1.0, seed=3)
    (short,) = ids(generator.generate(PROMPTS[:1], 12, sampling))
    (long,) = ids(generator.generate(PROMPTS[:1], 60, sampling))
    assert long[:12] == short
    for chunk in (1, 5, 100):
        pieces = [
            sequence.token_ids
            for (sequence,) in generator.stream(PROMPTS[:1], 60, sampling, chunk=chunk)
        ]
        assert list(itertools.chain(*pieces)) == long
        assert max(map(len, pieces)) == min(chunk, 32)


def test_rows_stop_on_their_own(generator):
    sampling = make_sampling(5, 1.0, seed=3)
    free = ids(generator.generate(PROMPTS, 20, sampling))
    stops = [free[0][2], free[1][12], free[2][19]]
    got = generator.generate(PROMPTS, 20, sampling, stop_ids=stops)
    for sequence, full in zip(got, free):
        end = next((i + 1 for i, token in enumerate(full) if token in stops), None)
        assert sequence == Tokens(full[:end], "stop" if end else "length")
    assert len({len(sequence.token_ids) for sequence in got}) >= 3
    assert {sequence.stop_reason for sequence in got} == {"stop", "length"}


def test_work_ends_with_the_last_sequence(generator):
    """Sixty tokens asked for, a stop token drawn soon: one chunk is under way by then, no other
    begins.
    """
    (free,) = ids(generator.generate(PROMPTS[:1], 60, make_sampling(1, 1.0, seed=3)))
    end = free.index(free[8])
    pieces = list(
        generator.stream(
            PROMPTS[:1], 60, make_sampling(1, 1.0, seed=3), stop_ids=[free[8]], chunk=1
        )
    )
    assert pieces == [[TokenChunk([token])] for token in free[: end + 1]] + [[TokenChunk([])]]


def test_few_programs_a_bucket():
    """One prefill and one decoding loop for each size; what does not depend on the size is compiled
    once.
    """
    generator = of_context(200, layers=1)
    counts = []
    for lengths, new in [([5], 10), ([9], 7), ([17], 3), ([20], 4), ([5, 5], 10), ([2, 12], 4)]:
        generator.generate(
            [[1] * length for length in lengths], new, make_sampling(len(lengths), 0.5, top_k=new)
        )
        compiled = generator.programs.compilations
        counts.append((compiled["prefill"], compiled["decode"], compiled["begin"]))
    assert counts == [(1, 1, 1), (1, 1, 1), (2, 2, 1), (2, 2, 1), (3, 3, 2), (3, 3, 2)]
    another = of_context(200, layers=1)
    another.generate([[3]], 4)
    assert another.programs is generator.programs
    assert another.programs.compilations["prefill"] == 3


def test_buckets_hold_what_they_should_and_little_more():
    sizes = [bucket_size(count) for count in range(1, 5000)]
    assert all(count <= size <= max(16, 1.5 * count) for count, size in enumerate(sizes, 1))
    assert sorted(set(sizes))[:6] == [16, 24, 32, 48, 64, 96]
    assert [bucket_sequences(count) for count in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [bucket_sequences(count, 6) for count in (1, 6, 7, 13)] == [6, 6, 12, 24]
    assert bucket_slots(10, 10) == 16
    assert bucket_slots(40, 6000) == 256  # not the 6000 that may never come
    assert bucket_slots(3000, 3100) == 4096
    for needed in range(1, 3000, 7):
        for most in (needed, needed + 5, 10 * needed):
            assert needed <= bucket_slots(needed, most) <= max(16, 1.5 * most)


def test_the_cache_is_donated(generator):
    """Two caches in memory at one time would halve the longest text; a donation that fails makes
    JAX warn.
    """
    session = generator.start(PROMPTS[:1], 12)
    cache, progress = session._progress.cache, session._progress
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session._advance(8)
    for layer in progress.cache.layers:
        assert layer.keys.is_deleted()
        assert layer.values.is_deleted()
    assert cache.slots == 24


def test_the_cache_grows_with_the_text_and_changes_nothing(generator):
    """Slots are reserved as they are needed, and the text does not depend on it."""
    assert generator.start(PROMPTS[:1], 60)._progress.cache.slots == 96
    longer = of_context(4096)
    for temperature in (0.0, 1.0):
        session = longer.start(PROMPTS[:1], 4000, make_sampling(1, temperature, seed=3))
        assert session._progress.cache.slots == 256  # of 4006
        list(itertools.islice(session.stream(32), 10))
        assert session._progress.cache.slots == 768
        text = session.tokens(0).token_ids
        assert len(text) > 256
        if temperature == 0:
            assert is_greedy(PROMPTS[0], text)
        else:
            (short,) = ids(longer.generate(PROMPTS[:1], 200, make_sampling(1, temperature, seed=3)))
            assert text[:200] == short
    assert longer.programs.compilations["cache"] == 2  # one to begin with, one that grew
    assert longer.programs.compilations["decode"] == 2


def test_long_prompts_are_prefilled_in_pieces(monkeypatch):
    """Beside short ones, whose logits come from an earlier piece."""
    prompts = [np.random.default_rng(n).integers(0, 98, n).tolist() for n in (150, 5, 64, 65)]
    monkeypatch.setattr("llama_jax.generation.programs._PIECE", 64)
    generator = of_context(256)
    for prompt, tokens in zip(prompts, ids(generator.generate(prompts, 12))):
        assert len(tokens) == 12
        assert is_greedy(prompt, tokens)
    assert (
        generator.programs.compilations["prefill"] == 3
    )  # the first piece, one in the middle, the last


def test_a_prefix_is_not_run_again(generator, monkeypatch):
    """Prompts that share all of it, a part, nothing, or are the prefix itself."""
    common = PROMPTS[3][:30]
    prompts = [[*common, 5, 6], [*common[:12], 9, 9, 9], PROMPTS[1], common, common[:4]]
    prefix = generator.prefix(common)
    assert [prefix.shared(prompt) for prompt in prompts] == [30, 12, 0, 29, 3]
    seen = []
    real = generator.programs.prefill
    monkeypatch.setattr(
        generator.programs,
        "prefill",
        lambda *args, **how: seen.append(args[2].tolist()) or real(*args, **how),
    )
    for prompt, tokens in zip(prompts, ids(generator.generate(prompts, 12, prefix=prefix))):
        assert len(tokens) == 12
        assert is_greedy(prompt, tokens)
    assert seen == [[2, 3, 17, 1, 1, 0, 0, 0]]


def test_a_conversation_goes_on_from_its_cache(generator):
    session = generator.start([PROMPTS[1], PROMPTS[1][:14]], 20, make_sampling(2, 1.0, seed=1))
    list(session.stream(8))
    for sequence in (0, 1):
        said = PROMPTS[1][: (17, 14)[sequence]] + session.tokens(sequence).token_ids
        prefix = session.prefix(sequence)
        assert prefix.token_ids == said[:-1]
        question = [*said, 3, 4, 5]
        (answer,) = ids(generator.generate([question], 10, prefix=prefix))
        assert len(answer) == 10
        assert is_greedy(question, answer)


def test_the_context_ends_the_text_and_a_full_one_is_a_prefix_too():
    """Not one token beyond it, and those before it as if it were longer.

    A sequence that has ended runs along and must not spoil what it held.
    """
    generator, prompts = of_context(32), [PROMPTS[3][:length] for length in (20, 31, 32, 9)]
    session = generator.start(prompts, 1000)
    list(session.stream(32))
    got = [session.tokens(sequence) for sequence in range(4)]
    assert [len(sequence.token_ids) for sequence in got] == [12, 1, 0, 23]
    assert {sequence.stop_reason for sequence in got} == {"length"}
    assert all(is_greedy(prompt, sequence.token_ids) for prompt, sequence in zip(prompts, got))
    prefix = session.prefix(1)
    assert (
        len(prefix.token_ids) == len(session.prefix(2).token_ids) == 31
    )  # of a full sequence the last slot is not its own
    question = [*prefix.token_ids[:20], 1]
    (answer,) = ids(generator.generate([question], 8, prefix=prefix))
    assert len(answer) == 8
    assert is_greedy(question, answer)


def test_samples_lie_next_to_each_other(generator):
    prompts, sampling = [PROMPTS[0], PROMPTS[3]], make_sampling(6, 1.0, seed=[1, 2, 3, 4, 5, 6])
    together = ids(generator.generate(prompts, 12, sampling, samples=3))
    apart = ids(generator.generate([prompts[0]] * 3 + [prompts[1]] * 3, 12, sampling))
    assert together == apart
    assert len({tuple(tokens) for tokens in together}) == 6


def test_stop_tokens_of_a_sequence(generator):
    prompts = [PROMPTS[3]] * 5
    (free, *_) = ids(generator.generate(prompts, 20))
    stops = [[free[3]], [], [free[9], 96, 97], [], []]
    got = generator.generate(prompts, 20, stop_ids=stops)
    ends = [
        min((free.index(token) + 1 for token in sequence if token in free), default=20)
        for sequence in stops
    ]
    assert len(set(ends)) == 3
    assert [sequence.token_ids for sequence in got] == [free[:end] for end in ends]
    assert [sequence.stop_reason for sequence in got] == [
        "stop",
        "length",
        "stop",
        "length",
        "length",
    ]
    with pytest.raises(InputError, match="stop_ids: 2 lists given for 3 sequences"):
        generator.generate([PROMPTS[0]] * 3, 20, stop_ids=[[1], [2]])


def test_log_probabilities(generator):
    """Of the token drawn and of the best; they do not change what is drawn."""
    sampling = make_sampling(5, 0.9, seed=5)
    plain = generator.generate(PROMPTS, 24, sampling)
    assert plain[0].logprobs is None
    for prompt, sequence, expected in zip(
        PROMPTS, generator.generate(PROMPTS, 24, sampling, logprobs=3), plain
    ):
        assert sequence.token_ids == expected.token_ids
        every = float64_logprobs(PARAMS, prompt + sequence.token_ids, CONFIG)[len(prompt) - 1 :]
        np.testing.assert_allclose(
            sequence.logprobs,
            [line[token] for line, token in zip(every, sequence.token_ids)],
            atol=1e-4,
        )
        assert len(sequence.logprobs) == len(sequence.top_logprobs) == 24
        for line, best in zip(every, sequence.top_logprobs):
            assert [token for token, _ in best] == np.argsort(-line)[:3].tolist()
            np.testing.assert_allclose([value for _, value in best], -np.sort(-line)[:3], atol=1e-4)


def test_log_probabilities_of_the_drawn_or_of_a_whole_vocabulary(generator):
    (sequence,) = generator.generate(PROMPTS[:1], 12, logprobs=0)
    assert sequence.top_logprobs is None
    assert len(sequence.logprobs) == 12
    (sequence,) = generator.generate(PROMPTS[:1], 12, logprobs=98)
    assert sorted(token for token, _ in sequence.top_logprobs[0]) == list(range(98))


@pytest.mark.parametrize(
    ("scan", "fsdp", "context"),
    [pytest.param(True, 2, 1, marks=pytest.mark.slow), (False, 2, 1), (True, 1, 2)],
)
def test_a_mesh_changes_nothing(generator, scan, fsdp, context):
    """The parameters as training leaves them on 8 devices, sequences over data and fsdp, heads over
    tensor; sequences stay whole.
    """
    sampling = make_sampling(5, [0.0, 1.0, 0.0, 0.7, 1.0], top_p=0.9, seed=3)
    alone = generator.generate(PROMPTS, 12, sampling)
    mesh = make_mesh(data=2, fsdp=fsdp, tensor=2, context=context)
    params = random_parameters(CONFIG) if scan else PARAMS
    sharded = jax.device_put(params, tree_shardings(params, mesh, TRAINING))
    over_mesh = Generator(sharded, CONFIG, mesh=mesh)
    session = over_mesh.start(PROMPTS, 12, sampling)
    keys = jax.tree.leaves(session._progress.cache.layers)[0]
    assert keys.sharding.shard_shape(keys.shape)[-4:-1] == (
        4 // fsdp,
        1,
        session._progress.cache.slots,
    )
    list(session.stream(32))
    assert [session.tokens(sequence) for sequence in range(5)] == alone
    prefix = over_mesh.prefix(PROMPTS[3][:30])
    assert over_mesh.generate(PROMPTS, 12, sampling, prefix=prefix) == alone


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([[]], 5, ("prompt 1", "0 tokens", "128")),
        ([[1], []], 5, ("prompt 2", "0 tokens")),
        ([[1] * 129], 5, ("prompt 1", "129 tokens", "128")),
        ([[1, 98, 3]], 5, ("prompt 1", "98", "97")),
        ([[1], [5, -1, 3]], 5, ("prompt 2", "-1", "97")),
        ([[1]], -1, ("max_new_tokens", "-1", "0 or more")),
    ],
)
def test_what_a_model_cannot_take(generator, prompts, new, words):
    with pytest.raises(InputError) as refused:
        generator.generate(prompts, new)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[1, 2.5]], {}, "prompt 1 holds 2.5; token ids, whole numbers, expected"),
        (["ab"], {}, "prompt 1 is 'ab'; a list of token ids expected"),
        ([1, 2], {}, "prompt 1 is 1; a list of token ids expected"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens: 2.5 given; a whole number expected"),
        ([[1]], {"max_new_tokens": [3.5]}, "max_new_tokens: 3.5 given; a whole number expected"),
        ([[1]], {"samples": 1.5}, "samples: 1.5 given; a whole number expected"),
        ([[1]], {"logprobs": 99}, "logprobs: 99 given; 0 to 98 expected, or none"),
        ([[1]], {"logprobs": True}, "logprobs: True given; a whole number expected"),
        (
            [[1]],
            {"stop_ids": ["a"]},
            "stop_ids: .* given; token ids for all sequences, or one list a sequence expected",
        ),
        (
            [[1]],
            {"stop_ids": [1 << 40]},
            "stop_ids: 1099511627776 given; token ids from 0 to 2147483647 expected",
        ),
        ([[1]], {"stop_ids": [[-3]]}, "stop_ids: -3 given"),
        ([[1]], {"speculation": 3}, r"speculation: a int given; Speculation\(tokens\) expected"),
        (
            [[1]],
            {"prefix": [1, 2]},
            r"prefix: a list given; one from this generator's prefix\(\) expected",
        ),
        (
            [[1]],
            {"sampling": make_sampling(1, logit_bias={10**6: 5})},
            "logit_bias: token 1000000 given; .* from 0 to 97",
        ),
        (
            [[1]],
            {"stop_ids": [[2.5]]},
            "stop_ids: .* given; token ids for all sequences, or one list a sequence expected",
        ),
    ],
)
def test_what_is_of_another_kind(generator, prompts, settings, words):
    with pytest.raises(InputError, match=words):
        generator.generate(prompts, **{"max_new_tokens": 3, **settings})


@pytest.mark.parametrize(
    "kind", [np.array, jnp.array, lambda sequences: [np.array(sequence) for sequence in sequences]]
)
def test_arrays_are_prompts_and_stops(generator, kind):
    sequences = np.random.default_rng(1).integers(0, 98, (5, 40)).tolist()
    expected = generator.generate(sequences, 12)
    assert generator.generate(kind(sequences), np.int64(12), stop_ids=None) == expected
    stops = [expected[0].token_ids[2], expected[1].token_ids[4], expected[2].token_ids[6]]
    stopped = generator.generate(kind(sequences), 12, stop_ids=np.array(stops))
    assert stopped == generator.generate(sequences, 12, stop_ids=stops) != expected


def test_a_prefix_of_another_model_is_refused(generator):
    """Same shapes, other numbers: nothing would go wrong but the text."""
    strangers = [
        Generator(unrolled_parameters(CONFIG, seed=1), CONFIG),
        of_context(200, layers=1),
        Generator(PARAMS, CONFIG, cache_dtype="int8"),
    ]
    prefixes = [stranger.prefix(PROMPTS[0]) for stranger in strangers]
    session = strangers[0].start(PROMPTS[:1], 12)
    list(session.stream(8))
    for prefix in (*prefixes, session.prefix()):
        with pytest.raises(
            InputError,
            match="prefix: one of another model, other parameters or other options given",
        ):
            generator.generate(PROMPTS[:1], 12, prefix=prefix)
    again = Generator(generator.params, CONFIG)
    assert again.generate(
        PROMPTS[:1], 12, prefix=generator.prefix(PROMPTS[0])
    ) == generator.generate(PROMPTS[:1], 12)


def test_settings_that_do_not_fit(generator):
    with pytest.raises(InputError, match=r"sampling.*1 sequences.*2 sequences"):
        generator.generate([[1], [2]], 3, make_sampling(1, 1.0))
    with pytest.raises(InputError, match=r"sampling.*3 sequences.*2 sequences"):
        generator.generate([[1], [2]], 3, make_sampling(3, 1.0))
    with pytest.raises(InputError, match="chunk: 0 given"):
        list(generator.stream([[1]], 3, chunk=0))


def test_no_prompts_no_tokens(generator):
    assert generator.generate([], 5) == []


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_new_tokens(generator, new):
    (sequence,) = generator.generate(PROMPTS[1:2], new)
    assert (len(sequence.token_ids), sequence.stop_reason) == (new, "length")


def test_stop_reason():
    assert stop_reason([4, 2], (2, 3)) == "stop"
    assert (
        stop_reason([2, 4], (2, 3)) == stop_reason([], (2, 3)) == stop_reason([4], ()) == "length"
    )


def test_a_chunk_is_a_number(generator):
    with pytest.raises(InputError, match="chunk: 'a' given; a whole number expected"):
        list(generator.stream(PROMPTS[:1], 3, chunk="a"))


def test_parameters_may_be_arrays_of_numpy_and_stacked(generator):
    stacked = jax.tree.map(np.asarray, random_parameters(CONFIG))
    assert Generator(stacked, CONFIG).generate(PROMPTS[:1], 12) == generator.generate(
        PROMPTS[:1], 12
    )
