"""The token file: what was written comes back, and damage is noticed and named."""

import numpy as np
import pytest

from llama_jax.data import token_file
from llama_jax.data.token_file import TokenFile, pack_header, write_tokens
from llama_jax.errors import CorruptError, InputError

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [], [1, 99, 0, 7, 2], [3]]
FLAT = [1, 5, 6, 2, 1, 2, 1, 99, 0, 7, 2, 3]


def test_round_trip(make_file):
    file = make_file(DOCUMENTS)
    assert file.tokens.tolist() == FLAT
    assert file.starts.tolist() == [0, 4, 6, 11]  # the empty document leaves no trace
    assert (
        file.header.tokens,
        file.header.documents,
        file.header.vocab_size,
        file.bytes_of_text,
    ) == (12, 4, 100, 7)
    assert (file.header.tokenizer_sha256, file.header.sources_sha256) == ("t", "s")
    file.verify()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32"), (128256, "uint32")]
)
def test_smallest_sufficient_type_holds_the_largest_id(make_file, vocab_size, dtype):
    file = make_file([[vocab_size - 1, 0], [0]], vocab_size)
    assert file.tokens.dtype == file.header.dtype == dtype
    assert file.tokens.tolist() == [vocab_size - 1, 0, 0]
    file.verify()


def test_ids_may_be_an_array_and_documents_a_generator(make_file):
    assert make_file(np.array(ids) for ids in DOCUMENTS if ids).tokens.tolist() == FLAT


def test_same_documents_give_the_same_bytes(make_file):
    assert make_file(DOCUMENTS).path.read_bytes() == make_file(DOCUMENTS).path.read_bytes()


@pytest.mark.parametrize("bad", [100, -1, 2**40])
def test_id_outside_the_vocabulary_is_named_with_its_document(make_file, tmp_path, bad):
    with pytest.raises(InputError, match=f"document 2: token id {bad}, but ids from 0 to 99"):
        make_file([[1], [2], [3, bad], [4]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [[]]])
def test_no_documents_is_an_error(make_file, tmp_path, documents):
    with pytest.raises(InputError, match="no tokens to write"):
        make_file(documents)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(make_file):
    def interrupted():
        yield [1, 2, 3]
        raise KeyboardInterrupt

    old = make_file(DOCUMENTS)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(
            old.path,
            interrupted(),
            vocab_size=100,
            bytes_of_text=7,
            tokenizer_sha256="t",
            sources_sha256="s",
        )
    assert TokenFile.open(old.path).tokens.tolist() == FLAT
    assert list(old.path.parent.iterdir()) == [old.path]


def test_write_holds_one_document_at_a_time(make_file):
    alive, most = 0, 0

    class Ids(list):
        def __init__(self, values):
            nonlocal alive, most
            super().__init__(values)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    make_file(Ids([1, 2, 3]) for _ in range(100))
    assert most <= 2


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"missing\.tokens: No such file"):
        TokenFile.open(tmp_path / "missing.tokens")


@pytest.mark.parametrize("size", [0, 7, 19, 4095, 4096, 4100, -1])
def test_truncated_file_is_noticed_at_once(make_file, size):
    path = make_file(DOCUMENTS).path
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError, match=path.name):
        TokenFile.open(path)


def test_longer_file_is_noticed_at_once(make_file):
    path = make_file(DOCUMENTS).path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptError, match="promises"):
        TokenFile.open(path)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("position", "message"),
    [(0, "not a token file"), (8, "version"), (14, "checksum"), (60, "checksum")],
)
def test_damaged_header_is_noticed_at_once(make_file, position, message):
    path = make_file(DOCUMENTS).path
    flip(path, position)
    with pytest.raises(CorruptError, match=message):
        TokenFile.open(path)


def test_every_flipped_byte_of_the_content_is_noticed(make_file):
    path = make_file(DOCUMENTS).path
    good = path.read_bytes()
    tokens_end, starts_begin = 4096 + 12 * 2, len(good) - 4 * 8
    assert tokens_end == starts_begin
    for position in range(4096, len(good)):
        flip(path, position)
        with pytest.raises(
            CorruptError, match="tokens is wrong" if position < tokens_end else "starts is wrong"
        ):
            TokenFile.open(path).verify()
        path.write_bytes(good)


def forge(path, **changes):
    """Rewrites the header with a right checksum, as a faulty writer might."""
    content = bytearray(path.read_bytes())
    header = TokenFile.open(path).header._replace(**changes)
    content[:4096] = pack_header(header).ljust(4096, b"\0")
    path.write_bytes(content)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float8"}, {"tokens": "12"}, {"tokens": -1}, {"documents": 0}, {"tokens": 10**30}],
)
def test_senseless_header_is_refused(make_file, changes):
    path = make_file(DOCUMENTS).path
    forge(path, **changes)
    with pytest.raises(CorruptError, match=path.name):
        TokenFile.open(path)


def test_verify_finds_ids_above_the_vocabulary(make_file):
    path = make_file(DOCUMENTS).path
    forge(path, vocab_size=99)
    with pytest.raises(CorruptError, match="token 99, but a vocabulary of 99"):
        TokenFile.open(path).verify()


@pytest.mark.parametrize("starts", [[1, 4, 6, 11], [0, 6, 4, 11], [0, 4, 4, 11], [0, 4, 6, 12]])
def test_verify_finds_starts_out_of_order(make_file, starts):
    path = make_file(DOCUMENTS).path
    values = np.array(starts, "<u8")
    path.write_bytes(path.read_bytes()[:-32] + values.tobytes())
    forge(path, starts_crc32=token_file._checksum(values))
    with pytest.raises(CorruptError, match="out of order"):
        TokenFile.open(path).verify()


def test_long_files_are_checked_piece_by_piece(make_file, random_documents, monkeypatch):
    monkeypatch.setattr(token_file, "_CHECKED_AT_ONCE", 3)
    file = make_file(random_documents(0, 20))
    file.verify()
    swapped = file.starts.copy()
    swapped[[2, 3]] = swapped[[3, 2]]  # across the border of two pieces
    assert not token_file._increases(swapped)
