"""Logits that are NaN or infinite end in an error that names the sequence and the token, and
nothing is sampled from them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, shallow, unrolled_parameters

from llama_jax.errors import InputError
from llama_jax.generation.decode import BROKEN, NOTHING, finite, generate_tokens
from llama_jax.generation.generate import Generator, Speculation
from llama_jax.generation.sampling import make_sampling
from llama_jax.generation.score import score_tokens
from llama_jax.generation.session import NotFiniteError
from llama_jax.generation.text import Conversation, generate, stream
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.weights.load import load

CONFIG = dataclasses.replace(TINY, layers=1)
BAD = 96  # a token whose embedding is NaN: a sequence is sound until it comes
MESSAGE = (
    "sequence {}: logits that are NaN or infinite computed for new token {}, finite numbers "
    "expected; check the weights"
)


@pytest.fixture(scope="module")
def damaged():
    params = unrolled_parameters(CONFIG)
    return Generator({**params, "embedding": params["embedding"].at[BAD].set(jnp.nan)}, CONFIG)


def towards_bad(sequences: int = 2):
    """Sampling whose every token is the one with the NaN, in the last sequence."""
    return make_sampling(sequences, logit_bias=[*[{BAD: -1e4}] * (sequences - 1), {BAD: 1e4}])


def test_finite_looks_at_the_largest():
    logits = np.zeros((5, 7), np.float32)
    logits[1, 3], logits[2, 6], logits[3] = np.nan, np.inf, -np.inf
    logits[4, 2] = -np.inf  # a token that cannot be: the others can
    assert finite(jnp.asarray(logits)).tolist() == [True, False, False, False, True]


def test_a_prompt_is_named(damaged):
    with pytest.raises(NotFiniteError, match=MESSAGE.format(2, 1)) as caught:
        damaged.generate([[1, 2], [3, BAD, 4]], 5)
    assert caught.value.sequence == 1


@pytest.mark.parametrize("speculation", [None, Speculation(2)], ids=["plain", "speculation"])
def test_tokens_before_it_are_given(damaged, speculation):
    """The first token is the bad one, the second cannot be known; the other sequence is sound."""
    session = damaged.start([[1, 2], [3, 4]], 5, towards_bad(), speculation=speculation)
    given: list[list[int]] = [[], []]

    def read() -> None:
        for new in session.stream(4):
            for tokens, part in zip(given, new):
                tokens += part.token_ids

    with pytest.raises(NotFiniteError, match=MESSAGE.format(2, 2)):
        read()
    sound = damaged.generate([[1, 2]], 5, make_sampling(1, logit_bias={BAD: -1e4}))[0].token_ids
    assert given == [sound[: len(given[0])], [BAD]]
    assert len(given[0]) > 1


def test_a_sequence_that_had_ended_is_no_error(damaged):
    session = damaged.start([[1, 2], [3, 4]], 5, towards_bad())
    session.finish(1)
    assert [
        len(session.tokens(sequence).token_ids) for _ in session.stream(4) for sequence in (0,)
    ][-1] == 5


def test_inside_of_a_larger_program(damaged):
    """No error can be raised there: the token says it, and the log-probability is NaN."""
    model = Llama(CONFIG, ModelOptions(scan=False))
    run = jax.jit(functools.partial(generate_tokens, model, stop_ids=(), max_new_tokens=4))
    tokens, logprobs = run(
        damaged.params, np.asarray([[1, 2], [3, 4]]), np.asarray([2, 2]), towards_bad()
    )
    assert (tokens[0] >= 0).all()
    assert np.isfinite(logprobs[0]).all()
    assert tokens[1].tolist() == [BAD, BROKEN, NOTHING, NOTHING]
    assert np.isnan(logprobs[1]).tolist() == [False, True, False, False]


def test_scores_are_numbers(damaged):
    with pytest.raises(InputError, match="a log-probability of NaN computed"):
        score_tokens(damaged, [[1, 2]], [[BAD, 3]])


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    model = shallow(load(tiny_directory))
    scale = jnp.full_like(model.params["final_norm"]["scale"], jnp.inf)
    return model._replace(params={**model.params, "final_norm": {"scale": scale}})


def test_texts_and_conversations(tiny):
    words = "sequence 1: logits that are NaN or infinite computed for new token 1"
    generator = Generator(tiny.params, tiny.config)
    for ask in (
        lambda: generate(tiny, ["The cat"], generator=generator),
        lambda: list(stream(tiny, ["The cat"], generator=generator)),
        lambda: list(Conversation(tiny, generator=generator).ask("Hi")),
    ):
        with pytest.raises(InputError, match=words):
            ask()
