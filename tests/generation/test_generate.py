"""The generator: rows that do not feel each other, few programs, and limits that hold."""

import dataclasses
import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_parameters

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator, Tokens, bucket_size, choose_bucket, stop_reason
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import logits
from llama_jax.weights.forms import unstack

CONFIG = dataclasses.replace(TINY, layers=2)
PARAMS = random_parameters(CONFIG)
PROMPTS = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in (6, 17, 5, 40, 9)]


@pytest.fixture(scope="module")
def generator():
    return Generator(unstack(PARAMS), CONFIG)


def ids(tokens: list[Tokens]) -> list[list[int]]:
    return [row.token_ids for row in tokens]


def of_context(context: int) -> Generator:
    """The same weights under another limit; another config also means programs of its own."""
    return Generator(unstack(PARAMS), dataclasses.replace(CONFIG, context_length=context))


def test_greedy_is_the_most_probable_token_of_the_full_pass(generator):
    for prompt, tokens in zip(PROMPTS, ids(generator.generate(PROMPTS, 12))):
        text = (prompt + tokens + [0] * 60)[:60]
        best = np.argmax(logits(PARAMS, jnp.asarray([text]), CONFIG), axis=-1)[0]
        assert tokens == best[len(prompt) - 1 : len(prompt) + 11].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_neighbours(generator, temperature):
    """Nor on its place among them, on how far their prompts make its own be padded, or on rows that only fill up."""
    seeds = [11, 5, 11, 2, 0]
    together = ids(generator.generate(PROMPTS, 12, make_sampling(5, temperature, seed=seeds)))
    for i in (0, 2, 4):
        alone = generator.generate([PROMPTS[i]], 12, make_sampling(1, temperature, seed=seeds[i]))
        assert ids(alone) == [together[i]]
    back = ids(generator.generate(PROMPTS[::-1], 12, make_sampling(5, temperature, seed=seeds[::-1])))
    assert back == together[::-1]
    assert len({tuple(tokens) for tokens in together}) == 5


def test_a_row_does_not_depend_on_slots_or_chunks(generator):
    sampling = make_sampling(1, 1.0, seed=3)
    (short,) = ids(generator.generate(PROMPTS[:1], 12, sampling))
    (long,) = ids(generator.generate(PROMPTS[:1], 60, sampling))
    assert long[:12] == short
    for chunk in (1, 5, 100):
        pieces = [row for (row,) in generator.stream(PROMPTS[:1], 60, sampling, chunk=chunk)]
        assert list(itertools.chain(*pieces)) == long
        assert max(map(len, pieces)) == min(chunk, 32)


def test_rows_stop_on_their_own(generator):
    sampling = make_sampling(5, 1.0)
    free = ids(generator.generate(PROMPTS, 20, sampling))
    stops = [free[0][2], free[1][12], free[2][19]]
    got = generator.generate(PROMPTS, 20, sampling, stop_ids=stops)
    for row, full in zip(got, free):
        end = next((i + 1 for i, token in enumerate(full) if token in stops), None)
        assert row == Tokens(full[:end], "stop" if end else "length")
    assert len({len(row.token_ids) for row in got}) >= 3
    assert {row.stop_reason for row in got} == {"stop", "length"}


def test_work_ends_with_the_last_row(generator):
    """Sixty tokens asked for, a stop token drawn soon: one chunk is under way by then, no other begins."""
    (free,) = ids(generator.generate(PROMPTS[:1], 60, make_sampling(1, 1.0, seed=3)))
    end = free.index(free[8])
    pieces = list(generator.stream(PROMPTS[:1], 60, make_sampling(1, 1.0, seed=3), stop_ids=[free[8]], chunk=1))
    assert pieces == [[[token]] for token in free[: end + 1]] + [[[]]]


