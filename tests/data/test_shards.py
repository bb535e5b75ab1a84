"""`prepare_set`: what is read, that the result depends on the input alone, interruption, damage."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import resource
import shutil

import numpy as np
import pytest

from llama_jax.data import parts as parts_module
from llama_jax.data import shards as shards_module
from llama_jax.data.parts import plan_parts
from llama_jax.data.prepare import read_tokenizer_files
from llama_jax.data.records import is_held_out, list_files, read_records, standard_library
from llama_jax.data.shards import Settings, Text, prepare_set
from llama_jax.data.sources import SourceFile
from llama_jax.data.token_set import Manifest, TokenSet, damage
from llama_jax.errors import CorruptError, InputError
from llama_jax.text.chat import encode_chat, encode_dialogue, template_from_directory
from llama_jax.text.export import hugging_face_files
from llama_jax.text.tokenizer import load_tokenizer

WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


@pytest.fixture(scope="session")
def text(tiny_directory):
    return Text(read_tokenizer_files(tiny_directory), template_from_directory(tiny_directory))


@pytest.fixture(scope="session")
def tokenizer(tiny_directory):
    return load_tokenizer(tiny_directory)


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def lines(tmp_path):
    source = random.Random(1)
    texts = ["".join(source.choices("abc def\n", k=source.randint(1, 60))) for _ in range(80)]
    return write_lines(tmp_path / "a.jsonl", [{"text": value, "id": 7} for value in texts])


def prepare(paths, directory, text, on_progress=lambda *call: None, **changes):
    settings = Settings(**{"held_out": 0.2, "shard_tokens": 500, **changes})
    return prepare_set(
        [paths] if not isinstance(paths, list) else paths, directory, text, settings, on_progress
    )


def snapshot(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def documents_of(part, tokenizer):
    ids = part.read(0, part.size).ids
    return [
        tokenizer.decode(piece.tolist()) for piece in np.split(ids, np.cumsum(part.lengths())[:-1])
    ]


def test_every_record_is_on_one_side_in_its_order(tmp_path, lines, text, tokenizer):
    manifest, _ = prepare(lines, tmp_path / "out", text)
    opened = TokenSet.open(tmp_path / "out")
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    for part, side in ((opened.train, False), (opened.held_out, True)):
        wanted = [value for value in texts if is_held_out(value, 0.2) == side]
        assert documents_of(part, tokenizer) == wanted
        assert part.bytes_of_text == sum(len(value.encode()) for value in wanted)
    assert len(manifest.train) > 2
    assert all(entry.tokens < 500 + 64 for entry in manifest.train)
    assert manifest.documents == 80
    assert damage(tmp_path / "out") == []


def test_reading_across_shards_equals_one_file(tmp_path, lines, text):
    prepare(lines, tmp_path / "many", text)
    prepare(lines, tmp_path / "one", text, shard_tokens=10**6)
    many, one = (TokenSet.open(tmp_path / name).train for name in ("many", "one"))
    assert (len(many.entries) > 2, len(one.entries)) == (True, 1)
    assert many.lengths().tolist() == one.lengths().tolist()
    for first in range(0, one.size + 40, 37):
        for got, wanted in zip(many.read(first, first + 700), one.read(first, first + 700)):
            np.testing.assert_array_equal(got, wanted)


@pytest.fixture
def many_parts(monkeypatch):
    """Files of some hundred bytes in several parts."""
    monkeypatch.setattr(parts_module, "LEAST_BYTES", 512)


@pytest.mark.usefixtures("many_parts")
def test_result_does_not_depend_on_the_workers(tmp_path, lines, text):
    small = tmp_path / "small"
    small.mkdir()
    for number in range(40):
        write_lines(
            small / f"{number:02}.jsonl", [{"text": f"file {number} line {i}"} for i in range(3)]
        )
    (small / "whole.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    for workers in (1, 2):
        prepare([lines, small], tmp_path / str(workers), text, workers=workers)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")
    assert len(Manifest.read(tmp_path / "1").train) > 8


def test_parts_follow_the_sources_alone(tmp_path, monkeypatch):
    """Every line is in one part; a file that changes its size leaves most parts of others alone."""
    files = [SourceFile(f"{n}.txt", tmp_path / f"{n}.txt") for n in range(400)]
    stats = [(700 + 37 * n % 900, n) for n in range(400)]
    monkeypatch.setattr(parts_module, "LEAST_BYTES", 4096)
    planned = plan_parts(files, stats, 10**6)
    assert [file for part in planned for file in part.files] == files
    assert max(part.nbytes for part in planned) < 2 * 4096
    mended = plan_parts(files, [*stats[:50], (1, 0), *stats[51:]], 10**6)
    assert len([part for part in mended if part not in planned]) <= 8
    assert len(planned) > 100


@pytest.mark.parametrize("least", [16, 1 << 20], ids=["apart", "in one part"])
def test_files_alike_in_two_folders_are_two_files(tmp_path, text, tokenizer, monkeypatch, least):
    """Of one name, size and time; and one file that is given twice."""
    monkeypatch.setattr(parts_module, "LEAST_BYTES", least)
    paths = []
    for name, word in (("x", "one"), ("y", "two")):
        (tmp_path / name).mkdir()
        paths.append(write_lines(tmp_path / name / "a.jsonl", [{"text": word}]))
        os.utime(paths[-1], ns=(10**18, 10**18))
    given = [tmp_path / "x", tmp_path / "y", paths[0]]
    manifest, _ = prepare(given, tmp_path / "out", text, held_out=0)
    assert documents_of(TokenSet.open(tmp_path / "out").train, tokenizer) == ["one", "two", "one"]
    wanted = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*paths, paths[0])]
    assert [source.sha256 for source in manifest.sources] == wanted
    os.utime(paths[0])  # the same content at another time
    assert prepare(given, tmp_path / "out", text, held_out=0).manifest == manifest


@pytest.mark.usefixtures("many_parts")
def test_digests_are_those_of_the_files(tmp_path, lines, text):
    """Of a file in one part, of its bytes; of several, of the digests of the parts."""
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    manifest, _ = prepare([lines, packed], tmp_path / "out", text)
    planned = plan_parts(list_files([lines]), [(lines.stat().st_size, 0)], 500)
    content, borders = lines.read_bytes(), [part.start for part in planned]
    begins = [0 if not at else content.index(b"\n", at - 1) + 1 for at in borders]
    pieces = [content[a:b] for a, b in zip(begins, [*begins[1:], None])]
    digests = "".join(hashlib.sha256(piece).hexdigest() for piece in pieces)
    assert len(pieces) > 2
    assert b"".join(pieces) == content
    assert manifest.sources[0].sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert manifest.sources[1].sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def interrupt_after(calls: int):
    """A callback that ends the work as Ctrl-C does."""
    seen = []

    def stop(stage, done, total):
        seen.append(stage)
        if seen.count("encode") == calls:
            raise KeyboardInterrupt

    return stop


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("after", [1, 3, 7])
def test_interrupted_work_is_resumed_and_ends_equal(tmp_path, lines, text, after, monkeypatch):
    """What is finished is neither parsed nor read again: neither its shards nor its sources."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(lines, out, text, interrupt_after(after))
    with pytest.raises(InputError, match=r"manifest\.json"):
        TokenSet.open(out)
    shards = list(out.glob("parts/*/*.tokens"))
    hidden = {path: path.read_bytes() for path in shards}
    for path, content in hidden.items():  # the header alone is left
        path.write_bytes(content[:4096] + bytes(len(content) - 4096))
    read, encode = [], parts_module.encode_part
    monkeypatch.setattr(
        parts_module,
        "encode_part",
        lambda job, part, *rest: read.append(part) or encode(job, part, *rest),
    )
    assert prepare(lines, out, text).kept == len(shards)
    total = len(plan_parts(list_files([lines]), [(lines.stat().st_size, 0)], 500))
    assert len(read) == total - after
    prepare(lines, tmp_path / "fresh", text)
    wanted, found = snapshot(tmp_path / "fresh"), snapshot(out)
    assert found.keys() == wanted.keys()
    blank = [name for name in wanted if found[name] != wanted[name]]
    assert len(blank) == len(shards)
    assert all(not any(found[name][4096:]) for name in blank)
    read.clear()
    prepare(lines, out, text)
    assert not read


