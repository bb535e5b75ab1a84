"""`eval`: held-out loss of a text, against its definition and against transformers."""

import functools
import json
import math
import pydoc_data.topics

import jax
import numpy as np
import pytest
from support import float64_logprobs

from llama_jax.cli.evaluate import main
from llama_jax.cli.main import run_program, run_verb
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import encode_prompt
from llama_jax.training.evaluate import evaluate_text
from llama_jax.weights.load import load

TEXT = "The cat sat on the mat. 你好, 🎉 the dog saw it.\n" * 3


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return load(tiny_directory)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments) -> int:
    return run_program(lambda: main([str(argument) for argument in arguments]))


def refusal(errors: str) -> str:
    """The one line that says what is wrong; the report of a model that was loaded may stand above
    it.
    """
    (line,) = [
        line
        for line in errors.splitlines()
        if not line.startswith(("Hugging Face tiny: ", "odd: "))
    ]
    assert line.startswith("error: ")
    return line


def scored_bytes(model) -> int:
    """UTF-8 bytes of the text without its first token, which no token predicts."""
    first, *_ = model.tokenizer.encode(TEXT)
    return len(TEXT.encode()) - len(model.tokenizer.decode([first]).encode())


def summed_loss(model, ids: list[int], length: int) -> float:
    """-log p of every token but the first, in float64; each window of targets sees the tokens of
    its own window only.
    """
    total = 0.0
    for first in range(0, len(ids) - 1, length):
        window = np.array(ids[first : first + length + 1])
        logprobs = float64_logprobs(model.params, window[:-1], model.config)
        total -= float(logprobs[np.arange(len(window) - 1), window[1:]].sum())
    return total


@pytest.mark.parametrize("length", [None, 1, 20, 1000])
def test_the_definition(tiny, expected, length):
    ids = encode_prompt(tiny.tokenizer, TEXT)
    loss = summed_loss(tiny, ids, length or len(ids))
    result = expected(length)
    assert result.tokens == len(ids) - 1
    assert result.nats_per_token == pytest.approx(loss / (len(ids) - 1), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / scored_bytes(tiny), rel=1e-5)


@pytest.mark.parity
@pytest.mark.smollm2
def test_the_loss_of_transformers(smollm2_model, smollm2_torch):
    """The real model on real prose, the last window shorter than the others."""
    torch = pytest.importorskip("torch")
    text = pydoc_data.topics.topics["for"][:2000]
    ids = encode_prompt(smollm2_model.tokenizer, text)
    length = 200
    assert 2 * length < len(ids) < 3 * length
    losses = []
    for first in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[first : first + length + 1]])
        with torch.no_grad():
            scores = smollm2_torch(window[:, :-1]).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(scores, window[0, 1:], reduction="sum").item()
        )
    result = evaluate_text(smollm2_model, text, length)
    assert result.tokens == len(ids) - 1
    assert 1 < result.nats_per_token < 4  # a model that has read such prose
    assert result.nats_per_token == pytest.approx(sum(losses) / (len(ids) - 1), abs=1e-4)


@pytest.fixture(scope="module")
def expected(tiny):
    """By tokens of a window."""
    return functools.cache(lambda length: evaluate_text(tiny, TEXT, length))


def test_program(tiny_directory, tiny, expected, text_file, capsys):
    expected = expected(20)
    assert run("--model", tiny_directory, "--text", text_file, "--length", 20) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines == {
        "tokens": str(expected.tokens),
        "nats_per_token": f"{expected.nats_per_token:.6f}",
        "bits_per_byte": f"{expected.bits_per_byte:.6f}",
        "bytes": str(scored_bytes(tiny)),
    }


def test_json_of_the_verb(tiny_directory, tiny, expected, text_file, capfd):
    """Standard output, of libraries too, is JSON and nothing else."""
    command = ["eval", "--model", tiny_directory, "--text", text_file, "--length", 20, "--json"]
    assert run_program(lambda: run_verb([*map(str, command)])) == 0
    out, err = capfd.readouterr()
    assert err.splitlines() == tiny.report.brief()
    result = json.loads(out)
    assert list(result) == ["tokens", "nats_per_token", "bits_per_byte", "bytes"]
    assert result == pytest.approx(expected(20)._asdict(), rel=1e-6)


def test_records_are_texts_of_their_own(tiny_directory, tiny, tmp_path, capsys):
    """JSON lines are read as records, each begun without a past: not as one text with its
    braces.
    """
    texts = ["one two three", "four five"]
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps({"text": text}) + "\n" for text in texts), "utf8")
    assert run("--model", tiny_directory, "--text", path, "--length", 20, "--json") == 0
    parts = [evaluate_text(tiny, text, 20) for text in texts]
    wanted = sum(part.nats_per_token * part.tokens for part in parts) / sum(
        part.tokens for part in parts
    )
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == sum(part.tokens for part in parts)
    assert result["nats_per_token"] == pytest.approx(wanted, rel=1e-5)
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert run("--model", tiny_directory, "--text", path) == 2
    assert "x.jsonl:1: a conversation, text expected" in refusal(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "text.txt: no such file or folder; text (.md .py"),
        (b"good \xff", "text.txt: not UTF-8 (byte 5)"),
        (b"", "no text in it"),
        (b"\xef\xbb\xbf", "no text in it"),
        (b"a", "a text of 1 tokens"),
    ],
)
def test_texts_that_are_none(tiny_directory, tmp_path, capsys, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert run("--model", tiny_directory, "--text", path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in refusal(err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "CITATION.cff"], "a file of unknown kind (.cff)"),
        (["--text", __file__, "--length", "0"], "windows of 0"),
        (["--text", __file__, "--length", "-3"], "windows of -3"),
        (["--text", __file__, "--length", "ten"], "argument --length: invalid int value: 'ten'"),
        (["--txt", __file__], "argument '--txt' is unknown; the nearest is --text"),
        (
            [],
            "nothing to evaluate on: --text FILE, --data DIR (prepared) or --choices "
            "FILE (questions) expected",
        ),
    ],
)
def test_wrong_use_is_one_line(tiny_directory, capsys, arguments, words):
    assert run("--model", tiny_directory, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in refusal(err)


def test_a_length_beyond_the_context(tiny):
    model = tiny._replace(
        config=type(tiny.config)(**{**tiny.config.__dict__, "context_length": 16})
    )
    with pytest.raises(InputError, match="windows of 17: at least 2 tokens, windows of 1 to 16 "):
        evaluate_text(model, TEXT, 17)
    with pytest.raises(
        InputError, match=r"a text of [2-9] tokens in windows of 17"
    ):  # though the text is shorter
        evaluate_text(model, "The cat", 17)
    assert evaluate_text(model, TEXT) == evaluate_text(tiny, TEXT, 16)


def test_a_tokenizer_of_another_model(tiny):
    """Ids beyond the embedding table would be read as nothing at all, and the loss be no number."""
    vocab = 100
    small = tiny._replace(
        config=type(tiny.config)(**{**tiny.config.__dict__, "vocab_size": vocab}),
        params=jax.tree.map(
            lambda leaf: leaf,
            {
                **tiny.params,
                "embedding": tiny.params["embedding"][:vocab],
                "head": tiny.params["head"][:, :vocab],
            },
        ),
    )
    with pytest.raises(
        InputError, match=r"the text holds token \d+; the vocabulary goes from 0 to 99"
    ):
        evaluate_text(small, TEXT, 20)


def test_a_model_without_tokenizer(tiny):
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluate_text(tiny._replace(tokenizer=None), TEXT)
