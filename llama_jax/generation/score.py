"""How probable a model finds given texts: the log-probability of continuations, for evaluation and
ranking.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.generation.checks import Unchecked, check_plain_texts
from llama_jax.generation.generate import Generator, check_prompts
from llama_jax.generation.programs import bucket_sequences, bucket_size
from llama_jax.generation.session import padded_prompts
from llama_jax.generation.text import require_generator_of, require_tokenizer
from llama_jax.text.tokenizer import Tokenizer, encode_prompt
from llama_jax.weights.load import Pretrained


class Score(NamedTuple):
    """What a model thinks of a continuation.

    Attributes:
      logprob: log-probability of all its tokens together, given the prompt.
      greedy: whether each of its tokens is the most probable one: greedy decoding would have
        written it.
      token_ids: its tokens.
      logprobs: log-probability of each token.
    """

    logprob: float
    greedy: bool
    token_ids: list[int]
    logprobs: list[float]


def score_tokens(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> list[Score]:
    """The score of each continuation of token ids after its prompt; texts of like length are run
    together.

    Raises:
      InputError: for an empty prompt or continuation, texts longer than the context and tokens
        outside the vocabulary.
    """
    if len(prompts) != len(continuations):
        raise InputError(
            f"{len(prompts)} prompts and {len(continuations)} continuations given; one "
            "of each expected"
        )
    if not prompts:
        return []
    empty = next(
        (i for i, (a, b) in enumerate(zip(prompts, continuations)) if not a or not b), None
    )
    if empty is not None:
        raise InputError(
            f"pair {empty + 1}: no tokens in the prompt or the continuation; one at "
            "least expected in each"
        )
    # The last token is not run: nothing follows it.
    texts = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations)]
    check_prompts([text[:-1] for text in texts], generator.programs.model.config)
    check_prompts([text[-1:] for text in texts], generator.programs.model.config)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        measured = _run(generator, [texts[i] for i in batch], [len(prompts[i]) for i in batch])
        scores.update(
            (i, _score(continuations[i], *sequence)) for i, *sequence in zip(batch, *measured)
        )
    return [scores[i] for i in range(len(texts))]


def _run(
    generator: Generator, texts: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and greediness of the tokens from `starts` on, a sequence a text."""
    sequences = bucket_sequences(len(texts), generator.programs.sequence_multiple)
    tokens, _ = padded_prompts(
        [text[:-1] for text in texts], sequences, bucket_size(max(map(len, texts)) - 1)
    )
    following = [text[start:] for text, start in zip(texts, starts)]
    wanted, _ = padded_prompts(following, sequences, bucket_size(max(map(len, following))))
    first = np.asarray([start - 1 for start in starts] + [0] * (sequences - len(texts)), np.int32)
    logprobs, greedy = generator.programs.score(generator.params, tokens, first, wanted)
    return np.asarray(logprobs), np.asarray(greedy)


def _score(continuation: Sequence[int], logprobs: np.ndarray, greedy: np.ndarray) -> Score:
    values, best = logprobs[: len(continuation)], greedy[: len(continuation)]
    if np.isnan(values).any():
        raise InputError(
            "a log-probability of NaN computed; numbers expected: check the weights for "
            "NaN and damage, or take "
            "another dtype than float16"
        )
    return Score(
        float(np.sum(values, dtype=np.float64)),
        bool(best.all()),
        list(continuation),
        values.tolist(),
    )


