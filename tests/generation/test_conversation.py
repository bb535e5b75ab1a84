"""Conversations: every answer equals that of the same messages asked from nothing, and only new
tokens are run.
"""

import dataclasses

import numpy as np
import pytest
from support import shallow

from llama_jax.errors import InputError
from llama_jax.generation.text import Conversation, encode_user, generate
from llama_jax.text.chat import ChatTemplate
from llama_jax.weights.assemble import stack
from llama_jax.weights.load import Pretrained, load

# As templates of reasoning models do: thoughts of earlier turns are left out, and the number of
# messages is in front.
REWRITES = (
    "{{ messages | length }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content[:3] if message.role == 'assistant' and not loop.last else "
    "message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tiny_directory) -> Pretrained:
    return shallow(load(tiny_directory))


def small(model: Pretrained, context: int) -> Pretrained:
    return model._replace(config=dataclasses.replace(model.config, context_length=context))


@pytest.fixture
def run_tokens(monkeypatch):
    """Counts the tokens that a conversation's generator prefills; call it to read and clear the
    count.
    """

    def watch(conversation: Conversation):
        programs, counts = conversation.generator.programs, []

        def counted(original):
            def run(params, tokens, lengths, *rest, **named):
                counts.append(int(np.sum(lengths)))
                return original(params, tokens, lengths, *rest, **named)

            return run

        for name in ("prefill", "prefill_more"):
            monkeypatch.setattr(programs, name, counted(getattr(programs, name)))

        def taken() -> int:
            total = sum(counts)
            counts.clear()
            return total

        return taken

    return watch


def said(conversation: Conversation, text: str, **settings) -> str:
    return "".join(piece.text for piece in conversation.ask(text, **settings))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_turn_runs_the_new_tokens_only(tiny, run_tokens):
    """The second prompt is the first, the answer and the new words: first and answer are in the
    cache.
    """
    conversation = Conversation(tiny)
    taken = run_tokens(conversation)
    # Noise of random weights does not survive decoding and encoding; a bias makes the answer
    # letters.
    letters = {"max_new_tokens": 12, "logit_bias": {tiny.tokenizer.encode("x")[0]: 1000.0}}
    assert said(conversation, "The cat sat on the mat.", **letters) == "x" * 12
    first = encode_user(tiny, [user("The cat sat on the mat.")], chat=True)
    assert (taken(), conversation.reused) == (len(first), 0)
    said(conversation, "And the dog?", **letters)
    second = encode_user(
        tiny,
        [user("The cat sat on the mat."), assistant("x" * 12), user("And the dog?")],
        chat=True,
    )
    # The last token of an answer has been drawn, not run.
    assert conversation.reused == len(first) + 11
    assert taken() == len(second) - conversation.reused


@pytest.mark.parametrize("template", [None, REWRITES], ids=["appends", "rewrites"])
def test_answers_are_those_of_the_messages_alone(tiny, template):
    """Whatever was in the cache: three turns, a system message in between, another temperature
    each.
    """
    model = tiny if template is None else tiny._replace(template=ChatTemplate(template, None, None))
    conversation = Conversation(model)
    for turn, text in enumerate(["The cat", "你好 🎉", "And then?"]):
        if turn == 1:
            conversation.system("Be brief.")
        settings = {"max_new_tokens": 9 + turn, "temperature": turn / 2, "seed": turn}
        messages = [*conversation.messages, user(text)]
        (alone,) = generate(model, [messages], **settings)
        *_, last = conversation.ask(text, **settings)
        assert last.completion == alone
        assert conversation.messages == [*messages, assistant(alone.text)]
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(conversation.messages) == 7


def test_closing_keeps_what_came(tiny):
    conversation = Conversation(tiny)
    pieces = conversation.ask("The cat", max_new_tokens=1000, chunk=3)
    heard = "".join(next(pieces).text for _ in range(4))
    pieces.close()
    assert heard
    assert conversation.messages == [user("The cat"), assistant(heard)]
    (alone,) = generate(tiny, [[*conversation.messages, user("Go on")]], max_new_tokens=8)
    assert said(conversation, "Go on", max_new_tokens=8) == alone.text
    assert conversation.reused > 0


class Interruption(Exception):
    """As KeyboardInterrupt, which pytest takes for itself."""


def test_an_interruption_in_the_middle_of_a_step(tiny, monkeypatch):
    """What came is kept; the cache, which the device may have been writing into, is not used
    again.
    """
    conversation = Conversation(tiny)
    pieces = conversation.ask("The cat", max_new_tokens=1000, chunk=3)
    heard = "".join(next(pieces).text for _ in range(4))

    def interrupted(*args, **settings):
        raise Interruption

    with monkeypatch.context() as patched:
        patched.setattr(conversation.generator.programs, "advance", interrupted)
        with pytest.raises(Interruption):
            next(pieces)
    assert conversation.messages == [user("The cat"), assistant(heard)]
    (alone,) = generate(tiny, [[*conversation.messages, user("Go on")]], max_new_tokens=8)
    assert said(conversation, "Go on", max_new_tokens=8) == alone.text
    assert conversation.reused == 0


def test_an_answer_that_nobody_read_was_never_given(tiny):
    conversation = Conversation(tiny)
    conversation.ask("The cat", max_new_tokens=8).close()
    assert conversation.messages == []


def test_one_answer_at_a_time(tiny):
    """A second question would be asked without the first, and the later of the two answers would
    take the other's place.
    """
    conversation = Conversation(tiny)
    first = conversation.ask("The cat", max_new_tokens=1000, chunk=3)
    busy = "an answer is still being given; read it to its end, or close\\(\\) it"
    for refused in (
        lambda: conversation.ask("And the dog?"),
        conversation.reset,
        lambda: conversation.system("Brief."),
    ):
        with pytest.raises(InputError, match=busy):
            refused()
    heard = next(first).text + next(first).text
    with pytest.raises(InputError, match=busy):
        conversation.ask("And the dog?")
    del first  # as a loop that is left by `break`
    assert conversation.messages == [user("The cat"), assistant(heard)]
    second = said(conversation, "And the dog?", max_new_tokens=4)
    assert conversation.messages[2:] == [user("And the dog?"), assistant(second)]
    conversation.ask("Nobody reads this", max_new_tokens=4)
    assert len(conversation.messages) == 4
    conversation.reset()


def test_stop_strings_end_a_turn(tiny):
    """The tokens of the stop string are in the cache, not in the text: the next turn begins before
    them.
    """
    (whole,) = generate(tiny, ["The cat"], max_new_tokens=12, chat=True)
    stop = whole.text[3:5]
    conversation = Conversation(tiny)
    assert (
        said(conversation, "The cat", max_new_tokens=12, stop=stop)
        == whole.text[: whole.text.index(stop)]
    )
    (alone,) = generate(tiny, [[*conversation.messages, user("Go on")]], max_new_tokens=8)
    assert said(conversation, "Go on", max_new_tokens=8) == alone.text


def test_a_conversation_longer_than_the_context(tiny):
    model = small(tiny, 64)
    conversation = Conversation(model)
    said(conversation, "Hi", max_new_tokens=4)
    before = list(conversation.messages)
    tokens = len(encode_user(model, [*before, user("the " * 50)], chat=True))
    with pytest.raises(
        InputError,
        match=rf"conversation has {tokens} tokens; fewer than 64 \(the model's context\)",
    ):
        conversation.ask("the " * 50)
    assert conversation.messages == before
    assert said(conversation, "Hi", max_new_tokens=4) is not None
    assert len(conversation.messages) == 4
    conversation.reset()
    assert conversation.messages == []


def test_a_context_that_runs_full_ends_the_answer(tiny):
    conversation = Conversation(small(tiny, 48))
    *_, last = conversation.ask("Hi", max_new_tokens=1000)
    assert last.completion.prompt_tokens + last.completion.new_tokens == 48
    with pytest.raises(InputError, match="the conversation has"):
        conversation.ask("Hi")


def test_system_and_reset(tiny):
    conversation = Conversation(tiny, [user("a"), assistant("b")])
    conversation.system("One.")
    conversation.system("Two.")
    assert conversation.messages == [
        {"role": "system", "content": "Two."},
        user("a"),
        assistant("b"),
    ]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Two."}]
    conversation.system("")
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"max_new_tokens": -1}, "max_new_tokens: -1"),
        ({"chunk": 0}, "chunk: 0"),
        ({"samples": 2}, "samples: 2 given; a conversation goes on from 1 answer"),
    ],
)
def test_wrong_settings_change_nothing(tiny, settings, words):
    conversation = Conversation(tiny)
    with pytest.raises(InputError, match=words):
        conversation.ask("The cat", **settings)
    assert conversation.messages == []


def test_a_model_without_a_template(tiny):
    with pytest.raises(
        InputError, match="Hugging Face tiny has no chat template; a conversation needs one"
    ):
        Conversation(tiny._replace(template=None))


@pytest.mark.smollm2
def test_the_real_model_remembers(smollm2_model):
    """Two turns of the real model, its layers stacked: the second needs the first answer, and costs
    a few new tokens.
    """
    model = smollm2_model._replace(params=stack(smollm2_model.params))
    conversation = Conversation(model)
    assert (
        said(conversation, "What is the capital of France?", max_new_tokens=48)
        == "The capital of France is Paris."
    )
    messages = [*conversation.messages, user("Which river flows through it?")]
    (alone,) = generate(model, [messages], max_new_tokens=24)
    *_, last = conversation.ask("Which river flows through it?", max_new_tokens=24)
    assert last.completion == alone
    assert "Paris" in alone.text
    assert alone.prompt_tokens - conversation.reused < 25 < conversation.reused
