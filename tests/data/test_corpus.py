"""Documents: what is read, in which order, and which are held out."""

import sys

import pytest

from llama_jax.data import records as corpus
from llama_jax.data.records import Document, is_held_out, read_corpus, standard_library
from llama_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for name in ("b.txt", "a.md", "sub/z.py", "sub.rst", ".git/hidden.txt", "image.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text of {name}\r\n".encode())
    return root


def test_folder_gives_visible_text_files_sorted_by_relative_path(folder):
    documents = list(read_corpus([folder]))
    assert [document.name for document in documents] == ["a.md", "b.txt", "sub.rst", "sub/z.py"]
    assert documents[0] == Document("a.md", "text of a.md\r\n")


def test_names_do_not_depend_on_where_the_folder_lies(folder, tmp_path):
    before = list(read_corpus([folder]))
    assert list(read_corpus([str(folder.rename(tmp_path / "elsewhere"))])) == before


def test_file_named_directly_is_read_if_its_kind_is_known(folder):
    assert [document.name for document in read_corpus([folder / "b.txt", folder / "a.md"])] == [
        "b.txt",
        "a.md",
    ]
    with pytest.raises(
        InputError, match=r"image\.png: a file of unknown kind \(\.png\); text \(\.md"
    ):
        list(read_corpus([folder / "b.txt", folder / "image.png"]))


@pytest.mark.parametrize("name", ["bad.txt", "missing.txt", "empty"])
def test_wrong_path_is_named(folder, name):
    (folder / "bad.txt").write_bytes(b"ok\xff")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        list(read_corpus([folder / name]))


def test_undecodable_file_inside_a_folder_is_not_skipped(folder):
    (folder / "bad.txt").write_bytes(b"ok\xff")
    with pytest.raises(InputError, match=r"bad\.txt: not UTF-8 \(byte 2\)"):
        list(read_corpus([folder]))


def test_standard_library_is_sorted_and_without_tests():
    names = [document.name for document in standard_library()]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/tasks.py", "unittest/mock.py", "pydoc_data/topics.py"} <= set(
        names
    )
    assert not any(
        {"test", "tests", "idle_test", "lib2to3", "site-packages"} & set(name.split("/"))
        for name in names
    )
    assert not any(sys.platform in name and name.startswith("_sysconfigdata") for name in names)


def test_standard_library_has_the_promised_size():
    size = sum(len(document.text) for document in standard_library())
    assert 5e6 < size < 20e6


def test_interpreter_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="standard library"):
        list(standard_library())


def test_held_out_choice_is_fixed_for_ever():
    # Written out because a change would move documents from evaluation into training.
    names = [f"document {number}" for number in range(40)]
    assert [number for number, name in enumerate(names) if is_held_out(name, 0.1)] == HELD_OUT


def test_held_out_share_and_nesting():
    names = [str(number) for number in range(20_000)]
    small, large = (
        {name for name in names if is_held_out(name, fraction)} for fraction in (0.05, 0.2)
    )
    assert small < large
    assert abs(len(small) / 20_000 - 0.05) < 0.007  # 4.5 standard deviations
    assert not any(is_held_out(name, 0.0) for name in names)
    assert all(is_held_out(name, 1.0) for name in names)


HELD_OUT = [21, 22]