@pytest.mark.usefixtures("many_parts")
def test_a_mended_file_costs_itself_alone(tmp_path, text, monkeypatch):
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(40)])
        for name in "abc"
    ]
    good = paths[1].read_text()
    paths[1].write_text(good + "{\n")
    with pytest.raises(InputError, match=r"b\.jsonl:41: not JSON"):
        prepare(paths, tmp_path / "out", text, workers=2)
    paths[1].write_text(good)
    read, encode = [], parts_module.encode_part
    monkeypatch.setattr(
        parts_module,
        "encode_part",
        lambda job, part, *rest: read.append(part) or encode(job, part, *rest),
    )
    prepare(paths, tmp_path / "out", text)
    assert {file.name for part in read for file in part.files} <= {"b.jsonl", "c.jsonl"}
    assert not any(file.name == "a.jsonl" for part in read for file in part.files)
    os.utime(paths[0])  # the same content at another time: read, and found to be the same
    assert prepare(paths, tmp_path / "out", text).kept > 0
    paths[0].write_text(paths[0].read_text().replace("a 7", "a 8"))
    with pytest.raises(InputError, match="other input"):
        prepare(paths, tmp_path / "out", text)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_stop_or_are_listed(tmp_path, text, workers):
    values = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    values[60], values[61], values[90] = '{"text": 3}', "{", '{"txt": "x"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(values) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:61: text is a int"):
        prepare(path, tmp_path / "out", text, workers=workers)
    finished = len(list((tmp_path / "out").glob("parts/*/*.json")))
    assert finished > 0
    with pytest.raises(InputError, match=r"a\.jsonl:\d+: .*more than 1 bad records"):
        prepare(
            path, tmp_path / "out", text, workers=workers, bad_records="skip", most_bad_records=1
        )
    manifest, kept = prepare(path, tmp_path / "out", text, workers=workers, bad_records="skip")
    assert kept >= finished
    assert (manifest.documents, manifest.bad_records) == (97, 3)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").open()]
    assert [entry["place"] for entry in listed] == [f"{path}:{n}" for n in (61, 62, 91)]
    assert [entry["reason"].split(";")[0] for entry in listed] == [
        "text is a int, text expected",
        "not JSON",
        "fields txt given, text",
    ]


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("bad", [(3, 4, 5, 6), (3, 60, 90)], ids=["in one part", "over all parts"])
def test_too_many_bad_records_stop_the_work(tmp_path, text, bad):
    values = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    for number in bad:
        values[number] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(values) + "\n")
    settings = {"bad_records": "skip", "most_bad_records": 2}
    with pytest.raises(InputError, match=rf"a\.jsonl:{bad[2] + 1}: .*more than 2 bad records"):
        prepare(path, tmp_path / "out", text, **settings)
    assert prepare(path, tmp_path / "two", text, bad_records="skip", most_bad_records=len(bad))


