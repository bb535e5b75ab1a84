"""The loop from inside: what it evaluates, what it trains on, what it learns, what it survives."""

import collections
import dataclasses
import functools
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from support import random_parameters
from tiny_runs import (
    MODEL,
    WORDS,
    read_lines,
    read_state,
    snapshot,
    state_bytes,
    tiny_config,
    write_corpus,
)

import llama_jax
from llama_jax.data.records import is_held_out
from llama_jax.data.token_file import write_tokens
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama, logits
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training import evaluate as evaluate_module
from llama_jax.training import loop, setup, step
from llama_jax.training import run_log as step_log
from llama_jax.training.checkpointing import (
    keep_config,
    learning_rate_jump,
    only_run,
    summary_lines,
)
from llama_jax.training.evaluate import (
    ByteCounts,
    batch_evaluator,
    choose_held_out,
    evaluate,
    text_evaluation,
)
from llama_jax.training.loop import prepare
from llama_jax.training.setup import fingerprint
from llama_jax.training.step import StepMetrics, global_batch
from llama_jax.weights.checkpoint import SaveError


class Recorder:
    """A display that remembers."""

    def __init__(self):
        self.heading, self.records, self.events, self.summary = [], [], [], {}

    def start(self, heading, steps):
        self.heading = list(heading)

    def step(self, record):
        self.records.append(record)

    def event(self, text):
        self.events.append(text)

    def finish(self, summary):
        self.summary = dict(summary)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def config(tmp_path, corpus):
    return tiny_config(tmp_path / "run", corpus)


def changed(config, **sections):
    values = {
        name: dataclasses.replace(getattr(config, name), **changes)
        for name, changes in sections.items()
    }
    return dataclasses.replace(config, **values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """A function that gives a finished run of its kind: config, display, summary. Only to be read;
    each is done once.
    """

    @functools.cache
    def finished(**values):
        config = tiny_config(tmp_path_factory.mktemp("finished") / "run", corpus, run=values)
        display = Recorder()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1])
            )
            return config, display, prepare(config, display).train()

    return finished


@pytest.fixture(scope="module")
def finished(runs):
    """A run of 12 steps."""
    return runs()


@pytest.fixture
def copied(finished, tmp_path):
    """The config of a copy of the finished run."""
    config, _, _ = finished
    shutil.copytree(config.run.dir, tmp_path / "copy")
    return changed(config, run={"dir": str(tmp_path / "copy")})


def forget(config, step: int) -> None:
    """Removes a checkpoint of a run that is over, as if it had ended before it was written."""
    shutil.rmtree(pathlib.Path(config.run.dir, "checkpoints", str(step)))


# That of 12 steps, whatever the number of steps: the program is the same, too.
SCHEDULE = {"schedule_steps": 12}


# Evaluation


whole_logits = jax.jit(logits, static_argnums=2)


def nats_by_hand(params, documents: list[list[int]], length: int) -> tuple[float, int]:
    """Summed loss in float64, window by window, and the number of targets."""
    ids = np.concatenate(documents)
    number = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, length):
        window, of = ids[first : first + length + 1], number[first : first + length + 1]
        padding = (
            0,
            length + 1 - len(window),
        )  # one shape for all; no token sees what is behind it
        inputs, inside = (
            np.pad(values, padding)[None, :-1].astype(np.int32)
            for values in (window, of - of[0] + 1)
        )
        scores = np.asarray(whole_logits(params, inputs, MODEL, inside), np.float64)[
            0, : len(window) - 1
        ]
        log_probabilities = scores - np.log(
            np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)
        )
        log_probabilities -= scores.max(-1, keepdims=True)
        counted = of[1:] == of[:-1]
        total -= log_probabilities[np.arange(len(window) - 1), window[1:]][counted].sum()
        count += int(counted.sum())
    return total, count


SIZES = ByteCounts(*np.random.default_rng(1).integers(0, 9, (2, 320), np.int32))


def bytes_by_hand(documents: list[list[int]]) -> int:
    """Bytes of all tokens but the first of each document; the second opens a text where the first
    has none.
    """
    total = 0
    for document in documents:
        for place, token in enumerate(document[1:]):
            opens = place == 0 and SIZES.inside[document[0]] == 0
            total += int(SIZES.opening[token] if opens else SIZES.inside[token])
    return total