def encode_pair(
    tokenizer: Tokenizer, prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it, as the text of both together is tokenised.

    Every character of the continuation is scored: a token across the border counts to it, and so
    does white space at the end of the prompt where the tokenizer puts it there. Where that leaves
    no token of the prompt, the token that begins a text stands for it, or else the one that ends
    the text before.

    Raises:
      InputError: for a tokenizer that knows neither of these, where one of them is needed.
    """
    alone = encode_prompt(tokenizer, prompt) if prompt else []
    whole = encode_prompt(tokenizer, prompt + continuation)
    shared = next(
        (i for i, (one, other) in enumerate(zip(alone, whole)) if one != other),
        min(len(alone), len(whole)),
    )
    if shared:
        return whole[:shared], whole[shared:]
    first = tokenizer.begin_id if tokenizer.begin_id is not None else tokenizer.end_id
    if first is None:
        raise InputError(
            "a continuation from the first token on given, and a tokenizer without a "
            "token that begins or ends a "
            "text to stand before it; a longer prompt expected"
        )
    return [first], whole[1:] if whole[:1] == [first] else whole


def score(
    model: Pretrained,
    prompts: Unchecked,
    continuations: Unchecked,
    generator: Generator | None = None,
) -> list[Score]:
    """The score of each continuation after its prompt.

    Args:
      model: from `llama_jax.load`.
      prompts: texts.
      continuations: one a prompt, with the space that may stand between them.
      generator: to use; else one is made.

    Raises:
      InputError: for texts that the model cannot take, and other numbers of prompts and
        continuations.
    """
    tokenizer = require_tokenizer(model)
    check_plain_texts("prompts", prompts)
    check_plain_texts("continuations", continuations)
    if len(prompts) != len(continuations):
        raise InputError(
            f"{len(prompts)} prompts and {len(continuations)} continuations given; one "
            "of each expected"
        )
    pairs = [
        encode_pair(tokenizer, prompt, continuation)
        for prompt, continuation in zip(prompts, continuations)
    ]
    generator = generator or Generator(model.params, model.config)
    require_generator_of(model, generator)
    return score_tokens(generator, [pair[0] for pair in pairs], [pair[1] for pair in pairs])


# --- choices ---
#
# Multiple-choice questions from JSON lines, answered by log-probability: the choice that the model
# finds most probable.


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
      acc_norm: the same with log-probabilities a byte of the choice, which does not favour short
        ones.
      acc_stderr: standard error of `acc`.
      acc_norm_stderr: standard error of `acc_norm`.
    """

    questions: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, one JSON object a line; `question` is another name for `prompt`,
    empty lines are passed over.

    Raises:
      InputError: naming the line that is no question; for a file without any.
    """
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); --choices takes a file of JSON lines"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text at byte {error.start}; convert it first"
        ) from None
    questions = [
        _question(f"{path}, line {number}", line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
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
    texts = len(choices) > 1 and all(
        isinstance(choice, str) and choice.strip() for choice in choices
    )
    if not texts or len(set(choices)) < len(choices):
        raise InputError(
            f"{where}: choices {entry.get('choices')!r:.60} given; a list of two or more "
            "different texts expected"
        )
    index = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise InputError(
            f"{where}: answer {answer!r:.60} given; 0 to {len(choices) - 1} or one of "
            "the choices expected"
        )
    return Question(prompt, choices, index)


def evaluate_choices(
    model: Pretrained, questions: Sequence[Question], generator: Generator | None = None
) -> Accuracy:
    """The accuracy of a model on questions. A space is put between prompt and choice unless one of
    them brings white space.

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
                raise InputError(
                    f"question {number} has more tokens than the model's context of "
                    f"{context}; shorten it"
                )
            pairs.append(pair)
    generator = generator or Generator(model.params, model.config)
    found = iter(score_tokens(generator, [pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    raw, normed = [], []
    for question in questions:
        logprobs = [next(found).logprob for _ in question.choices]
        each_byte = [
            value / len(choice.encode()) for value, choice in zip(logprobs, question.choices)
        ]
        raw.append(logprobs.index(max(logprobs)) == question.answer)
        normed.append(each_byte.index(max(each_byte)) == question.answer)
    (acc, error), (acc_norm, error_norm) = _mean(raw), _mean(normed)
    return Accuracy(len(questions), acc, acc_norm, error, error_norm)


def joined(prompt: str, choice: str) -> str:
    """A choice as the continuation of a prompt."""
    apart = not prompt or prompt[-1:].isspace() or choice[:1].isspace()
    return choice if apart else f" {choice}"


def _mean(right: Sequence[bool]) -> tuple[float, float]:
    """Mean and its standard error (of a sample: n - 1)."""
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else 0.0
