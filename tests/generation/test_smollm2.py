"""A real model, from its file to its words, against transformers on the same weights."""

import numpy as np
import pytest
from matrix import rounds

from llama_jax.generation.generate import Generator
from llama_jax.generation.text import encode_user, generate, stream
from llama_jax.weights.assemble import stack

pytestmark = pytest.mark.smollm2

NEW = rounds(32, 64)
CHAT = (
    "Write a short story about a dragon who is afraid of the dark.",
    "Explain why the sky is blue. 请用中文说 🌍🎉",
)
PLAIN = (
    "def fibonacci(n):\n",
    "Frogs 🐸 and 数学, 1234.5 km:",
    "Once upon a time there was a little girl who",
)[: rounds(2, 3)]
LONG = "The history of the city is told in three parts. " * 60  # over 600 tokens


@pytest.fixture(scope="module")
def prompts(smollm2_model):
    """Token ids of short prompts and a long one."""
    short = [encode_user(smollm2_model, text, chat=True) for text in CHAT] + [
        encode_user(smollm2_model, text, chat=False) for text in PLAIN
    ]
    long = encode_user(smollm2_model, LONG + "In short,", chat=False)
    assert len(long) > 600
    return short, long


@pytest.fixture(scope="module")
def ours(smollm2_model, prompts):
    """Greedy ids: the short prompts as one ragged batch, the long one alone (its attention is
    blockwise), from stacked layers.
    """
    params, config = smollm2_model.params, smollm2_model.config
    unrolled, stacked = Generator(params, config), Generator(stack(params), config)
    short, long = prompts
    return [
        sequence.token_ids
        for sequence in (*unrolled.generate(short, NEW), *stacked.generate([long], NEW))
    ]


@pytest.mark.parity
def test_greedy_ids_equal_transformers(smollm2_torch, prompts, ours):
    """Each token is its most probable one after those before, and clearly so: the comparison rests
    on no coin toss.
    """
    torch = pytest.importorskip("torch")
    for prompt, got in zip([*prompts[0], prompts[1]], ours):
        with torch.no_grad():
            logits = (
                smollm2_torch(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1].numpy()
            )
        assert len(got) == NEW
        assert got == logits.argmax(-1).tolist()
        best, second = np.sort(logits, axis=-1)[:, :-3:-1].T
        assert (best - second).min() > 1e-3


def test_the_capital_of_france(smollm2_model):
    """From the GGUF file to the answer: weights, tokenizer, template, stop token."""
    (completion,) = generate(
        smollm2_model, ["What is the capital of France?"], chat=True, max_new_tokens=24
    )
    assert completion.text == "The capital of France is Paris."
    assert completion.stop_reason == "stop"
    assert completion.token_ids[-1] == smollm2_model.tokenizer.special_tokens["<|im_end|>"]
    assert completion.new_tokens == len(completion.token_ids) < 24
    assert completion.prompt_tokens == 37


def test_streaming(smollm2_model):
    """Pieces make up the text, and no piece ever holds half a character: an emoji is three or four
    tokens here.
    """
    pieces = list(stream(smollm2_model, ["🎉🐸🌍" * 4 + "🎉"], max_new_tokens=24, chunk=1))
    *before, completion = [piece.completion for piece in pieces]
    assert not any(before)
    assert "".join(piece.text for piece in pieces) == completion.text
    assert completion.text == smollm2_model.tokenizer.decode(completion.token_ids)
    assert (
        sum(piece.tokens for piece in pieces) == completion.new_tokens == len(completion.token_ids)
    )
    emoji = [piece.text for piece in pieces if piece.text]
    assert {"🐸", "🌍"} <= set(emoji)
    assert "\ufffd" not in completion.text
