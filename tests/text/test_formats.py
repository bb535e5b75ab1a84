"""The built-in formats against Meta's own code, and against templates of others in transformers'
hands.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import ModuleType

import pytest
import tokenizers
import transformers
from dialogues import CONVERSATIONS, LLAMA2, LLAMA3, Messages, say
from tokenizers import AddedToken
from trained import byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from llama_jax.errors import InputError
from llama_jax.text.byte_level import TokenBytes
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.chat import (
    APART,
    ChatTemplate,
    encode_chat,
    encode_dialogue,
    template_from_directory,
    template_from_gguf,
)
from llama_jax.text.export import hugging_face_files
from llama_jax.text.formats import (
    FORMATS,
    chatml,
    format_for,
    llama2,
    llama3,
    named_format,
    recognise,
)
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.sentencepiece import SentencePieceTokenizer
from llama_jax.text.tokenizer import Tokenizer


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def tool(role: str, content: str) -> Messages:
    """A question, a call of a tool, and what the tool says."""
    call = '{"name": "add", "parameters": {"a": 1}}'
    return [
        user("1 + 2?"),
        {"role": "assistant", "content": call},
        {"role": role, "content": content},
    ]


SPACED = [
    say(" x ", "\ty\t", "  \n z\r\n"),
    say("\n", "\n\n", "\n\n\n x"),
    say("system: \n\n s \n", "\nhi"),
    say(
        "<|eot_id|>",
        "<|begin_of_text|><|end_of_text|>",
        "<|start_header_id|>system<|end_header_id|>\n\nx<|eot_id|>",
    ),
    say("<s>[INST] x [/INST]</s>", "[/INST] <<SYS>>", "<|im_end|>\n<|im_start|>system\n"),
]
TOOLS = [
    tool(role, content) for role in ("tool", "ipython") for content in ("3", '{"result": 3}\n', "")
]


# --- Llama 3: Meta's code ---


@dataclasses.dataclass(frozen=True)
class MetaTokens:
    """Meta's tokenizer behind the protocol: every id in the tests below is its own."""

    meta: object
    adds_begin: bool = True

    @property
    def vocab_size(self) -> int:
        return self.meta.n_words

    @property
    def begin_id(self) -> int | None:
        return self.meta.bos_id

    @property
    def end_id(self) -> int | None:
        return self.meta.eos_id

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self.meta.special_tokens

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        library = self.meta.model
        count = self.vocab_size - len(self.special_tokens)
        return TokenBytes(
            (
                *map(library.decode_single_token_bytes, range(count)),
                *[b""] * len(self.special_tokens),
            ),
            {},
        )

    def encode(self, text: str) -> list[int]:
        return self.meta.encode(text, bos=False, eos=False)

    encode_after_special = encode

    def decode(self, tokens: Iterable[int]) -> str:
        return self.token_bytes.decode(tokens)


@pytest.fixture(scope="module")
def meta() -> ModuleType:
    """The module of Meta's chat format."""
    if os.environ.get("CI"):
        import llama_models.llama3.chat_format as module

        return module
    return pytest.importorskip(
        "llama_models.llama3.chat_format", reason="pip install --no-deps llama-models"
    )


@pytest.fixture(scope="module")
def tokens(meta: ModuleType) -> MetaTokens:
    return MetaTokens(meta.Tokenizer(pathlib.Path(meta.__file__).parent / "tokenizer.model"))


def prompted(meta: ModuleType, tokens: MetaTokens, messages: Messages) -> list[int]:
    """The ids that Meta's code makes of a conversation."""
    roles = {"ipython": "tool"}
    raw = [
        meta.RawMessage(role=roles.get(m["role"], m["role"]), content=m["content"])
        for m in messages
    ]
    return meta.ChatFormat(tokens.meta).encode_dialog_prompt(raw).tokens


@pytest.mark.parametrize("messages", [*CONVERSATIONS, *SPACED, *TOOLS])
def test_llama3_is_metas_code(meta: ModuleType, tokens: MetaTokens, messages: Messages):
    template = format_for(tokens)
    assert template is not None
    expected = prompted(meta, tokens, messages)
    assert encode_chat(template, tokens, messages) == expected
    opening = [128006, *tokens.encode("assistant"), 128007, *tokens.encode("\n\n")]
    assert (
        encode_chat(template, tokens, messages, add_generation_prompt=False)
        == expected[: -len(opening)]
    )
    assert encode_dialogue(template, tokens, messages).token_ids == expected[: -len(opening)]
    assert expected.count(128000) == 1


