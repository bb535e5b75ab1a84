"""Multiple-choice accuracy: against log-probabilities summed by hand, and lines that are no
questions.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.cli.evaluate import main
from llama_jax.cli.main import run_program
from llama_jax.errors import InputError
from llama_jax.generation.score import Question, evaluate_choices, joined, read_questions
from llama_jax.model.llama import logits
from llama_jax.text.tokenizer import encode_prompt
from llama_jax.training.evaluate import evaluate_text
from llama_jax.weights.load import load

RNG = np.random.default_rng(0)
WORDS = [
    "the cat",
    "a dog",
    "on the mat",
    "log",
    "brown fox jumps",
    "sat",
    "quick",
    "saw the dog sit and sat",
]
QUESTIONS = [
    Question(
        f"The {WORDS[i % 8]} sat on",
        [str(w) for w in RNG.choice(WORDS, 3, replace=False)],
        int(RNG.integers(3)),
    )
    for i in range(12)
]


LOGITS = jax.jit(logits, static_argnums=2)


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return load(tiny_directory)


def text_logprob(model, prompt: str, choice: str) -> float:
    """log p of what follows the prompt's tokens, by the whole text's logits in float64."""
    ids, before = (
        encode_prompt(model.tokenizer, f"{prompt} {choice}"),
        len(encode_prompt(model.tokenizer, prompt)),
    )
    padded = np.zeros((1, 48), np.int32)  # one shape for all texts; what comes later is not seen
    padded[0, : len(ids)] = ids
    scores = np.asarray(LOGITS(model.params, jnp.asarray(padded), model.config)[0], np.float64)
    return float(
        sum(
            scores[i - 1, ids[i]] - np.log(np.exp(scores[i - 1]).sum())
            for i in range(before, len(ids))
        )
    )


def test_accuracy_is_its_definition(tiny):
    raw = normed = 0
    for prompt, choices, answer in QUESTIONS:
        values = np.array([text_logprob(tiny, prompt, choice) for choice in choices])
        raw += values.argmax() == answer
        normed += (values / [len(choice.encode()) for choice in choices]).argmax() == answer
    got = evaluate_choices(tiny, QUESTIONS)
    assert (got.questions, got.acc, got.acc_norm) == (12, raw / 12, normed / 12)
    right = np.array([1.0] * raw + [0.0] * (12 - raw))
    assert got.acc_stderr == pytest.approx(right.std(ddof=1) / math.sqrt(12))
    assert raw != normed  # these questions tell the two apart


def test_short_answers_win_raw_and_not_per_byte(tiny, monkeypatch):
    """Every token costs 1 nat here, a word of four bytes: the longer answer costs more, but not
    more a byte.
    """
    from llama_jax.generation.score import Score

    def flat(generator, prompts, continuations):
        return [Score(-1.0 * n - 0.5, False, [], []) for n in (1, 4)]

    monkeypatch.setattr("llama_jax.generation.score.score_tokens", flat)
    got = evaluate_choices(tiny, [Question("q", ["mat!", "mat!mat!mat!mat!"], 0)])
    assert (got.acc, got.acc_norm, got.acc_stderr) == (1.0, 0.0, 0.0)


def test_files(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"prompt": "1 + 1 =", "choices": ["1", "2"], "answer": 1}\n\n'
        '{"question": "你好", "choices": ["a", "b", "c"], "answer": "b", "source": "elsewhere"}\n'
    )
    assert read_questions(path) == [
        Question("1 + 1 =", ["1", "2"], 1),
        Question("你好", ["a", "b", "c"], 1),
    ]
    assert [joined("a", "b"), joined("a ", "b"), joined("a", "\nb"), joined("", "b")] == [
        " b",
        "b",
        "\nb",
        "b",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: [1] given"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"choices": ["a", "b"], "answer": 0}', "prompt None given; a text expected"),
        (
            '{"prompt": "q", "choices": ["a"], "answer": 0}',
            "choices ['a'] given; a list of two or more",
        ),
        ('{"prompt": "q", "choices": ["a", "a"], "answer": 0}', "different texts"),
        ('{"prompt": "q", "choices": ["a", ""], "answer": 0}', "different texts"),
        ('{"prompt": "q", "choices": "ab", "answer": 0}', "choices 'ab' given"),
        (
            '{"prompt": "q", "choices": ["a", "b"], "answer": 2}',
            "answer 2 given; 0 to 1 or one of the choices expected",
        ),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": "c"}', "answer 'c' given"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": true}', "answer True given"),
        ('{"prompt": "q", "choices": ["a", "b"]}', "answer None given"),
    ],
)
def test_lines_that_are_no_questions(tmp_path, line, words):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "q", "choices": ["a", "b"], "answer": 0}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        read_questions(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_questions_and_too_long_ones(tiny, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no questions"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no questions given"):
        evaluate_choices(tiny, [])
    small = tiny._replace(
        config=type(tiny.config)(**{**tiny.config.__dict__, "context_length": 16})
    )
    with pytest.raises(
        InputError, match="question 2 has more tokens than the model's context of 16"
    ):
        evaluate_choices(small, [Question("a", ["b", "c"], 0), Question("a" * 30, ["b", "c"], 0)])


def write_questions(path):
    path.write_text("".join(json.dumps(question._asdict()) + "\n" for question in QUESTIONS))
    return path


def test_program_with_questions(tiny_directory, tiny, tmp_path, capsys):
    path = write_questions(tmp_path / "q.jsonl")
    expected = evaluate_choices(tiny, QUESTIONS)
    assert (
        run_program(
            lambda: main(["--model", str(tiny_directory), "--choices", str(path), "--json"])
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected._asdict())
    assert run_program(lambda: main(["--model", str(tiny_directory), "--choices", str(path)])) == 0
    assert f"acc              {expected.acc:.6f}\n" in capsys.readouterr().out


def test_program_with_several_texts_and_questions(tiny_directory, tiny, tmp_path, capsys):
    texts = {
        str(tmp_path / name): text
        for name, text in (("a", "The cat sat on the mat."), ("b", "你好, the dog. " * 9))
    }
    for name, text in texts.items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    path = str(write_questions(tmp_path / "q.jsonl"))
    words = [word for name in texts for word in ("--text", name)]
    arguments = ["--model", str(tiny_directory), *words, "--choices", path]
    assert run_program(lambda: main([*arguments, "--json"])) == 0
    got = json.loads(capsys.readouterr().out)
    each = {name: evaluate_text(tiny, text) for name, text in texts.items()}

    def scored(text: str) -> int:
        """Bytes of all but the first token."""
        first, *_ = tiny.tokenizer.encode(text)
        return len(text.encode()) - len(tiny.tokenizer.token_bytes.pieces[first])

    nats = sum(result.nats_per_token * result.tokens for result in each.values())
    tokens, size = sum(r.tokens for r in each.values()), sum(map(scored, texts.values()))
    assert got["total"] == pytest.approx(
        {
            "tokens": tokens,
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size,
            "bytes": size,
        }
    )
    assert list(got) == [*texts, "total", path]
    assert run_program(lambda: main(arguments)) == 0
    head, first, _, last, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["tokens", "nats_per_token", "bits_per_byte", "bytes"]
    name, result = next(iter(each.items()))
    figures = [f"{value:.6f}" for value in (result.nats_per_token, result.bits_per_byte)]
    assert first.split() == [name, str(result.tokens), *figures, str(result.bytes)]
    assert last.split()[0] == "total"
    assert rest[0].startswith("questions")
