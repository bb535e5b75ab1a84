"""From documents to token files: the split, the stored result, damage and interruption."""

import dataclasses
import random
import shutil

import numpy as np
import pytest

from llama_jax.data import prepare as module
from llama_jax.data.batches import sequential_windows
from llama_jax.data.held_out import split_documents
from llama_jax.data.packing import pack
from llama_jax.data.prepare import copy_tokenizer, encode_documents, hash_tokenizer, prepare
from llama_jax.data.records import Document, Record, is_held_out
from llama_jax.data.workers import encode_record
from llama_jax.errors import CorruptError, InputError
from llama_jax.text.tokenizer import encode_prompt, load_tokenizer

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


def write_text(seed):
    source = random.Random(seed)
    return (
        "\n".join(" ".join(source.choices(WORDS, k=8)) for _ in range(30))
        + f"\nend of {seed} \u00e9\u4e2d\n"
    )


def make_documents(count):
    return [Document(f"text {seed}.txt", write_text(seed)) for seed in range(count)]


def run(directory, documents, held_out_fraction=0.2, **changes):
    split = split_documents(lambda: iter(documents), held_out_fraction)
    return prepare(directory, split, **{"vocab_size": 320, "seed": 0, **changes})


def read_texts(file, tokenizer):
    """The documents of a token file, decoded."""
    return [
        tokenizer.decode(ids.tolist()) for ids in np.split(file.tokens, file.starts[1:].astype(int))
    ]


@pytest.fixture
def documents():
    return make_documents(30)


@pytest.fixture
def forbid_building(monkeypatch):
    """Makes any further build fail."""

    def fail(*args, **kwargs):
        raise AssertionError("built again")

    return lambda: monkeypatch.setattr(module, "_build", fail)


def test_files_hold_the_documents_of_their_side(tmp_path, documents):
    data = run(tmp_path, documents)
    tokenizer = load_tokenizer(data.tokenizer_path)
    for file, side in ((data.train, False), (data.held_out, True)):
        texts = [document.text for document in documents if is_held_out(document.name, 0.2) == side]
        assert read_texts(file, tokenizer) == texts
        assert file.bytes_of_text == sum(len(text.encode()) for text in texts)
        assert file.header.vocab_size == 320
        assert file.header.tokenizer_sha256 == data.train.header.tokenizer_sha256
        assert set(file.tokens[file.starts]) == {tokenizer.begin_id}
        assert set(np.append(file.tokens[file.starts[1:] - np.uint64(1)], file.tokens[-1])) == {
            tokenizer.end_id
        }
    assert data.tokenizer_path.name == "tokenizer.model"


def test_held_out_documents_never_appear_in_training_windows(tmp_path, documents):
    data = run(tmp_path, documents)
    tokenizer = load_tokenizer(data.tokenizer_path)
    packing = pack(data.train, 64, "cut")
    rows = packing.sequences(np.arange(packing.count)).tokens
    seen = "".join(tokenizer.decode(row.tolist()) for row in rows)
    for document in documents:
        lines = [line for line in document.text.splitlines() if line in seen]
        assert bool(lines) != is_held_out(document.name, 0.2), document.name


def test_held_out_documents_stay_held_out_when_others_come(tmp_path, documents):
    before, after = run(tmp_path, documents), run(tmp_path, make_documents(60))
    old = set(read_texts(before.held_out, load_tokenizer(before.tokenizer_path)))
    new = set(read_texts(after.held_out, load_tokenizer(after.tokenizer_path)))
    assert old < new
    assert not new & set(read_texts(after.train, load_tokenizer(after.tokenizer_path)))


def test_second_call_opens_what_the_first_stored(tmp_path, documents, forbid_building):
    first = run(tmp_path, documents)
    forbid_building()
    second = run(tmp_path, documents)
    assert second.train.header == first.train.header
    assert [path.name for path in tmp_path.iterdir()] == [first.train.path.parent.name]


@pytest.mark.parametrize("changes", [{"vocab_size": 321}, {"held_out_fraction": 0.3}, {"seed": 1}])
def test_another_recipe_is_stored_beside_it(tmp_path, documents, changes):
    first, second = run(tmp_path, documents), run(tmp_path, documents, **changes)
    assert first.train.path != second.train.path
    assert len(list(tmp_path.iterdir())) == 2


def training_name(number):
    """A name on the training side."""
    return next(
        name
        for name in (f"{number} {letter}" for letter in "abcdefgh")
        if not is_held_out(name, 0.2)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a._replace(text="other text\n"), b),
        lambda a, b: (a._replace(name=training_name("renamed")), b),
        lambda a, b: (a._replace(text=a.text + b.text[:5]), b._replace(text=b.text[5:])),
        lambda a, b: (b, a),
    ],
)
def test_another_text_name_border_or_order_is_stored_beside_it(tmp_path, documents, change):
    pair = [Document(training_name(number), write_text(number)) for number in (100, 200)]
    run(tmp_path, [*documents, *pair])
    run(tmp_path, [*documents, *change(*pair)])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stage", ["vocabulary", "encode"])
def test_interruption_leaves_nothing_that_looks_whole(tmp_path, documents, stage):
    def interrupt(name, done, total):
        if name == stage and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, documents, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    run(tmp_path, documents).train.verify()


