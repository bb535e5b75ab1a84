"""Files that people bring: read as what they are, or refused by name."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest

from llama_jax.data import records as module
from llama_jax.data.records import list_files, read_corpus, read_records
from llama_jax.data.sources import left_out
from llama_jax.errors import InputError

TEXTS = ["plain", 'with "quotes", and commas', "several\nlines\n", "é中🎉", "x" * 3000, " tab\t"]
VALUES = [
    {"text": text, "id": number, "more": {"deep": [1, None, -2.5e3]}}
    for number, text in enumerate(TEXTS)
]


def zstd(content):
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def table(delimiter):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([number, text] for number, text in enumerate(TEXTS))
    return out.getvalue()


FORMS = {
    "lines.jsonl": "".join(json.dumps(value) + "\n" for value in VALUES),
    "lines.json": "\n\n" + "\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES),
    "lines.ndjson": "\n".join(json.dumps(value) for value in VALUES),
    "array.json": json.dumps(VALUES),
    "array.jsonl": json.dumps(VALUES, ensure_ascii=False, indent=1) + "\n\n",
    "spread.json": "\n".join(json.dumps(value, indent=2) for value in VALUES),
    "x.csv": table(","),
    "x.TSV": table("\t"),
}


def bodies(*paths, fields=None):
    return [record.body for record in read_records(list_files(paths, fields))]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_records(tmp_path, name, mark, monkeypatch):
    path = tmp_path / name
    path.write_bytes((mark + FORMS[name]).encode())
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr(module, "_READ_AT_ONCE", size)
        assert bodies(path) == TEXTS
    assert [
        document.text for document in read_corpus([path])
    ] == TEXTS  # train.py and eval read the same


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_are_read_through(tmp_path, suffix):
    for name in ("lines.jsonl", "array.json", "x.csv"):
        path = tmp_path / (name + suffix)
        whole = COMPRESSIONS[suffix](("\ufeff" + FORMS[name]).encode())
        path.write_bytes(whole)
        assert bodies(path) == TEXTS
        records = list(read_records(list_files([path])))
        assert sum(record.nbytes for record in records) <= len(whole)
        if suffix:
            path.write_bytes(whole[:-9])
            with pytest.raises(InputError, match=rf"{path.name}: damaged or cut off"):
                bodies(path)
    path = tmp_path / ("a.txt" + suffix)
    path.write_bytes(COMPRESSIONS[suffix]("\ufefftext\ufeff".encode()))
    assert bodies(path) == [
        "text\ufeff"
    ]  # a byte order mark is no text; elsewhere it is a character


def test_zstandard_without_its_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"llama-jax\[data\]"):
        bodies(tmp_path / "x.jsonl.zst")


@pytest.mark.parametrize("name", ["a.docx", "a.gz", "a.jsonl.zip", "a.parquet.gz", "a.npy"])
def test_unknown_kinds_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match="a file of unknown kind"):
        list_files([tmp_path / name])


def test_folder_reads_what_it_can_and_lists_the_rest(tmp_path):
    for name in ("lines.jsonl", "array.json", "x.csv"):
        (tmp_path / name).write_text(FORMS[name])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(FORMS["lines.jsonl"].encode()))
    assert left_out([tmp_path]) is None
    assert bodies(tmp_path) == TEXTS * 4
    for number in range(7):
        (tmp_path / f"{number}.pdf").write_text("no")
    (tmp_path / "LICENSE").write_text("no")
    (tmp_path / ".hidden").write_text("no")
    line = "left out, of unknown kind: 0.pdf, 1.pdf, 2.pdf, 3.pdf, 4.pdf and 3 more (files: 8)"
    assert left_out([tmp_path / "x.csv", tmp_path]) == line
    assert bodies(tmp_path) == TEXTS * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"text": "a"}, {"text": "b"', "x.json: record 2 is not JSON"),
        ("x.json", '[{"text": "a"},', "x.json: cut off behind record 1"),
        ("x.json", '[{"text": "a"}] {"text": "b"}', "more behind the end of the array"),
        (
            "x.json",
            '[{"text": "a"}, {"text": bad}, ' + '{"text": "c"}, ' * 99,
            "x.json: record 2 is not JSON",
        ),
        ("x.json", "[1]", "record 1: JSON a int given, an object with text"),
        ("x.json", '{"data": []}', "x.json:1: fields data given, text; messages"),
        ("x.json", '{\n"text": "a"\n', "record 1 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[2]', "x.jsonl:2: JSON a list given"),
        ("x.csv", "a,b\n1,2\n", r"x.csv:2: fields a, b given, text; .*--field text=body"),
        ("x.csv", "text,b\n1,2,3\n", "x.csv:2: cells: 3 given, 2 expected"),
        ("x.csv", "text,text\n1,2\n", "two columns have one name"),
        ("x.csv", 'text\n"open\n', "not CSV"),
        ("x.csv", b"text\n\xff\n", "x.csv: not UTF-8"),
        ("x.json", b'[{"text": "\xff"}]', "x.json: not UTF-8"),
        ("x.txt", '{"text": "a"}\n{"text": "b"}\n', "JSON lines in a file of text; name it .jsonl"),
        ("x", '{"messages": []}\n', "JSON lines in a file of text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        bodies(tmp_path / name)


def test_text_that_is_null_is_empty(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": null}\n{"text": "a", "messages": null}\n')
    assert [
        (record.body, record.is_empty)
        for record in read_records(list_files([tmp_path / "x.jsonl"]))
    ] == [("", True), ("a", False)]


def test_fields_by_other_names(tmp_path):
    values = [{"body": text, "text": "not this"} for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (tmp_path / "x.csv").write_text(FORMS["x.csv"].replace("id,text", "id,body"))
    for name in ("x.jsonl", "x.csv"):
        assert bodies(tmp_path / name, fields={"text": "body"}) == TEXTS
    with pytest.raises(
        InputError, match=r"fields body, text given, 'content' expected, as --field says"
    ):
        bodies(tmp_path / "x.jsonl", fields={"text": "content"})
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "a", "text": "both"}')
    (found,) = bodies(tmp_path / "q.jsonl", fields={"prompt": "question", "completion": "answer"})
    assert [message["content"] for message in found[0]] == ["q", "a"]
    assert (
        list_files([tmp_path / "x.csv"], {"text": "body"})[0].name == "x.csv (text=body)"
    )  # another data set


def test_columns_of_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        arrow.Table.from_pylist([{"body": "a", "n": 1}, {"body": None, "n": 2}]),
        tmp_path / "x.parquet",
    )
    with pytest.raises(
        InputError, match=r"x\.parquet: columns body, n given, text; .*--field text=body"
    ):
        bodies(tmp_path / "x.parquet")
    assert bodies(tmp_path / "x.parquet", fields={"text": "body"}) == ["a", ""]