@pytest.mark.usefixtures("many_parts")
def test_other_kinds_in_other_parts_are_refused(tmp_path, text):
    paths = [
        write_lines(tmp_path / "a.jsonl", [{"text": f"line {i}" * 9} for i in range(20)]),
        write_lines(tmp_path / "b.jsonl", [{"prompt": "q" * 300, "completion": "a" * 300}]),
    ]
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"b\.jsonl:1: chat given, but the first .* was text"):
            prepare(paths, tmp_path / f"{workers}", text, workers=workers)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("harm", ["another size", "another content", "missing"])
def test_a_finished_shard_that_is_not_as_it_was_is_written_again(tmp_path, lines, text, harm):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(lines, out, text, interrupt_after(3))
    first, second, *_ = sorted(out.glob("parts/*/*-train-*.tokens"))
    if harm == "another size":
        first.write_bytes(first.read_bytes() + b"0")
    elif harm == "another content":
        first.write_bytes(second.read_bytes().ljust(first.stat().st_size, b"0"))
    else:
        first.unlink()
    prepare(lines, out, text)
    prepare(lines, tmp_path / "fresh", text)
    assert snapshot(out) == snapshot(tmp_path / "fresh")


@pytest.mark.usefixtures("many_parts")
def test_killed_at_the_very_end_nothing_is_encoded_again(tmp_path, lines, text, monkeypatch):
    """All shards were in their places, but not the manifest."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *given: interrupt_after(1)("encode", 0, 0))
        with pytest.raises(KeyboardInterrupt):
            prepare(lines, out, text)
    moved = len(list(out.glob("*.tokens")))
    assert moved > 3
    monkeypatch.setattr(parts_module, "encode_part", None)
    assert prepare(lines, out, text).kept == moved
    assert len(TokenSet.open(out).train.entries) + len(TokenSet.open(out).held_out.entries) == moved


@pytest.mark.usefixtures("many_parts")
def test_parts_made_by_another_rule_of_begin_tokens_are_not_kept(
    tmp_path, lines, text, monkeypatch
):
    """The rule is this program's: files of the tokenizer do not show that it has changed."""
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "encode_text", lambda tokenizer, text: [0, 1])
        with pytest.raises(KeyboardInterrupt):
            prepare(lines, tmp_path / "out", text, interrupt_after(3))
    assert prepare(lines, tmp_path / "out", text).kept == 0