@pytest.mark.parametrize("sequences", [1, 4])
def test_held_out_loss_equals_float64_by_hand(tmp_path, sequences):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 320, size).tolist() for size in (5, 90, 1, 33, 64, 2, 47)]
    for document in documents[::2]:
        document[0] = int(np.flatnonzero(SIZES.inside == 0)[0])
    file = write_tokens(
        tmp_path / "x.tokens",
        documents,
        vocab_size=320,
        bytes_of_text=777,
        tokenizer_sha256="",
        sources_sha256="",
    )
    params, model, mesh = (
        random_parameters(MODEL),
        Llama(MODEL),
        make_mesh(devices=jax.devices()[:1]),
    )
    (held_out,) = choose_held_out({"x": file}, 32, "cut", 0, 0).values()
    signs = []
    with jax.set_mesh(mesh):
        run = batch_evaluator(model, 50, SIZES)
        sums = evaluate(
            run, params, held_out, sequences, mesh, model.options.rules, lambda: signs.append(1)
        )
    found = text_evaluation(sums)
    nats, count = nats_by_hand(params, documents, 32)
    assert found.tokens == count == sum(map(len, documents)) - len(documents)
    assert found.nats_per_token == pytest.approx(nats / count, rel=2e-6)
    assert found.bytes == bytes_by_hand(documents)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=2e-6)
    assert len(signs) >= -(-len(held_out.numbers) // sequences)  # one a batch, for the watchdog


def test_a_run_reports_the_held_out_loss_of_its_last_state(finished, corpus):
    config, display, summary = finished
    directory = pathlib.Path(config.run.dir)
    texts = {path.name: path.read_text() for path in corpus.iterdir()}
    held_out = [texts[name] for name in sorted(texts) if is_held_out(name, 0.2)]
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    documents = [[1, *tokenizer.encode(text), 2] for text in held_out]
    nats, count = nats_by_hand(read_state(config, 12).params, documents, 32)
    evaluation = summary.evaluation
    assert (evaluation.tokens, evaluation.nats_per_token) == (
        count,
        pytest.approx(nats / count, rel=2e-6),
    )
    assert evaluation.bits_per_byte == pytest.approx(
        nats / math.log(2) / len("".join(held_out)), rel=2e-6
    )
    last = read_lines(directory)[-1]
    assert [last[f"held_out/{name}"] for name in ("loss", "bits_per_byte", "tokens")] == [
        *evaluation[1:3],
        evaluation[0],
    ]
    assert (summary.step, summary.saved) == (12, True)

    # The baseline: held-out tokens guessed by how often the training text has them, each count
    #   raised by one.
    training = [[*tokenizer.encode(texts[name]), 2] for name in texts if not is_held_out(name, 0.2)]
    counts = collections.Counter(id for ids in training for id in ids)
    targets = [id for ids in documents for id in ids[1:]]
    unigram = -sum(math.log((counts[id] + 1) / (counts.total() + 320)) for id in targets) / len(
        targets
    )
    assert summary.unigram == pytest.approx(unigram)
    assert any(
        f"unigram entropy of the held-out text {unigram:.3f}" in line for line in display.heading
    )


@pytest.mark.parametrize(("most", "expected"), [(0, 101), (320, 10), (1, 1), (10**9, 101)])
def test_an_evaluation_reads_the_same_few_windows(make_held_out, most, expected):
    """Of 101 windows, the last of which is not full; windows by brute force."""
    tokens = make_held_out(3205)
    (chosen,), (again,), (other,) = (
        choose_held_out({"x": tokens}, 32, "cut", most, seed).values() for seed in (7, 7, 8)
    )
    numbers = [*map(int, chosen.numbers)]
    assert numbers == sorted(set(numbers)) == [*map(int, again.numbers)]
    assert len(numbers) == expected
    assert set(numbers) <= set(range(101))
    assert expected != 10 or numbers != [*map(int, other.numbers)]
    first = chosen.packing.sequences(np.array(numbers[:1]))
    assert (
        first.targets[0].tolist()
        == tokens.tokens[numbers[0] * 32 + 1 : numbers[0] * 32 + 33].tolist()
    )


def test_data_sets_share_the_tokens_of_an_evaluation_by_their_size(make_held_out):
    """And nothing is made that grows with what is held out: a range where all is read, else what is
    asked for.
    """
    chosen = choose_held_out(
        {"a": make_held_out(3201), "b": make_held_out(33), "c": make_held_out(9601)},
        32,
        "cut",
        1280,
        0,
    )
    assert [len(part.numbers) for part in chosen.values()] == [10, 1, 30]
    whole = choose_held_out({"a": make_held_out(3201)}, 32, "cut", 0, 0)
    assert whole["a"].numbers == range(100)


@pytest.fixture
def make_held_out(tmp_path):
    """A function that gives one document of so many tokens."""

    def made(size: int):
        ids = np.random.default_rng(size).integers(0, 320, size).tolist()
        path = tmp_path / f"{size}.tokens"
        return write_tokens(
            path, [ids], vocab_size=320, bytes_of_text=1, tokenizer_sha256="", sources_sha256=""
        )

    return made


def test_each_process_evaluates_the_sequences_of_its_own_devices(make_held_out, monkeypatch):
    """Eight devices, two of which share their sequences: every sequence is read once here, in
    pieces of what a device holds.
    """
    mesh, read = make_mesh(4, 1, 2), []
    (held_out,) = choose_held_out({"x": make_held_out(3205)}, 32, "cut", 0, 0).values()
    sequences = held_out.packing.sequences
    monkeypatch.setattr(
        held_out.packing,
        "sequences",
        lambda numbers: read.append(len(numbers)) or sequences(numbers),
    )
    seen = []
    with jax.set_mesh(mesh):
        evaluate(lambda params, batch: seen.append(batch) or {}, {}, held_out, 8, mesh, TRAINING)
    assert read == [2] * 4 * len(seen)
    assert len(seen) == 13
    targets = np.concatenate(
        [np.asarray(batch.targets)[np.asarray(batch.weights) > 0] for batch in seen]
    )
    np.testing.assert_array_equal(targets, held_out.packing.tokens.tokens[1:])


def test_a_checkpoint_comes_after_the_metrics_of_its_step_and_before_its_evaluation(
    config, monkeypatch
):
    seen = []
    save, evaluated = loop.Checkpoints.save, loop.evaluate

    def noted_save(self, step, *more):
        seen.append((step, "save", read_lines(pathlib.Path(config.run.dir))[-1]["step"]))
        return save(self, step, *more)

    def noted_evaluation(*given):
        lines = read_lines(pathlib.Path(config.run.dir))
        seen.append((lines[-1]["step"], "eval", "held_out/loss" in lines[-1]))
        return evaluated(*given)

    monkeypatch.setattr(loop.Checkpoints, "save", noted_save)
    monkeypatch.setattr(loop, "evaluate", noted_evaluation)
    prepare(changed(config, run={"eval_every": 4}), Recorder()).train()
    assert seen == [
        (step, *what) for step in (4, 8, 12) for what in (("save", step), ("eval", False))
    ]
    assert ["held_out/loss" in line for line in read_lines(pathlib.Path(config.run.dir))] == [
        False,
        False,
        False,
        True,
    ] * 3


def test_a_run_without_held_out_text(config):
    display = Recorder()
    quiet = changed(
        config, data={"held_out_fraction": 0}, run={"steps": 2, "eval_every": 1}, optimizer=SCHEDULE
    )
    summary = prepare(quiet, display).train()
    assert (summary.step, summary.saved, summary.evaluation, summary.unigram) == (
        2,
        True,
        None,
        None,
    )
    assert "held-out  no text is held out: no evaluation" in display.heading
    assert not any("unigram" in line for line in display.heading)
    assert [record.held_out_loss for record in display.records] == [None, None]
    assert "held-out" not in summary_lines(summary, 1.0)


def test_no_held_out_document_is_trained_on(config, monkeypatch, corpus):
    batches = []
    monkeypatch.setattr(
        loop, "global_batch", lambda *given: batches.append(global_batch(*given)) or batches[-1]
    )
    run = prepare(
        changed(
            config, run={"steps": 60, "eval_every": 0, "checkpoint_every": 60}, optimizer=SCHEDULE
        ),
        Recorder(),
    )
    run.train()
    assert len(batches) == 60 > run.batches.sources[0].packing.count / 4  # more than an epoch
    tokenizer = load_tokenizer(run.data.tokenizer_path)
    text = "\n".join(
        tokenizer.decode(sequence.tolist())
        for batch in batches
        for sequence in np.asarray(batch.tokens[0])
    )
    seen = {int(number) for number in re.findall(r"<(\d+)>", text)}
    assert seen == {number for number in range(20) if not is_held_out(f"{number}.txt", 0.2)}
    assert len(seen) < 20


def test_evaluation_is_due_whatever_the_rhythm_of_the_log(runs):
    config, _, _ = runs(log_every=4, eval_every=5)
    lines = read_lines(pathlib.Path(config.run.dir))
    assert [(line["step"], "held_out/loss" in line) for line in lines] == [
        (4, False),
        (5, True),
        (8, False),
        (10, True),
        (12, True),
    ]


def test_a_record_means_the_losses_since_the_one_before(finished, runs):
    losses = [record.loss for record in finished[1].records]
    expected = [
        np.mean(losses[first:last]) for first, last in ((0, 4), (4, 5), (5, 8), (8, 10), (10, 12))
    ]
    _, display, _ = runs(log_every=4, eval_every=5)
    np.testing.assert_allclose([record.loss for record in display.records], expected, rtol=1e-6)


def test_evaluation_and_compilation_are_no_part_of_the_step_time(config, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: now[0])
    log = step_log.StepLog(config, lambda step: step * config.data.batch_size * config.data.length)
    figures = StepMetrics(*map(np.float32, (2, 1, 1e-3, 128)), np.bool_(False), {})

    def update(seconds):
        now[0] += seconds
        log.add(figures)

    update(30)  # with the compilation
    assert log.record(1).step_seconds == 30
    now[0] += 1000  # evaluation
    log.start_clock()
    update(2)
    update(4)
    record = log.record(3)
    assert (record.step_seconds, record.tokens_per_second, record.tokens) == (
        3,
        4 * 32 / 3,
        3 * 4 * 32,
    )


# One program


def test_the_step_is_traced_once_whatever_else_happens(config, monkeypatch):
    traces = collections.Counter()

    def counted(name, function):
        def call(*args):
            traces[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(step, "train_step", counted("step", step.train_step))
    monkeypatch.setattr(
        evaluate_module, "batch_loss", counted("evaluation", evaluate_module.batch_loss)
    )
    run = changed(config, run={"eval_every": 3, "checkpoint_every": 2})
    prepare(run, Recorder()).train(should_stop=lambda done: done == 7)
    assert traces == {"step": 1, "evaluation": 1}
    prepare(run, Recorder()).train()  # from a restored state
    assert traces == {"step": 2, "evaluation": 2}


def test_a_wish_to_stop_is_heard_within_a_step(config, monkeypatch):
    """The host hands out no more than one update beside the one that the device is at, though it
    could.
    """
    whole, losses, waiting = loop.sharded_step, [], []

    class Late:
        """A loss of a device that is done with it only when it is waited for."""

        def __init__(self, loss):
            self.loss, self.ready = loss, False

        def is_ready(self):
            return self.ready

        def block_until_ready(self):
            self.ready = True
            return self

        def __array__(self, *given, **named):
            self.ready = True
            return np.asarray(self.loss)

    def late(*args):
        program = whole(*args)

        def update(*args):
            state, figures = program(*args)
            losses.append(Late(figures.loss))
            return state, figures._replace(loss=losses[-1])

        return update

    def ask(step):
        waiting.append(sum(not loss.is_ready() for loss in losses))
        return step == 6

    monkeypatch.setattr(loop, "sharded_step", late)
    prepare(
        changed(config, run={"log_every": 100, "eval_every": 0, "checkpoint_every": 100}),
        Recorder(),
    ).train(ask)
    assert len(waiting) == 6
    assert max(waiting) == 1


# Checkpoints


def fail_to_save(monkeypatch, failing: dict[int, str]):
    """Makes saves of some steps fail, at their "start" or in the "background"."""
    save, poll = loop.Checkpoints.save, loop.Checkpoints.poll
    broken = []

    def failing_save(self, number, state, metadata):
        if number not in failing:
            return save(self, number, state, metadata)
        if failing[number] == "start":
            raise SaveError(f"checkpoint {number} was not written: full")
        return broken.append(number)

    def failing_poll(self):
        if broken:
            raise SaveError(f"checkpoint {broken.pop()} was not written: full")
        poll(self)

    monkeypatch.setattr(loop.Checkpoints, "save", failing_save)
    monkeypatch.setattr(loop.Checkpoints, "poll", failing_poll)


@pytest.mark.parametrize(
    "failing",
    [
        {4: "start", 8: "background"},
        pytest.param({4: "background", 8: "start"}, marks=pytest.mark.slow),
        pytest.param({4: "start", 8: "start"}, marks=pytest.mark.slow),
        pytest.param({4: "background", 8: "background"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_save_that_fails_is_told_and_the_next_one_counts(config, monkeypatch, failing):
    fail_to_save(monkeypatch, failing)
    display = Recorder()
    summary = prepare(config, display).train()
    warnings = [line for line in display.events if line.startswith("warning")]
    assert warnings == [f"warning: checkpoint {number} was not written: full" for number in (4, 8)]
    assert (summary.step, summary.saved) == (12, True)
    assert len(display.records) == 12


@pytest.mark.parametrize("when", [pytest.param("start", marks=pytest.mark.slow), "background"])
def test_a_last_save_that_fails_is_no_success(config, monkeypatch, when):
    fail_to_save(monkeypatch, {12: when})
    assert prepare(config, Recorder()).train().saved is False


def test_a_damaged_checkpoint_costs_steps_but_no_bit(finished, copied):
    forget(copied, 12)
    files = [
        path
        for path in pathlib.Path(copied.run.dir, "checkpoints", "8", "state").rglob("*")
        if path.is_file()
    ]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    display = Recorder()
    prepare(copied, display).train()
    assert any(line.startswith("warning: checkpoint") and "/8" in line for line in display.events)
    assert display.records[0].step == 5
    assert [line["step"] for line in read_lines(pathlib.Path(copied.run.dir))] == list(range(1, 13))
    assert state_bytes(read_state(copied, 12)) == state_bytes(read_state(finished[0], 12))


def test_fingerprint_tells_single_bits(finished):
    config, _, _ = finished
    state = jax.device_get(read_state(config, 12))
    other = jax.device_get(read_state(config, 8))
    assert fingerprint(state) == fingerprint(jax.tree.map(np.copy, state)) != fingerprint(other)
    flipped = jax.tree.map(np.copy, state)
    flipped.params["embedding"].view(np.uint8)[3, 5] ^= 1
    assert fingerprint(flipped) != fingerprint(state)


def test_changed_settings_are_told_and_kept_beside_the_run(copied):
    """12 steps of cosine trained on to 20: the rate in closed form before and after, and the two
    ways out.
    """
    directory, display, written = pathlib.Path(copied.run.dir), Recorder(), []
    (directory / "config.yaml").write_text("steps: 12")
    longer = changed(
        copied, run={"steps": 20, "dir": copied.run.dir}, optimizer={"weight_decay": 0.05}
    )
    prepare(longer, display, before=copied).train(lambda step: step == 13, write=written.append)
    old, new = 1e-3, 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * 11 / 18))
    told = [
        line.removeprefix("changed   ") for line in display.events if line.startswith("changed   ")
    ]
    assert told == [
        "run.steps: 12 -> 20",
        "optimizer.weight_decay: 0.1 -> 0.05",
        f"the learning rate jumps at step 13: {old:.4g} by the settings so far, "
        f"{new:.4g} now, {new / old:.3g} times as much; "
        "--optimizer.schedule_steps 12 keeps the schedule so far, --optimizer.decay_from "
        "12 --optimizer.learning_rate 0.001 "
        "decays anew from here",
    ]
    assert display.records[0].learning_rate == pytest.approx(new, rel=1e-5)
    (event,) = (line for line in read_lines(directory) if line.get("event") == "changed")
    assert event == {
        "step": 12,
        "event": "changed",
        "run.steps": "12 -> 20",
        "optimizer.weight_decay": "0.1 -> 0.05",
        "learning_rate": told[-1],
    }
    assert {path.name: path.read_text() for path in (directory / "config_history").iterdir()} == {
        "until_step_12.yaml": "steps: 12"
    }
    assert [config.run.steps for config in written] == [20]
    for optimizer in ({"schedule_steps": 12}, {"decay_from": 12, "learning_rate": 1e-3}):
        assert learning_rate_jump(copied, changed(longer, optimizer=optimizer), 12) is None


def test_what_a_resume_at_a_step_changed_is_kept_each_time(tmp_path):
    config = tmp_path / "config.yaml"
    for content in ("one", "one", "two"):
        config.write_text(content)
        keep_config(tmp_path, 5)
    kept = {path.name: path.read_text() for path in (tmp_path / "config_history").iterdir()}
    assert kept == {"until_step_5.yaml": "one", "until_step_5_2.yaml": "two"}


def test_making_a_run_touches_nothing_of_the_one_before(copied):
    before = snapshot(pathlib.Path(copied.run.dir))
    prepare(changed(copied, run={"overwrite": True}), Recorder())
    assert snapshot(pathlib.Path(copied.run.dir)) == before


def test_overwrite_starts_anew(copied):
    display = Recorder()
    prepare(
        changed(copied, run={"overwrite": True, "steps": 3}, optimizer=SCHEDULE), display
    ).train()
    assert [record.step for record in display.records] == [1, 2, 3]
    assert [line["step"] for line in read_lines(pathlib.Path(copied.run.dir))] == [1, 2, 3]


def test_too_little_text_for_a_batch_is_explained(config):
    with pytest.raises(
        InputError, match=r"tokens are \d+ sequences, but its part of a batch needs 10000"
    ):
        prepare(changed(config, data={"batch_size": 10_000}), Recorder())


# Text


def test_a_folder_with_a_tokenizer_is_taken_with_the_files_beside_it(config, tiny_directory):
    data = {"tokenizer": str(tiny_directory)}
    vocabulary = load_tokenizer(tiny_directory).vocab_size
    prepare(
        changed(config, data=data, model={"vocab_size": vocabulary}, run={"steps": 2}), Recorder()
    ).train()
    ours, theirs = llama_jax.load(config.run.dir).tokenizer, load_tokenizer(tiny_directory)
    assert (ours.begin_id, ours.end_id, ours.vocab_size) == (
        theirs.begin_id,
        theirs.end_id,
        theirs.vocab_size,
    )
    assert ours.encode("the cat sat") == theirs.encode("the cat sat")


def test_of_a_single_file_the_end_is_held_out(config, tmp_path):
    path = tmp_path / "single.txt"
    path.write_text("".join(f"{' '.join(WORDS[number % 7 :])} {number}\n" for number in range(500)))
    run = prepare(
        changed(config, data={"paths": (str(path),)}, run={"steps": 2}, optimizer=SCHEDULE),
        Recorder(),
    )
    tokenizer = load_tokenizer(run.data.tokenizer_path)
    train, held_out = (
        tokenizer.decode(file.tokens.tolist())
        for file in (run.data.train[0], run.data.held_out["text"])
    )
    assert train + held_out == path.read_text()
    assert 0.2 <= len(held_out) / len(train + held_out) < 0.22
    assert run.train().evaluation.tokens == run.data.held_out["text"].size - 1


def test_repeated_lines_are_learned_and_continued(config, tmp_path):
    line = "the quick brown fox jumps over the lazy dog, then it rests a while.\n"
    folder = tmp_path / "lines"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number}.txt").write_text(line * 3)
    data = {"paths": (str(folder),), "vocab_size": 290, "batch_size": 8}
    run = {"steps": 150, "log_every": 50, "eval_every": 0, "checkpoint_every": 150}
    display = Recorder()
    summary = prepare(
        changed(config, data=data, run=run, optimizer={"warmup_steps": 10}), display
    ).train()
    losses = [round(record.loss, 3) for record in display.records]
    print(
        f"held-out {summary.evaluation.nats_per_token:.3f}, unigram "
        f"{summary.unigram:.3f} nats/token; training {losses}"
    )
    assert summary.evaluation.nats_per_token < 0.3 * summary.unigram
    (completion,) = llama_jax.generate(
        llama_jax.load(config.run.dir), [line[:10]], max_new_tokens=20
    )
    assert len(completion.text) >= 20
    assert line[10:].startswith(completion.text)


def test_one_run_a_directory(tmp_path):
    """While one process holds a directory another is refused; nothing is left behind that would
    refuse a third.
    """
    with (
        only_run(tmp_path),
        pytest.raises(InputError, match="another process trains in"),
        only_run(tmp_path),
    ):
        pytest.fail("held twice")
    with only_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
