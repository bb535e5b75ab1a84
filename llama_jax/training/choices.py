"""Multiple-choice questions from JSON lines, answered by log-probability: the choice that the model finds most probable."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator
from llama_jax.generation.score import encode_pair, score_tokens
from llama_jax.generation.text import require_tokenizer
from llama_jax.weights.load import Pretrained

_EXPECTED = '{"prompt": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX or one of the choices}'


class Question(NamedTuple):
    """A question with its answers.

    Attributes:
      prompt: what stands before the answer.
      choices: possible answers, at least two.
      answer: index of the right one.
    """

    prompt: str
    choices: list[str]
    answer: int


class Accuracy(NamedTuple):
    """How many questions a model answers rightly.

    Attributes:
      questions: how many were asked.
      acc: share whose right choice has the highest log-probability.
      acc_norm: the same with log-probabilities a byte of the choice, which does not favour short ones.
      acc_stderr: standard error of `acc`.
      acc_norm_stderr: standard error of `acc_norm`.
    """

    questions: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, one JSON object a line; `question` is another name for `prompt`, empty lines are passed over.

    Raises:
      InputError: naming the line that is no question; for a file without any.
    """
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --choices takes a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; convert it first") from None
    questions = [_question(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f"{path}: no questions; one a line expected: {_EXPECTED}")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; {_EXPECTED} expected") from None
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: {entry!r:.60} given; {_EXPECTED} expected")
    prompt, answer = entry.get("prompt", entry.get("question")), entry.get("answer")
    choices: list = entry["choices"] if isinstance(entry.get("choices"), list) else []
    if not isinstance(prompt, str):
        raise InputError(f"{where}: prompt {prompt!r:.60} given; a text expected")
    texts = len(choices) > 1 and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not texts or len(set(choices)) < len(choices):
        raise InputError(f"{where}: choices {entry.get('choices')!r:.60} given; a list of two or more different texts expected")
    index = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise InputError(f"{where}: answer {answer!r:.60} given; 0 to {len(choices) - 1} or one of the choices expected")
    return Question(prompt, choices, index)


def evaluate_choices(model: Pretrained, questions: Sequence[Question], generator: Generator | None = None) -> Accuracy:
    """The accuracy of a model on questions. A space is put between prompt and choice unless one of them brings white space.

    Args:
      model: from `llama_jax.load`.
      questions: one at least.
      generator: to use; else one is made.

    Raises:
      InputError: for no questions, and naming the question that is longer than the model's context.
    """
    if not questions:
        raise InputError("no questions given; one at least expected")
    tokenizer, context = require_tokenizer(model), model.config.context_length
    pairs = []
    for number, question in enumerate(questions, 1):
        for choice in question.choices:
            pair = encode_pair(tokenizer, question.prompt, joined(question.prompt, choice))
            if len(pair[0]) + len(pair[1]) > context:
                raise InputError(f"question {number} has more tokens than the model's context of {context}; shorten it")
            pairs.append(pair)
    generator = generator or Generator(model.params, model.config)
    found = iter(score_tokens(generator, [pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    raw, normed = [], []
    for question in questions:
        logprobs = [next(found).logprob for _ in question.choices]
        each_byte = [value / len(choice.encode()) for value, choice in zip(logprobs, question.choices)]
        raw.append(logprobs.index(max(logprobs)) == question.answer)
        normed.append(each_byte.index(max(each_byte)) == question.answer)
    (acc, error), (acc_norm, error_norm) = _mean(raw), _mean(normed)
    return Accuracy(len(questions), acc, acc_norm, error, error_norm)


def joined(prompt: str, choice: str) -> str:
    """A choice as it goes on from a prompt."""
    apart = not prompt or prompt[-1:].isspace() or choice[:1].isspace()
    return choice if apart else f" {choice}"


def _mean(right: Sequence[bool]) -> tuple[float, float]:
    """Mean and its standard error (of a sample: n - 1)."""
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else 0.0