def test_killed_run_leaves_no_entry(tmp_path, documents, monkeypatch):
    # A kill -9 runs no clean-up: what is left must not be taken for a result.
    monkeypatch.setattr(module.tempfile.TemporaryDirectory, "cleanup", lambda self: None)
    monkeypatch.setattr(module.os, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, documents)
    monkeypatch.undo()
    assert all(path.name.startswith(".preparing-") for path in tmp_path.iterdir())
    run(tmp_path, documents).train.verify()


def test_two_processes_preparing_the_same_agree(tmp_path, documents, monkeypatch):
    rename = module.os.rename

    def lose_the_race(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", lose_the_race)
    run(tmp_path, documents).train.verify()


@pytest.mark.parametrize("name", ["train.tokens", "held_out.tokens", "tokenizer.model"])
def test_damaged_result_is_noticed(tmp_path, documents, name):
    path = run(tmp_path, documents).train.path.parent / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=path.parent.name):
        run(tmp_path, documents)
    path.unlink()
    with pytest.raises(CorruptError, match=f"removing .*{path.parent.name}"):
        run(tmp_path, documents)


def test_given_tokenizer_is_used_and_named(tmp_path, documents):
    trained = run(tmp_path / "a", documents).tokenizer_path
    data = run(tmp_path / "b", documents, vocab_size=7, tokenizer_path=trained)
    assert data.tokenizer_path == trained
    assert data.train.header.vocab_size == 320
    assert data.train.tokens.tolist() == run(tmp_path / "a", documents).train.tokens.tolist()
    with pytest.raises(InputError, match=r"missing\.model"):
        run(tmp_path / "c", documents, tokenizer_path=tmp_path / "missing.model")


def test_text_that_changes_meanwhile_is_noticed(tmp_path, documents):
    changed = [documents[0]._replace(text="changed\n"), *documents[1:]]

    def grow(stage, done, total):
        if stage == "vocabulary":
            current[0] = changed

    current = [documents]
    split = split_documents(lambda: iter(current[0]), 0.2)
    with pytest.raises(InputError, match="changed while"):
        prepare(tmp_path, split, vocab_size=320, seed=0, on_progress=grow)
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_stages_in_order_and_ends_complete(tmp_path, documents):
    calls = []
    run(tmp_path, documents, on_progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["vocabulary", "encode"]
    for stage in ("vocabulary", "encode"):
        done = [done for name, done, _ in calls if name == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in calls if name == stage)
    assert calls[-1][1] == sum(len(document.text.encode()) for document in documents)


@pytest.mark.parametrize(("begin", "end"), [(1, 2), (None, 2), (1, None), (None, None)])
def test_begin_and_end_only_where_the_tokenizer_has_them(tmp_path, documents, begin, end):
    trained = load_tokenizer(run(tmp_path, documents).tokenizer_path)
    tokenizer = dataclasses.replace(trained, begin_id=begin, end_id=end)
    encoded = list(encode_documents([Document("a", "alpha beta"), Document("b", "")], tokenizer))
    around = [[token] if token else [] for token in (begin, end)]
    assert encoded == [around[0] + trained.encode("alpha beta") + around[1], around[0] + around[1]]


@pytest.mark.parametrize("adds_begin", [False, True])
def test_documents_begin_as_prompts_do(tmp_path, documents, adds_begin):
    """Also where a tokenizer has a begin token that prompts of its model do not begin with
    (`add_bos_token: false`).
    """
    trained = load_tokenizer(run(tmp_path, documents).tokenizer_path)
    tokenizer = dataclasses.replace(trained, adds_begin=adds_begin)
    assert tokenizer.begin_id is not None
    (ids,) = encode_documents([Document("a", "alpha beta")], tokenizer)
    (stored,) = encode_record(Record("a", "a", "text", "alpha beta", 10), tokenizer, None)
    assert ids == stored.ids.tolist() == [*encode_prompt(tokenizer, "alpha beta"), tokenizer.end_id]
    assert ids.count(tokenizer.begin_id) == adds_begin


def test_tokenizer_hash_follows_what_defines_it(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content)
        return hash_tokenizer(tmp_path)

    hashes = [
        write("tokenizer.model", "a"),
        write("tokenizer.model", "b"),
        write("tokenizer.json", "c"),
        write("tokenizer_config.json", "d"),
        write("special_tokens_map.json", "e"),
    ]
    assert len(set(hashes)) == 5
    assert write("unrelated.json", "f") == hashes[-1] == hash_tokenizer(tmp_path / "tokenizer.json")


def test_evaluation_counts_all_held_out_targets(tmp_path, documents):
    data = run(tmp_path, documents)
    weight = sum(batch.weights.sum() for batch in sequential_windows(data.held_out, 32, 4))
    assert weight == data.held_out.header.tokens - data.held_out.header.documents


def test_copied_tokenizer_is_the_same_one(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run").mkdir()
    stale = tmp_path / "run" / "special_tokens_map.json"
    stale.write_text("of another tokenizer")
    copy_tokenizer(tmp_path, tmp_path / "run" / "tokenizer.model")
    assert not stale.exists()
    assert hash_tokenizer(tmp_path / "run") == hash_tokenizer(tmp_path)
