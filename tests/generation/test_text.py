"""Text in, text out, with a model of random weights: its text is noise, broken characters
included.
"""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from support import shallow

from llama_jax.errors import InputError
from llama_jax.generation.checks import check_texts
from llama_jax.generation.generate import Generator
from llama_jax.generation.sampling import make_sampling, sequence_keys
from llama_jax.generation.session import TokenChunk
from llama_jax.generation.text import Completion, _Row, encode_user, generate, stream
from llama_jax.weights.load import Pretrained, load

PROMPTS = ["The cat sat", "你好 🎉", "a"]


@pytest.fixture(scope="module")
def tiny(tiny_directory) -> Pretrained:
    """The model of the directory, with a context small enough to be reached."""
    model = shallow(load(tiny_directory))
    return model._replace(config=dataclasses.replace(model.config, context_length=64))


@pytest.fixture(scope="module")
def completions(tiny) -> list[Completion]:
    return generate(tiny, PROMPTS, max_new_tokens=30, temperature=1.0, seed=4)


def test_completions_are_the_decoded_ids(tiny, completions):
    prompts = [tiny.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = Generator(tiny.params, tiny.config).generate(
        prompts, 30, make_sampling(3, 1.0, seed=4), tiny.stop_ids
    )
    for completion, text, prompt, sequence in zip(completions, PROMPTS, prompts, expected):
        assert completion == Completion(
            text,
            tiny.tokenizer.decode(sequence.token_ids),
            sequence.token_ids,
            sequence.stop_reason,
            len(prompt),
            len(sequence.token_ids),
        )
    assert any(
        "\ufffd" in completion.text for completion in completions
    )  # noise: some bytes are no characters


@pytest.mark.parametrize("chunk", [1, 7])
def test_pieces_make_up_the_completions(tiny, completions, chunk):
    pieces = list(stream(tiny, PROMPTS, max_new_tokens=30, temperature=1.0, seed=4, chunk=chunk))
    for sequence, completion in enumerate(completions):
        own = [piece for piece in pieces if piece.sequence == sequence]
        assert [piece.completion for piece in own] == [None] * (len(own) - 1) + [completion]
        assert "".join(piece.text for piece in own) == completion.text
        assert sum(piece.tokens for piece in own) == completion.new_tokens
        assert max(piece.tokens for piece in own) == min(
            chunk, completion.new_tokens - 1
        )  # the first token comes alone


def test_settings_per_prompt(tiny, completions):
    """A sequence's settings and seed are its own."""
    settings = {
        "temperature": [0.0, 1.0, 1.0],
        "top_k": [0, 0, 1],
        "seed": sequence_keys(4, 3)[np.array([2, 1, 0])],
    }
    got = generate(tiny, PROMPTS, max_new_tokens=30, **settings)
    greedy = generate(tiny, PROMPTS, max_new_tokens=30)
    assert [sequence.token_ids for sequence in got] == [
        greedy[0].token_ids,
        completions[1].token_ids,
        greedy[2].token_ids,
    ]
    assert greedy[1].token_ids != completions[1].token_ids


def test_each_sequence_has_its_own_limit(tiny, completions):
    """Samples of a prompt too, and beside a limit that the context sets."""
    got = generate(tiny, PROMPTS, max_new_tokens=[4, 30, 0], temperature=1.0, seed=4)
    assert [sequence.token_ids for sequence in got] == [
        sequence.token_ids[:limit] for sequence, limit in zip(completions, (4, 30, 0))
    ]
    assert [
        sequence.new_tokens for sequence in generate(tiny, ["a"], samples=2, max_new_tokens=[2, 1])
    ] == [2, 1]


def test_prompts_of_token_ids(tiny, completions):
    ids = [tiny.tokenizer.encode(PROMPTS[0]), tiny.tokenizer.encode(PROMPTS[1])]
    got = generate(tiny, ids, max_new_tokens=30, temperature=1.0, seed=sequence_keys(4, 3)[:2])
    assert [c.token_ids for c in got] == [c.token_ids for c in completions[:2]]
    with pytest.raises(InputError, match=r"the token ids of one prompt given; .* such as \[ids\]"):
        check_texts(ids[0])
    with pytest.raises(InputError, match="99999"):
        generate(tiny, [[99999]])


def test_chat_goes_through_the_template(tiny):
    special, encode = tiny.tokenizer.special_tokens, tiny.tokenizer.encode
    written = ["<|im_start|>", "user\nHi", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    expected = [[special[part]] if part in special else encode(part) for part in written]
    assert encode_user(tiny, "Hi", chat=True) == list(itertools.chain(*expected))
    assert encode_user(tiny, "Hi", chat=False) == encode("Hi")


def test_a_prompt_that_fills_the_context(tiny):
    """Beside one that does not: an empty answer, not a missing one."""
    full = generate(tiny, [" the" * 64, "a"], max_new_tokens=3)
    assert full[0] == Completion(" the" * 64, "", [], "length", 64, 0)
    assert full[1].new_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("", {}, "prompt 1 has 0 tokens; 1 to 64"),
        (" the" * 65, {}, "prompt 1 has 65 tokens; 1 to 64"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens: -1"),
        ("a", {"temperature": -1.0}, "temperature: -1.0"),
        ("a", {"top_k": -1}, "top_k: -1"),
        ("a", {"top_p": 2.0}, "top_p: 2.0"),
        ("a", {"seed": -1}, "seed: -1"),
        ("a", {"temperature": [1.0, 1.0]}, "temperature: 2 values given for 1 sequences"),
        ("a\udc80", {}, "surrogate"),
        ("a", {"dtype": "int8"}, "dtype 'int8'"),
        ("a", {"attention": "flash"}, "attention backend 'flash'"),
        ("a", {"tempreature": 1}, "setting 'tempreature' is unknown; the nearest is temperature"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens: 2.5 given; a whole number expected"),
        (
            "a",
            {"max_new_tokens": [3, 4]},
            "max_new_tokens: 2 values given for 1 sequences; one for all or one a "
            "sequence expected",
        ),
        ("a", {"stop": 3}, "stop: 3 given; texts that end an answer expected"),
        ("a", {"stop": [["a", 3]]}, "stop: .* one list a sequence expected"),
        ("a", {"logprobs": 1000}, "logprobs: 1000 given; 0 to 100 expected"),
    ],
)
def test_what_cannot_be_done(tiny, prompt, settings, words):
    with pytest.raises(InputError, match=words):
        generate(tiny, [prompt], **settings)


def test_prompts_that_are_one(tiny):
    with pytest.raises(
        InputError,
        match=r"prompts: the text 'abc' given; a list of texts expected, such as \[text\]",
    ):
        generate(tiny, "abc")
    with pytest.raises(
        InputError, match="prompt 1 is one message; a list of conversations expected"
    ):
        check_texts([{"role": "user", "content": "Hi"}])


def test_no_stops_and_stops_in_arrays(tiny):
    (plain,) = generate(tiny, ["The cat"], max_new_tokens=8)
    assert generate(tiny, ["The cat"], max_new_tokens=8, stop=None, stop_ids=None) == [plain]
    stop = plain.token_ids[2]
    expected = generate(tiny, ["The cat"], max_new_tokens=8, stop_ids=[stop])
    assert (
        generate(tiny, ["The cat"], max_new_tokens=8, stop_ids=np.array([stop]))
        == expected
        != [plain]
    )


def test_a_model_without_tokenizer_or_template(tiny):
    with pytest.raises(InputError, match="Hugging Face tiny has no tokenizer"):
        generate(tiny._replace(tokenizer=None), ["a"])
    with pytest.raises(InputError, match="Hugging Face tiny has no chat template"):
        generate(tiny._replace(template=None), ["a"], chat=True)


def test_no_prompts(tiny):
    assert generate(tiny, []) == []


def test_a_generator_of_another_model_is_refused(tiny):
    other = dataclasses.replace(tiny.config, context_length=32)
    with pytest.raises(InputError, match="generator: one of another model given"):
        generate(tiny, ["a"], generator=Generator(tiny.params, other))
    with pytest.raises(InputError, match="chunk: 'a' given"):
        next(stream(tiny, ["a"], chunk="a"))


def test_the_work_of_a_long_answer_grows_with_its_length_alone(tiny):
    """Eight times the tokens, about eight times the time; it was fifty times."""

    def seconds(pieces: int) -> float:
        def once() -> float:
            sequence, started = _Row(tiny.tokenizer, "a", [1], ["zzz"], []), time.process_time()
            for _ in range(pieces):
                sequence.take(TokenChunk([70, 71], [-1.0, -2.0]), 10**9)
            assert len(sequence.completion().token_ids) == 2 * pieces == sequence.count
            return time.process_time() - started

        return min(once() for _ in range(3))

    assert seconds(4000) < 20 * seconds(500)
