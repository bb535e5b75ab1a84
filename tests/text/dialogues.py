"""Conversations, and templates of Llama 2 and 3 in the manner of those that are shared with
weights.
"""

Messages = list[dict[str, str]]

LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{- "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' ~ "
    "messages[0].content ~ '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = "
    "messages %}{% endif %}"
    "{% for message in turns %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (system if loop.first "
    "else '') ~ message.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ message.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)


def say(*turns: str) -> Messages:
    """Messages of a user and an assistant in turn; a first one that begins with `system:` is the
    system's.
    """
    system = [{"role": "system", "content": turns[0][7:]}] if turns[0].startswith("system:") else []
    spoken = turns[1:] if system else turns
    return system + [
        {"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(spoken)
    ]


CONVERSATIONS = [
    say("hi"),
    say("system:Answer briefly.", "Why is the sky blue?"),
    say("hi", "hello", "how are you?"),
    say("system:", "empty system"),
    say(""),
    say("  leading and trailing  \n"),
    say("\n\n", "\t", " "),
    say("👩‍👩‍👧‍👦 🎉", "e\u0301 ﬁ", "你好，世界！"),
    say("def f(x):\n    return x ** 2  # 2024\n", "```python\nprint(1)\n```", "in 1999, 7 of 10"),
    say("{{ messages }} {% raise %} {# no #}", "<b>&amp;</b>", "'\"\\"),
    say("a", "b", "c", "d", "e", "f", "g"),
    say("x" * 2000, "y\r\nz"),
    say("system: Du sprichst Deutsch. ", "Grüß Gott", "Servus", "Ende"),
]