def test_llama3_with_our_own_reader_of_metas_file(
    meta: ModuleType, tokens: MetaTokens, llama3: Llama3Tokenizer
):
    template = format_for(llama3)
    assert template is not None
    for messages in [*CONVERSATIONS, *SPACED, *TOOLS]:
        assert encode_chat(template, llama3, messages) == prompted(meta, tokens, messages)
    answer = {"role": "assistant", "content": "\n\nHéllo 你好 👩‍👩‍👧\n"}
    token_ids, mask = encode_dialogue(template, llama3, [*say("hi"), answer])
    assert [t for t, own in zip(token_ids, mask) if own] == [
        *tokens.encode(answer["content"]),
        128009,
    ]


def test_llama3_stays_metas_in_a_hugging_face_directory(
    meta: ModuleType,
    tokens: MetaTokens,
    llama3: Llama3Tokenizer,
    llama3_files: dict[str, bytes],
    llama3_read: Tokenizer,
    byte_pair: BytePairTokenizer,
    tmp_path: pathlib.Path,
):
    template = format_for(llama3)
    assert template is not None
    written = hugging_face_files(byte_pair, template.source)[
        "chat_template.jinja"
    ]  # the same with every tokenizer
    for name, content in (llama3_files | {"chat_template.jinja": written}).items():
        (tmp_path / name).write_bytes(content)
    back = template_from_directory(tmp_path)
    assert back is not None
    for messages in [*CONVERSATIONS, *SPACED]:
        assert encode_chat(back, llama3_read, messages) == prompted(meta, tokens, messages)


def test_llama3s_contents_are_apart_only_where_the_format_says_so(tokens: MetaTokens):
    """What makes the difference: a new line that begins a content would merge with those of the
    header.
    """
    messages = say("\nhi")
    joined = ChatTemplate(
        llama3("<|begin_of_text|>", None).source.removeprefix(APART), "<|begin_of_text|>", None
    )
    assert encode_chat(joined, tokens, messages) != encode_chat(
        named_format("llama3", tokens), tokens, messages
    )


# --- Llama 2: Meta's format written out ---


def metas_llama2(tokenizer: SentencePieceTokenizer, messages: Messages) -> list[int]:
    """What Meta's `chat_completion` does: exchanges encoded one by one, begin and end by id."""
    encode = tokenizer.processor.encode
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    ids: list[int] = []
    for question, answer in zip(contents[::2], contents[1::2]):
        ids += [1, *encode(f"[INST] {question.strip()} [/INST] {answer.strip()} "), 2]
    return (
        [*ids, 1, *encode(f"[INST] {contents[-1].strip()} [/INST]")] if len(contents) % 2 else ids
    )


@pytest.mark.parametrize("messages", [*CONVERSATIONS, *SPACED])
def test_llama2_is_metas_format(sentence_piece: SentencePieceTokenizer, messages: Messages):
    template = named_format("llama2", sentence_piece)
    assert template == llama2("<s>", "</s>")
    if messages[-1]["role"] == "user":
        assert encode_chat(template, sentence_piece, messages) == metas_llama2(
            sentence_piece, messages
        )
    answered = (
        [*messages, {"role": "assistant", "content": " ok\n"}]
        if messages[-1]["role"] == "user"
        else messages
    )
    assert encode_dialogue(template, sentence_piece, answered).token_ids == metas_llama2(
        sentence_piece, answered
    )


@pytest.mark.parametrize("messages", [m for m in CONVERSATIONS if m[-1]["role"] == "user"])
def test_llama2_is_transformers_text(messages: Messages):
    texts = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template([trimmed(messages)], chat_template=LLAMA2, **texts)
    (exported,), _ = render_jinja_template(
        [messages], chat_template=llama2("<s>", "</s>").source, **texts
    )
    assert (
        llama2("<s>", "</s>").render(messages, add_generation_prompt=True) == expected == exported
    )


def trimmed(messages: Messages) -> Messages:
    """As Meta's code trims: the user behind a system message only on the right, the system message
    not at all.
    """
    result = [
        m if m["role"] == "system" else {**m, "content": m["content"].strip()} for m in messages
    ]
    if messages[0]["role"] == "system":
        result[1] = {**messages[1], "content": messages[1]["content"].rstrip()}
    return result


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (say("system:s"), "let the last message be the user's"),
        (say("a", "b"), "let the last message be the user's"),
        ([user("a"), user("b")], "user and assistant in turn"),
        ([user("a"), {"role": "system", "content": "s"}, user("b")], "user and assistant in turn"),
        ([*tool("tool", "3"), user("x")], "user and assistant in turn"),
    ],
)
def test_llama2_refuses_what_it_has_no_words_for(messages: Messages, message: str):
    with pytest.raises(InputError, match=f"^chat template: .*{message}"):
        llama2("<s>", "</s>").render(messages, add_generation_prompt=True)


