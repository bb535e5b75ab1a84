"""Conversations as they are published, against what they say written out; what cannot be kept is
refused.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data.records import Row, SourceFile, make_record, parse_row
from llama_jax.data.workers import encode_record
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, template_from_directory
from llama_jax.text.tokenizer import load_tokenizer


def say(*turns):
    """Messages; an odd role is given as `role:content`."""
    made = []
    for number, turn in enumerate(turns):
        role, _, rest = turn.partition(":")
        known = role in ("system", "user", "assistant", "tool")
        made.append(
            {
                "role": role if known else ("user", "assistant")[number % 2],
                "content": rest if known else turn,
            }
        )
    return made


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
HH = "\n\nHuman: Hi: you\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
FORMS = {
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [say("system:s", "user:a", "assistant:b")],
    ),
    "ShareGPT with a system of the record": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "id": "x",
        },
        [say("system:s", "user:a", "assistant:b")],
    ),
    "conversations with role": ({"conversations": say("a", "b")}, [say("a", "b")]),
    "messages as JSON text": ({"messages": json.dumps(say("a", "b"))}, [say("a", "b")]),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is ..."},
        [say("Add.\n1 2", "3")],
    ),
    "Alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "3"},
        [say("Add.", "3")],
    ),
    "Alpaca with turns before": (
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        [say("system:s", "user:a", "assistant:b", "user:c", "assistant:d")],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "b"}]},
        [say("one two", "b")],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, *say("a", "b")]},
        [say("system:s", "user:a", "assistant:b")],
    ),
    "HH-RLHF": (
        {"chosen": HH + " Good\n\nreason.", "rejected": HH + " Bad."},
        [say("Hi: you", "Yes?", "Why?", answer) for answer in ("Good\n\nreason.", "Bad.")],
    ),
    "pairs of whole dialogues": (
        {"chosen": say("a", "good"), "rejected": say("a", "bad")},
        [say("a", "good"), say("a", "bad")],
    ),
    "pairs that repeat the prompt": (
        {"prompt": "a", "chosen": say("a", "good"), "rejected": say("a", "bad")},
        [say("a", "good"), say("a", "bad")],
    ),
    "pairs that repeat the prompt behind a system": (
        {
            "prompt": "a",
            "chosen": say("system:s", "user:a", "assistant:good"),
            "rejected": say("system:s", "user:a", "assistant:bad"),
        },
        [say("system:s", "user:a", "assistant:good"), say("system:s", "user:a", "assistant:bad")],
    ),
    "pairs in ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [say("a", "good"), say("a", "bad")],
    ),
    "pairs in Alpaca": (
        {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
        [say("a\nb", "good"), say("a\nb", "bad")],
    ),
    "pairs of equal dialogues": (
        {"chosen": say("a", "b"), "rejected": say("a", "b")},
        [say("a", "b")] * 2,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_published_forms(name):
    values, wanted = FORMS[name]
    assert make_record("f:1", values, 1).body == wanted


CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1, "b": "<|im_end|>"}'},
}
CALLED = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}},
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TALK = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def test_calls_and_tools_are_kept():
    record = make_record("f:1", {"messages": TALK, "tools": json.dumps([TOOLS[0]["function"]])}, 1)
    assert record.tools == TOOLS
    assert record.body[0][1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert record.body[0][2] == {"role": "tool", "content": "3", "tool_call_id": "1"}
    shared = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "r"},
    ]
    (messages,) = make_record("f:1", {"conversations": shared}, 1).body
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of type 'image_url'",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "role and content"),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "a message with function_call",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]},
            "a message with reasoning_content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            r"weight 0\.5 of a message given, 0 or 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "calls of functions with name",
        ),
        (
            {"messages": say("a", "b"), "functions": [{"name": "f"}]},
            "functions given, the old form of tools",
        ),
        ({"messages": say("a", "b"), "tools": "add"}, "tools is a str, a list of functions"),
        (
            {"messages": say("system:t", "a"), "system": "s"},
            "system given beside another system message",
        ),
        ({"messages": "hi"}, "messages is a str, a list of messages expected"),
        (
            {"prompt": "a", "chosen": say("b", "c"), "rejected": "d"},
            "chosen begins with a message that is not the prompt",
        ),
        (
            {"chosen": say("a", "b"), "rejected": say("c", "d")},
            "begin differently and there is no prompt",
        ),
        ({"chosen": "a", "rejected": "b"}, "given without prompt"),
        ({"instruction": "a", "output": None}, "output is null, text expected"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "x": json.loads("[" * 900 + "]" * 900)}
                ]
            },
            "nested too deep",
        ),
    ],
)
def test_what_would_be_lost_is_refused(values, message):
    with pytest.raises(InputError, match=f"f:1: .*{message}"):
        parse_row(Row("f:1", values, 1), SourceFile("f", Path("f.json")))


# Templates

TOOL_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ "
    "c.function.arguments | tojson }}</call>{%- endfor %}"
    "<|im_end|>\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_directory):
    return load_tokenizer(tiny_directory)


@pytest.fixture(scope="module")
def plain(tiny_directory):
    return template_from_directory(tiny_directory)


def learned(document, tokenizer):
    """What is learned from, turn by turn, as text with special tokens."""
    names = {number: text for text, number in tokenizer.special_tokens.items()}
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.mask.astype(int), [0]])))
    turns = [document.ids[start:end].tolist() for start, end in zip(edges[::2], edges[1::2])]
    return [
        "".join(names.get(token) or tokenizer.decode([token]) for token in turn) for turn in turns
    ]


def test_calls_are_learned_where_the_template_writes_them(tokenizer, plain):
    record = make_record("f:1", {"messages": TALK, "tools": TOOLS}, 1)
    template = ChatTemplate(TOOL_TEMPLATE, plain.begin_token, plain.end_token)
    (document,) = encode_record(record, tokenizer, template)
    assert learned(document, tokenizer) == [
        '<call>add {"a": 1, "b": "<|im_end|>"}</call><|im_end|>',
        "It is 3.<|im_end|>",
    ]
    end = tokenizer.special_tokens["<|im_end|>"]
    assert (
        np.count_nonzero(document.ids == end) == 5
    )  # of tools and messages; that in the arguments is text
    assert json.dumps(TOOLS) in tokenizer.decode(document.ids.tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": TALK}, "does not write tool_calls"),
        ({"messages": say("a", "b"), "tools": TOOLS}, "does not write tools"),
        (
            {"messages": [{"role": "user", "content": "a", "name": "Bob"}, *say("a", "b")[1:]]},
            "name of a message of the user",
        ),
    ],
)
def test_templates_that_would_lose_something_are_refused(tokenizer, plain, values, message):
    with pytest.raises(InputError, match=f"f:1: .*{message}"):
        encode_record(make_record("f:1", values, 1), tokenizer, plain)


def test_templates_that_write_half_of_the_calls_are_refused(tokenizer, plain):
    for source in (
        TOOL_TEMPLATE.replace("c.function.arguments | tojson", "'{}'"),
        TOOL_TEMPLATE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    ):
        talk = [TALK[0], {**TALK[1], "tool_calls": [CALL, CALL]}]
        with pytest.raises(InputError, match="does not write tool_calls"):
            encode_record(
                make_record("f:1", {"messages": talk}, 1),
                tokenizer,
                ChatTemplate(source, None, None),
            )


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("loss", 0)])
def test_messages_of_weight_0_are_not_learned(tokenizer, plain, key, value):
    talk = say("a", "first", "b", "second")
    talk[1][key] = value
    record = make_record("f:1", {"messages": talk}, 1)
    (document,) = encode_record(record, tokenizer, plain)
    assert learned(document, tokenizer) == ["second<|im_end|>"]
    assert document.bytes_of_text == len("second")
    talk[3][key] = value
    assert make_record("f:1", {"messages": talk}, 1).is_empty


def test_long_conversations_are_read(tokenizer, plain):
    long = "word " * 600_000  # 3 MB
    (document,) = encode_record(
        make_record("f:1", {"messages": say(long, "b")}, 1), tokenizer, plain
    )
    assert learned(document, tokenizer) == ["b<|im_end|>"]
