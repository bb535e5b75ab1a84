"""`eval --data`: the held-out part of prepared data, document by document in float64; what does not
fit is refused.
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from support import float64_logprobs

from llama_jax.cli.evaluate import main
from llama_jax.cli.main import run_program
from llama_jax.data.prepare import read_tokenizer_files
from llama_jax.data.shards import Settings, Text, prepare_set
from llama_jax.data.token_set import TokenSet
from llama_jax.errors import InputError
from llama_jax.text.chat import template_from_directory
from llama_jax.training.evaluate import evaluate_prepared
from llama_jax.weights.load import load


@pytest.fixture(scope="module")
def model(tiny_directory):
    return load(tiny_directory)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, tiny_directory):
    """A function that prepares records with the tokenizer of the tiny model."""
    text = Text(read_tokenizer_files(tiny_directory), template_from_directory(tiny_directory))

    def made(name: str, records: list[dict], held_out: float = 0.3, text: Text = text):
        root = tmp_path_factory.mktemp(name)
        (root / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prepare_set(
            [root / "in.jsonl"], root / "out", text, Settings(held_out=held_out), lambda *call: None
        )
        return root / "out"

    return made


@pytest.fixture(scope="module")
def talks(prepare):
    return prepare(
        "talks",
        [{"prompt": f"what is {i}?", "completion": "it is " + "xyz" * (i % 5)} for i in range(30)],
    )


def documents(directory):
    """Ids and learned flags of each held-out document, from the files."""
    held_out = TokenSet.open(directory).held_out
    piece = held_out.read(0, held_out.size)
    borders = [*np.flatnonzero(piece.begins).tolist(), held_out.size]
    return [(piece.ids[a:b], piece.learned[a:b]) for a, b in itertools.pairwise(borders)]


def summed(model, ids, learned, length: int) -> tuple[float, int]:
    """-log p of what is learned of a document whose targets beyond `length` are cut off,
    float64.
    """
    ids, learned = ids[: length + 1], learned[: length + 1]
    losses = -float64_logprobs(model.params, ids[:-1], model.config)[
        np.arange(len(ids) - 1), ids[1:]
    ]
    return float(losses[learned[1:]].sum()), int(learned[1:].sum())


@pytest.mark.parametrize("length", [128, 34])
def test_conversations_are_whole_and_only_answers_count(model, talks, length):
    parts = [summed(model, *document, length) for document in documents(talks)]
    assert len(parts) > 4
    nats, targets = sum(nats for nats, _ in parts), sum(count for _, count in parts)
    found = evaluate_prepared(model, TokenSet.open(talks), length)
    assert found.tokens == targets < sum(len(ids) - 1 for ids, _ in documents(talks))
    assert found.nats_per_token == pytest.approx(nats / targets, rel=1e-5)
    answers = [
        [int(id) for id, counts in zip(ids[: length + 1], learned[: length + 1]) if counts]
        for ids, learned in documents(talks)
    ]
    size = sum(len(model.tokenizer.decode(answer).encode()) for answer in answers)
    assert found.bytes == size < TokenSet.open(talks).held_out.bytes_of_text + (length == 128)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_program_with_text_and_conversations(model, talks, prepare, capsys):
    texts = prepare("texts", [{"text": f"alpha {i} beta {i * i}"} for i in range(12)])
    arguments = [
        "--model",
        model.report.path,
        "--data",
        talks,
        "--data",
        texts,
        "--json",
        "--length",
        128,
    ]
    assert run_program(lambda: main([str(argument) for argument in arguments])) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(talks), str(texts)]
    assert found[str(talks)] == pytest.approx(
        evaluate_prepared(model, TokenSet.open(talks), 128)._asdict()
    )
    held_out = TokenSet.open(texts).held_out
    assert held_out.size <= 129  # one window, so no document is cut
    parts = [summed(model, *document, 128) for document in documents(texts)]
    nats, targets = sum(nats for nats, _ in parts), held_out.size - held_out.documents
    size = sum(
        len(model.tokenizer.decode(ids[1:].tolist()).encode()) for ids, _ in documents(texts)
    )
    expected = {
        "tokens": targets,
        "nats_per_token": nats / targets,
        "bits_per_byte": nats / math.log(2) / size,
        "bytes": size,
    }
    assert found[str(texts)] == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_refused(model, talks, prepare, tmp_path, tiny_directory):
    whole = TokenSet.open(talks)
    for length in (0, model.config.context_length + 1):
        with pytest.raises(InputError, match=f"sequences of {length} tokens asked for; 1 to"):
            evaluate_prepared(model, whole, length)
    with pytest.raises(InputError, match="nothing was held out"):
        evaluate_prepared(
            model, TokenSet.open(prepare("all", [{"text": "x y z"}] * 9, held_out=0.0))
        )
    small = model._replace(config=dataclasses.replace(model.config, vocab_size=20), tokenizer=None)
    with pytest.raises(InputError, match=r"token \d+; the vocabulary of the model goes to 19"):
        evaluate_prepared(small, whole)


def test_a_length_at_which_no_answer_begins_is_refused(model, talks):
    with pytest.raises(
        InputError,
        match="no answer begins within 1 tokens, so nothing can be scored; raise --length",
    ):
        evaluate_prepared(model, TokenSet.open(talks), 1)


def test_of_pairs_the_chosen_answers_are_scored(model, prepare):
    pairs = prepare(
        "pairs",
        [
            {"prompt": f"what is {i}?", "chosen": "a" * (1 + i % 3), "rejected": "wrong " * 4}
            for i in range(20)
        ],
    )
    found = evaluate_prepared(model, TokenSet.open(pairs), 128)
    parts = [summed(model, *document, 128) for document in [*documents(pairs)][::2]]
    assert found.tokens == sum(count for _, count in parts)
    assert found.nats_per_token == pytest.approx(
        sum(nats for nats, _ in parts) / found.tokens, rel=1e-5
    )