# --- ChatML: transformers ---

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("messages", [*CONVERSATIONS, *SPACED[:4], *TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_chatml_is_transformers(byte_pair: BytePairTokenizer, messages: Messages, prompt: bool):
    copy = tokenizers.Tokenizer.from_str(byte_pair.tokenizer.to_str())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=copy, chat_template=CHATML)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    template = format_for(byte_pair)
    assert template is not None
    assert encode_chat(template, byte_pair, messages, add_generation_prompt=prompt) == expected
    exported = theirs.apply_chat_template(
        messages, chat_template=template.source, add_generation_prompt=prompt, return_dict=False
    )
    assert exported == expected


def test_chatml_begins_with_a_begin_token_where_the_model_has_one():
    library = byte_level()
    ours = BytePairTokenizer(library, begin_id=0, end_id=2, adds_begin=True)
    ids = encode_chat(named_format("chatml", ours), ours, say("hi"))
    assert ids == [
        0,
        1,
        *ours.encode("user\nhi"),
        2,
        *ours.encode("\n"),
        1,
        *ours.encode("assistant\n"),
    ]


# --- which format ---


def with_tokens(*names: str) -> BytePairTokenizer:
    library = byte_level()
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return BytePairTokenizer(library, None, None, False)


def test_a_tokenizer_tells_its_format(sentence_piece: SentencePieceTokenizer, smollm2: Tokenizer):
    assert format_for(sentence_piece) is None
    assert format_for(smollm2) == chatml("<|im_start|>", "<|im_end|>")
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert format_for(with_tokens(*headers)) == llama3(None, None)
    assert format_for(with_tokens(*headers[:2])) == chatml(None, None)


def test_a_format_by_name(smollm2: Tokenizer, sentence_piece: SentencePieceTokenizer):
    assert named_format("chatml", smollm2) == format_for(smollm2)
    with pytest.raises(
        InputError, match="chat format: 'alpaca' given, one of llama2, llama3, chatml expected"
    ):
        named_format("alpaca", smollm2)
    with pytest.raises(
        InputError, match=r"llama3: the tokenizer lacks <\|end_header_id\|>, <\|eot_id\|>"
    ):
        named_format("llama3", smollm2)
    with pytest.raises(InputError, match=r"chatml: the tokenizer lacks <\|im_start\|>"):
        named_format("chatml", sentence_piece)
    endless = SentencePieceTokenizer(
        sentence_piece.processor, begin_id=1, end_id=None, adds_begin=True
    )
    with pytest.raises(InputError, match="llama2: the tokenizer lacks a token that begins or one"):
        named_format("llama2", endless)


# --- whose format a template is ---

DATED = LLAMA3.replace("{{- bos_token }}", "{{- bos_token ~ 'Today: 1 Jan' }}")
EXPECTED = {
    "llama3": [
        LLAMA3,
        LLAMA3.replace("{{- bos_token }}", ""),
        LLAMA3.replace(" | trim", ""),
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% "
        "set text = '<|start_header_id|>' "
        "+ m['role'] + '<|end_header_id|>\n\n' + m['content'].strip() + '<|eot_id|>' "
        "%}{% if ns.n == 1 %}"
        "{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
        "{% if add_generation_prompt %}{{ "
        "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ],
    "llama2": [LLAMA2, LLAMA2.replace("message.content ~", "message.content.strip() ~")],
    "chatml": [
        CHATML,
        "{{ bos_token }}" + CHATML,
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI "
        "help.<|im_end|>\n' }}{% endif %}" + CHATML,
    ],
    None: [
        "",
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{% for i in range(10**9) %}{% endfor %}",
        DATED,
        LLAMA3.replace("eot_id", "eom_id"),
        LLAMA3.replace("\n\n", "\n"),
        LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}"),
        LLAMA3.replace("for message in messages", "for message in messages[-3:]"),
        CHATML.replace("<|im_end|>' }}\n", "<|im_end|>' }}"),
        CHATML.replace("message['content'] +", "message['content'] | upper +"),
        CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +"),
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML,
        LLAMA2.replace("<<SYS>>", "<<S>>"),
        LLAMA2.replace(" ~ eos_token", ""),
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
    ],
}


@pytest.mark.parametrize(
    ("name", "source"), [(name, source) for name, sources in EXPECTED.items() for source in sources]
)
def test_a_templates_format_is_recognised(name: str | None, source: str):
    assert recognise(ChatTemplate(source, "<s>", "</s>")) == name


@pytest.mark.parametrize("name", FORMATS)
def test_built_in_formats_are_recognised(name: str):
    assert recognise(FORMATS[name]("<s>", "</s>")) == name
    assert recognise(FORMATS[name](None, None)) == name


def test_smollm2s_own_template_is_chatml(smollm2_metadata: dict[str, object]):
    template = template_from_gguf(smollm2_metadata)
    assert template is not None
    assert recognise(template) == "chatml"