def test_work_that_fails_at_once_leaves_nothing(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n")
    with pytest.raises(InputError, match="--bad-records skip"):
        prepare(path, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_row_of_a_table_with_other_cells_can_be_skipped(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text("text,id\none,1\ntwo\nthree,3\n")
    with pytest.raises(InputError, match=r"t\.csv:3: cells: 1 given, 2 expected"):
        prepare(path, tmp_path / "out", text)
    assert prepare(path, tmp_path / "out", text, bad_records="skip").manifest.documents == 2


def test_shards_of_other_settings_are_not_taken_over(tmp_path, lines, text):
    def stop(stage, done, total):
        if stage == "encode" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(lines, tmp_path / "out", text, stop, shard_tokens=100)
    assert prepare(lines, tmp_path / "out", text).kept == 0
    prepare(lines, tmp_path / "fresh", text)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_finished_folder_is_not_overwritten_by_other_input(tmp_path, lines, text):
    prepare(lines, tmp_path / "out", text)
    before = snapshot(tmp_path / "out")
    with pytest.raises(InputError, match="other input"):
        prepare(lines, tmp_path / "out", text, held_out=0.5)
    with pytest.raises(InputError, match="another tokenizer"):
        prepare(lines, tmp_path / "out", text._replace(files={"tokenizer.json": b"{}"}))
    lines.write_text(lines.read_text() + '{"text": "more"}\n')
    with pytest.raises(InputError, match="other input"):
        prepare(lines, tmp_path / "out", text)
    assert snapshot(tmp_path / "out") == before


def test_conversations_keep_what_the_assistant_says(tmp_path, text, tokenizer):
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    values = [
        {"messages": talk * 2},
        {"prompt": "And?", "completion": "So."},
        {"messages": talk[:1]},
    ]
    manifest, _ = prepare(
        write_lines(tmp_path / "c.jsonl", values), tmp_path / "out", text, held_out=0
    )
    assert (manifest.kind, manifest.dropped, manifest.documents) == ("chat", 1, 2)
    part = TokenSet.open(tmp_path / "out").train
    short = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    wanted = [encode_dialogue(text.template, tokenizer, messages) for messages in (talk * 2, short)]
    whole = part.read(0, part.size)
    assert whole.ids.tolist() == [token for dialogue in wanted for token in dialogue.token_ids]
    assert whole.learned.tolist() == [flag for dialogue in wanted for flag in dialogue.mask]
    assert part.bytes_of_text == len("Yes.Yes.So.")


@pytest.mark.parametrize("form", ["text", "messages"])
def test_pairs_learn_from_the_last_answer_only(tmp_path, text, tokenizer, form):
    said = [
        {"role": role, "content": word}
        for role, word in zip(("user", "assistant", "user"), ("a", "b", "c"))
    ]
    prompt = {"messages": said} if form == "messages" else {"prompt": "c"}
    value = {**prompt, "chosen": "good one", "rejected": "bad"}
    manifest, _ = prepare(
        write_lines(tmp_path / "p.jsonl", [value]), tmp_path / "out", text, held_out=0
    )
    assert (manifest.kind, manifest.documents) == ("pairs", 2)
    part = TokenSet.open(tmp_path / "out").train
    begin = said if form == "messages" else said[2:]
    start = 0
    for number, answer in enumerate(("good one", "bad")):
        prefix = encode_chat(text.template, tokenizer, begin, add_generation_prompt=True)
        ids, _, learned = part.read(start, start + int(part.lengths()[number]))
        start += len(ids)
        assert ids[: len(prefix)].tolist() == prefix
        assert not learned[: len(prefix)].any()
        assert tokenizer.decode(ids[learned].tolist()).strip() == answer
        end = tokenizer.special_tokens["<|im_end|>"]
        assert ids[learned][-1] == end


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "not JSON"),
        ("[1]", "list given"),
        ('{"txt": "x"}', "fields txt"),
        ('{"text": 3}', "text is a int"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": [3]}', "holds 3"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"chosen": "a", "rejected": "b"}', "without prompt"),
        ('{"prompt": "a", "completion": null}', "completion is null"),
        ('{"prompt": "a", "completion": "b"}', "chat given, but the first record was text"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, text, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl:3: .*{message}"):
        prepare(path, tmp_path / "out", text)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_worker_names_the_record_it_cannot_encode(tmp_path, text):
    path = write_lines(
        tmp_path / "c.jsonl",
        [{"messages": [{"role": "assistant", "content": "x"}, {"role": "clown", "content": "y"}]}],
    )
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"c\.jsonl:1: messages\[1\]\.role"):
            prepare(path, tmp_path / "out", text, workers=workers)
    with pytest.raises(InputError, match=r"c\.jsonl:1: .*--template"):
        prepare(path, tmp_path / "none", text._replace(template=None))


@pytest.mark.parametrize("named", [False, True], ids=["declared", "named"])
def test_the_template_is_kept_in_a_file_of_its_own(tmp_path, lines, tiny_directory, named):
    """Whether `tokenizer_config.json` declared it or it was named: whoever trains on the folder
    looks for it there.
    """
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_directory, folder)
    declared = template_from_directory(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(values | {"chat_template": declared.source})
    )
    wanted = dataclasses.replace(declared, source="{{ messages }}") if named else declared
    prepare(lines, tmp_path / "out", Text(read_tokenizer_files(folder), wanted))
    assert (tmp_path / "out" / "tokenizer" / "chat_template.jinja").read_text() == wanted.source
    assert template_from_directory(tmp_path / "out" / "tokenizer") == wanted
    prepare(lines, tmp_path / "out", Text(read_tokenizer_files(folder), wanted))  # the same again


def test_folder_of_several_kinds_of_files(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("plain")
    (tmp_path / "in" / "image.png").write_text("no")
    write_lines(tmp_path / "in" / "sub" / "a.jsonl", [{"text": "one"}, {"text": ""}])
    records = list(read_records(list_files([tmp_path / "in"])))
    assert [(record.body, record.is_empty) for record in records] == [
        ("plain", False),
        ("one", False),
        ("", True),
    ]
    for wrong in ("missing", "in/image.png/x"):
        with pytest.raises(InputError, match="no such file"):
            list_files([tmp_path / wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to read"):
        list_files([tmp_path / "empty"])


def test_parquet_gives_the_records_of_json_lines(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"prompt": f"q{i}", "completion": "a" * i, "extra": i} for i in range(5)]
    parquet.write_table(arrow.Table.from_pylist(values), tmp_path / "x.parquet")
    write_lines(tmp_path / "x.jsonl", values)
    from_parquet, from_lines = (
        [(r.kind, r.key, r.body) for r in read_records(list_files([tmp_path / name]))]
        for name in ("x.parquet", "x.jsonl")
    )
    assert from_parquet == from_lines
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"bad\.parquet: not Parquet"):
        list(read_records(list_files([tmp_path / "bad.parquet"])))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"llama-jax\[data\]"):
        list(read_records(list_files([tmp_path / "x.parquet"])))


def test_damage_is_found_and_named(tmp_path, lines, text):
    prepare(lines, tmp_path / "out", text)
    manifest = Manifest.read(tmp_path / "out")
    path = tmp_path / "out" / manifest.train[1].file
    content = bytearray(path.read_bytes())
    content[4096 + 50] ^= 1
    path.write_bytes(content)
    TokenSet.open(tmp_path / "out")  # sizes and headers are right
    (found,) = damage(tmp_path / "out")
    assert path.name in found
    path.unlink()
    with pytest.raises(CorruptError, match=f"{path.name}: missing"):
        TokenSet.open(tmp_path / "out")
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert len(damage(tmp_path / "out")) == 2
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        damage(tmp_path / "out")


def test_nothing_to_train_on_is_an_error(tmp_path, text):
    with pytest.raises(InputError, match="no document to train on"):
        prepare(write_lines(tmp_path / "e.jsonl", [{"text": ""}]), tmp_path / "out", text)


@pytest.mark.smollm2
def test_the_first_process_only_plans(tmp_path, smollm2_model):
    """It takes at most 1/64 of the processor time of two workers, beside what it takes to start."""
    files = hugging_face_files(smollm2_model.tokenizer, None)
    source, used = tmp_path / "a.jsonl", []
    for size in (1_000_000, 9_000_000):
        texts, held = [], 0
        for document in standard_library():
            texts.append(document.text)
            held += len(document.text)
            if held > size:
                break
        write_lines(source, [{"text": text} for text in texts])
        begin = [resource.getrusage(who) for who in WHO]
        prepare(source, tmp_path / str(size), Text(files, None), workers=2, shard_tokens=250_000)
        end = [resource.getrusage(who) for who in WHO]
        used.append([b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(begin, end)])
    parent, workers = (more - less for less, more in zip(*used))
    print(f"parent {parent:.3f} s, workers {workers:.2f} s for 8 MB more")
    assert workers > 1
    assert parent < workers / 64
