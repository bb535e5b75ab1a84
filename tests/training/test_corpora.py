"""Prepared data in a run: mixtures, held-out losses, identity; the batch of several devices."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import MODEL, read_lines, tiny_config, write_corpus

from llama_jax.config import LlamaConfig
from llama_jax.data.batches import Batches, Source, Steps
from llama_jax.data.packing import pack
from llama_jax.data.prepare import read_tokenizer_files
from llama_jax.data.shards import Settings, Text, prepare_set
from llama_jax.data.token_file import write_tokens
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.text.chat import template_from_directory
from llama_jax.training import setup
from llama_jax.training.config_sections import DataConfig, SourceConfig
from llama_jax.training.data import make_batches, open_data, packing_identity, packing_lines
from llama_jax.training.evaluate import Evaluation, choose_held_out, together
from llama_jax.training.loop import prepare
from llama_jax.training.metrics import read_events
from llama_jax.training.step import global_batch, micro_batches, sequence_numbers


class Quiet:
    """A display that shows nothing."""

    def start(self, heading, steps): ...

    def step(self, record): ...

    def event(self, text): ...

    def finish(self, summary): ...


class Heading(Quiet):
    """A display that keeps what a run begins with."""

    def start(self, heading, steps):
        self.lines = heading


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_directory):
    """Two prepared folders of plain text and one of conversations."""
    root = tmp_path_factory.mktemp("prepared")
    text = Text(read_tokenizer_files(tiny_directory), template_from_directory(tiny_directory))
    talks = [{"prompt": f"what is {i}?", "completion": "it is " + "x" * (i % 7)} for i in range(60)]
    (root / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    inputs = {
        "a": write_corpus(root / "text a", 12),
        "b": write_corpus(root / "text b", 30),
        "chat": root / "talks.jsonl",
    }
    for name, path in inputs.items():
        prepare_set(
            [path], root / name, text, Settings(held_out=0.2, shard_tokens=3000), lambda *call: None
        )
    return root


@pytest.fixture
def config(tmp_path, folders, tiny_directory):
    made = tiny_config(
        tmp_path / "run", tmp_path, run={"steps": 3, "eval_every": 0, "checkpoint_every": 100}
    )
    size = json.loads((tiny_directory / "config.json").read_text())["vocab_size"]
    sources = (
        SourceConfig(str(folders / "a"), 3.0),
        SourceConfig(str(folders / "b"), 1.0, "second"),
    )
    data = DataConfig(sources=sources, length=32, batch_size=4)
    return dataclasses.replace(made, data=data, model=dataclasses.replace(MODEL, vocab_size=size))


@pytest.fixture
def _one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


@pytest.mark.usefixtures("_one_device")
def test_a_run_on_a_mixture_tells_the_loss_of_each_corpus(config):
    data = dataclasses.replace(config.data, batch_ramp=((1, 8),), accumulation=2)
    run = prepare(dataclasses.replace(config, data=data), Quiet())
    summary = run.train()
    lines = read_lines(pathlib.Path(config.run.dir))
    last = lines[-1]
    parts = run.data.held_out
    assert list(parts) == ["a", "second"]
    targets = {name: part.size - part.documents for name, part in parts.items()}
    mean = sum(last[f"held_out/{name}/loss"] * count for name, count in targets.items()) / sum(
        targets.values()
    )
    assert last["held_out/loss"] == pytest.approx(mean, rel=1e-6)
    assert summary.evaluation.tokens == sum(targets.values())
    assert [line["train/tokens"] for line in lines] == [128, 128 + 256, 128 + 512]
    more = dataclasses.replace(config.run, steps=4)
    prepare(
        dataclasses.replace(config, run=more, data=dataclasses.replace(data, skip_steps=((9, 9),))),
        Quiet(),
    )
    for changes in (
        {"sources": data.sources[::-1]},
        {"sources": data.sources[:1]},
        {"packing": "fit"},
        {"batch_ramp": ()},
    ):
        with pytest.raises(InputError, match="holds a run with"):
            prepare(
                dataclasses.replace(config, run=more, data=dataclasses.replace(data, **changes)),
                Quiet(),
            )


def test_conversations_are_fitted_whole(config, folders):
    data = dataclasses.replace(
        config.data, sources=(SourceConfig(str(folders / "chat")),), packing="fit", length=128
    )
    model = dataclasses.replace(config.model, context_length=128)
    opened = open_data(dataclasses.replace(config, data=data, model=model))
    batches = make_batches(opened, data)
    batch = batches.batch(0)
    assert 0 < batch.weights.mean() < (batch.documents > 0).mean()
    assert batch.documents.max() > 1


def chat_run(config, folders, tmp_path, **changes):
    """A run on the conversations, of which the shortest have 27 tokens and the longest 33."""
    run = dataclasses.replace(config.run, dir=str(tmp_path / "chat run"), steps=1)
    data = {"sources": (SourceConfig(str(folders / "chat")),), "length": 40, **changes}
    return dataclasses.replace(config, run=run, data=dataclasses.replace(config.data, **data))


@pytest.mark.usefixtures("_one_device")
def test_conversations_that_are_too_long_are_told(config, folders, tmp_path):
    opened = open_data(chat_run(config, folders, tmp_path))
    lengths = opened.train[0].lengths()
    length = int(np.median(lengths))  # so that about half are longer
    over = int(np.count_nonzero(lengths - 1 > length))
    assert 0 < over < len(lengths)
    made = chat_run(config, folders, tmp_path, length=length)
    display = Heading()
    prepare(made, display).train()
    line = (
        f"{over} of {len(lengths)} examples have more than data.length {length} tokens: "
        f"{over} dropped (data.too_long)"
    )
    assert any(line in text for text in display.lines)
    events = read_events(pathlib.Path(made.run.dir) / "metrics.jsonl")
    assert {
        "step": 0,
        "event": "packing",
        "documents": len(lengths),
        "too_long": over,
        "dropped": over,
        "masked": 0,
    } in events
    longer = dataclasses.replace(made.run, steps=2)
    for changes in ({"too_long": "cut_end"}, {"packing": "cut"}):
        with pytest.raises(InputError, match="holds a run with"):
            prepare(
                dataclasses.replace(
                    made, run=longer, data=dataclasses.replace(made.data, **changes)
                ),
                Quiet(),
            )


def test_conversations_without_an_answer_in_reach_are_refused(config, folders, tmp_path):
    for changes in ({"length": 4}, {"length": 4, "too_long": "cut_end"}):
        made = chat_run(config, folders, tmp_path, **changes)
        with pytest.raises(
            InputError,
            match=r"chat: no example with an answer fits into data\.length 4 \(\d+ of \d+ are longer",
        ):
            make_batches(open_data(made), made.data)
        with pytest.raises(
            InputError, match=r"nothing that is held out can be scored within data\.length 4"
        ):
            choose_held_out(open_data(made).held_out, 4, "auto", 0, 0, made.data.too_long)
    cut = chat_run(config, folders, tmp_path, length=2, batch_size=1, packing="cut")
    with pytest.raises(
        InputError, match=r"data\.packing cut: \d+ of \d+ sequences of 2 tokens hold no answer"
    ):
        make_batches(open_data(cut), cut.data)
    cut = chat_run(config, folders, tmp_path, length=32, packing="cut")
    (line,) = packing_lines(make_batches(open_data(cut), cut.data))
    assert "most begin in the middle of one; data.packing fit" in line


def test_what_checkpoints_say_of_packing(folders):
    def told(name, **changes):
        sources = (SourceConfig(str(folders / name)),) if name else ()
        return packing_identity(DataConfig(sources=sources, **changes))

    assert (
        told(None) == told("a") == told("a", too_long="drop") == {"packing": "cut"}
    )  # as runs of before have it
    assert told("chat", packing="fit", too_long="cut_end") == {"packing": "fit"}
    assert told("chat") == {"packing": "fit", "too_long": "auto"}


def test_tokens_that_the_model_lacks_are_refused(config):
    small = dataclasses.replace(config.model, vocab_size=100)
    with pytest.raises(InputError, match=r"a: token \d+, but model.vocab_size is 100"):
        open_data(dataclasses.replace(config, model=small))


def test_sources_must_fit_together(config, folders, tmp_path, tiny_directory):
    def opened(*sources):
        return open_data(
            dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
        )

    with pytest.raises(InputError, match="two are called 'a'"):
        opened(SourceConfig(str(folders / "a")), SourceConfig(str(folders / "b"), name="a"))
    files = read_tokenizer_files(tiny_directory)
    other = Text({**files, "tokenizer_config.json": b"{}"}, None)
    prepare_set(
        [folders / "text a"], tmp_path / "other", other, Settings(held_out=0), lambda *call: None
    )
    with pytest.raises(InputError, match="is not of the tokenizer of"):
        opened(SourceConfig(str(folders / "a")), SourceConfig(str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"manifest\.json"):
        opened(SourceConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_ramp": ((5, 3),)}, "data.batch_ramp"),
        ({"skip_steps": ((5, 3),)}, "data.skip_steps"),
        ({"sources": (SourceConfig("x"),), "paths": ("y",)}, "data.paths"),
        ({"sources": (SourceConfig("x"),), "tokenizer": "t"}, "data.tokenizer"),
    ],
)
def test_contradictions_in_the_config_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        DataConfig(batch_size=8, accumulation=4, **changes)
    with pytest.raises(InputError, match="weight"):
        SourceConfig("x", weight=0.0)


def test_evaluations_together_weigh_every_token():
    both = together(
        [
            Evaluation(10, 2.0, 0.0, 100),
            Evaluation(30, 4.0, 0.0, 20),
            Evaluation(0, math.nan, math.nan, 0),
        ]
    )
    assert (both.tokens, both.nats_per_token) == (40, 3.5)
    assert both.bits_per_byte == pytest.approx(140 / np.log(2) / 120)


# Several devices


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "x.tokens"
    documents = [list(range(first, first + 17)) for first in range(0, 3000, 17)]
    return write_tokens(
        path, documents, vocab_size=4000, bytes_of_text=1, tokenizer_sha256="", sources_sha256=""
    )


@pytest.mark.parametrize("micro_batch_size", [8, 16])
@pytest.mark.parametrize(
    "spec", [(None, ("data", "fsdp")), (None, "data"), (None, "data", "fsdp"), ()]
)
def test_global_batch_equals_the_whole_batch_put_on_the_devices(
    numbers, spec, micro_batch_size, monkeypatch
):
    batches = Batches((Source(pack(numbers, 8, "cut"), 1.0),), Steps(16), 3)
    sharding = NamedSharding(make_mesh(4, 2, 1), PartitionSpec(*spec))
    wanted = jax.device_put(micro_batches(batches.batch(5), 16 // micro_batch_size), sharding)
    read = []
    chosen = Batches.chosen_sequences
    monkeypatch.setattr(
        Batches,
        "chosen_sequences",
        lambda self, step, sequences: read.append(len(sequences)) or chosen(self, step, sequences),
    )
    got = global_batch(batches, 5, micro_batch_size, sharding)
    for ours, theirs in zip(got, wanted):
        assert ours.sharding == theirs.sharding
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        assert [shard.data.tolist() for shard in ours.addressable_shards] == [
            s.data.tolist() for s in theirs.addressable_shards
        ]
    assert sum(read) == 16  # every sequence once, though four fields and several devices want it


def test_pairs_stay_in_one_micro_batch():
    assert sequence_numbers(8, 4, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert sequence_numbers(8, 4, 1).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert isinstance(MODEL, LlamaConfig)
