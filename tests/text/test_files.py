"""Small files of others: read whole, but never more than was agreed."""

import os
import pathlib

import pytest

from llama_jax.errors import InputError
from llama_jax.text.files import read_text


def test_what_the_file_holds(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\r\nb\rc\u2028é".encode())
    assert read_text(path, 12) == "a\nb\nc\u2028é"
    with pytest.raises(InputError, match="text: 11 bytes given, at most 10 expected"):
        read_text(path, 10)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_has_no_end(tmp_path, kind):
    """Of no size, they say, and endless; nothing of them is read."""
    path = pathlib.Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(
        InputError, match=f"{path}: a device or a pipe given, a regular file expected"
    ):
        read_text(path, 1000)


def test_a_file_that_grows(tmp_path, monkeypatch):
    """Its size is not taken for granted: a file of /proc says 0."""
    path = pathlib.Path("/proc/self/maps")
    if not path.exists():
        pytest.skip("no /proc")
    assert path.stat().st_size == 0
    with pytest.raises(InputError, match="maps: 11 bytes given, at most 10 expected"):
        read_text(path, 10)