def test_one_pair_of_programs_a_bucket():
    generator = of_context(200)
    counts = []
    for lengths, new in [([5], 10), ([9], 7), ([17], 3), ([20], 4), ([5, 5], 10), ([2, 12], 4)]:
        generator.generate([[1] * length for length in lengths], new, make_sampling(len(lengths), 0.5, top_k=new))
        counts.append(generator.programs.compilations)
    assert counts == [2, 2, 4, 4, 6, 6]
    another = of_context(200)
    another.generate([[3]], 4)
    assert another.programs is generator.programs
    assert another.programs.compilations == 6


def test_buckets_hold_what_they_should_and_little_more():
    sizes = [bucket_size(count) for count in range(1, 5000)]
    assert all(count <= size <= max(16, 1.5 * count) for count, size in enumerate(sizes, 1))
    assert sorted(set(sizes))[:6] == [16, 24, 32, 48, 64, 96]
    assert choose_bucket([3, 100, 7], [20, 20, 20]) == (4, 128, 128)
    assert choose_bucket([10], [0]) == (1, 16, 16)
    assert choose_bucket([5000, 10], [1000, 5990]) == (2, 6144, 6144)  # a row's own limit counts, not the sum of the largest


def test_the_cache_is_donated(generator):
    """Two caches in memory at one time would halve the longest text; a donation that fails makes JAX warn."""
    programs = generator.programs
    cache = init_cache(CONFIG, 1, 24)
    one, stops, sampling = jnp.ones((1,), jnp.int32), jnp.zeros((0,), jnp.int32), make_sampling(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress, _ = programs.begin(generator.params, np.ones((1, 16), np.int32), one, cache, sampling, stops, one * 9)
        after, _ = programs.advance(generator.params, progress, sampling, stops, 8)
    for layer in (*cache.layers, *progress.cache.layers):
        assert layer.keys.is_deleted()
        assert layer.values.is_deleted()
    assert after.cache.lengths.tolist() == [9]


@pytest.mark.parametrize(("prompts", "new", "words"), [
    ([[]], 5, ("prompt 1", "0 tokens", "128")),
    ([[1], []], 5, ("prompt 2", "0 tokens")),
    ([[1] * 129], 5, ("prompt 1", "129 tokens", "128")),
    ([[1, 97, 3]], 5, ("prompt 1", "97", "96")),
    ([[1], [5, -1, 3]], 5, ("prompt 2", "-1", "96")),
    ([[1]], -1, ("max_new_tokens", "-1", "0 or more")),
])  # fmt: skip
def test_what_a_model_cannot_take(generator, prompts, new, words):
    with pytest.raises(InputError) as refused:
        generator.generate(prompts, new)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_settings_that_do_not_fit(generator):
    with pytest.raises(InputError, match=r"sampling.*1 rows.*2 prompts"):
        generator.generate([[1], [2]], 3, make_sampling(1, 1.0))
    with pytest.raises(InputError, match=r"sampling.*3 rows.*2 prompts"):
        generator.generate([[1], [2]], 3, make_sampling(3, 1.0))
    with pytest.raises(InputError, match="chunk: 0 given"):
        list(generator.stream([[1]], 3, chunk=0))


def test_no_prompts_no_tokens(generator):
    assert generator.generate([], 5) == []


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_new_tokens(generator, new):
    (row,) = generator.generate(PROMPTS[:1], new)
    assert (len(row.token_ids), row.stop_reason) == (new, "length")


def test_the_context_ends_the_text():
    """Not one token beyond it, and those before it as if it were longer."""
    lengths = [20, 31, 32, 9]
    prompts = [(PROMPTS[3])[:length] for length in lengths]
    got = of_context(32).generate(prompts, 1000, make_sampling(4, 1.0))
    free = of_context(128).generate(prompts, 30, make_sampling(4, 1.0))
    assert [len(row.token_ids) for row in got] == [12, 1, 0, 23]
    assert {row.stop_reason for row in got} == {"length"}
    assert all(row.token_ids == full.token_ids[: len(row.token_ids)] for row, full in zip(got, free))


def test_stop_reason():
    assert stop_reason([4, 2], (2, 3)) == "stop"
    assert stop_reason([2, 4], (2, 3)) == stop_reason([], (2, 3)) == stop_reason([4], ()) == "length"
