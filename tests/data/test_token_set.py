"""`TokenSet` over many shards: few open files, quick lookup, and files that are not those of the
manifest.
"""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from llama_jax.data import token_set
from llama_jax.data.token_file import write_tokens
from llama_jax.data.token_set import (
    MANIFEST_VERSION,
    OPEN_AT_ONCE,
    CountsEntry,
    Manifest,
    ShardEntry,
    Shards,
    TokenSet,
    file_sha256,
)
from llama_jax.data.tokens import Piece
from llama_jax.errors import CorruptError, InputError

SHARDS = 200


def write_shard(path, seed):
    source = random.Random(seed)
    documents = [[source.randrange(100) for _ in range(source.randint(1, 9))] for _ in range(3)]
    file = write_tokens(
        path,
        documents,
        vocab_size=100,
        bytes_of_text=seed,
        tokenizer_sha256="t",
        sources_sha256="s",
    )
    entry = ShardEntry(
        path.name, file.documents, file.size, seed, path.stat().st_size, file_sha256(path)
    )
    return [token for ids in documents for token in ids], entry


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 200 shards, and its tokens."""
    directory = tmp_path_factory.mktemp("many")
    none = directory / "train_counts.json"
    none.write_bytes(b"{}")
    made = [
        write_shard(directory / f"train-{number:05d}.tokens", number) for number in range(SHARDS)
    ]
    entries = tuple(entry for _, entry in made)
    Manifest(
        version=MANIFEST_VERSION,
        kind="text",
        vocab_size=100,
        tokenizer_sha256="t",
        template_sha256=None,
        held_out=0.0,
        shard_tokens=1,
        sources=(),
        dropped=0,
        bad_records=0,
        documents=3 * SHARDS,
        tokens=sum(entry.tokens for entry in entries),
        train=entries,
        held_out_shards=(),
        counts=(CountsEntry(none.name, 2, file_sha256(none)),),
    ).write(directory)
    return directory, [token for tokens, _ in made for token in tokens]


_CHILD = """
import os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from llama_jax.data.token_set import TokenSet
tokens = TokenSet.open(pathlib.Path(sys.argv[1])).train
before = len(os.listdir("/proc/self/fd"))
whole = tokens.read(0, tokens.size).ids.tolist()
for first in range(0, tokens.size, 7):
    assert tokens.read(first, first + 20).ids.tolist() == whole[first:first + 20]
assert len(tokens.lengths()) == tokens.documents
print(before, len(os.listdir("/proc/self/fd")), *whole)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_shards_are_read_with_few_descriptors(many):
    directory, wanted = many
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(directory)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, after, *ids = map(int, done.stdout.split())
    assert before <= 10  # opening the folder opens no shard
    assert after <= before + OPEN_AT_ONCE
    assert ids == wanted


def test_totals_come_from_the_manifest(many, monkeypatch):
    monkeypatch.setattr(token_set, "_opened", None)  # no shard is opened
    directory, wanted = many
    train = TokenSet.open(directory).train
    assert (train.size, train.documents, train.bytes_of_text) == (
        len(wanted),
        3 * SHARDS,
        sum(range(SHARDS)),
    )


def test_lookup_does_not_grow_with_the_shards(monkeypatch, many):
    """Slicing a table of 150,000 shards took 2.8 ms a sequence; the bound is a tenth of that."""
    directory, _ = many
    entries = tuple(
        ShardEntry(f"{number}", 1, 1000 + number % 7, 0, 0, "") for number in range(150_000)
    )
    ends = np.cumsum([entry.tokens for entry in entries])
    shards = Shards("many", directory, entries, CountsEntry("c", 0, ""), "text", 100, "t")
    flags = np.zeros(1, bool)
    monkeypatch.setattr(
        Shards,
        "_read",
        lambda self, number, *rest: Piece(np.array([number], np.int32), flags, flags),
    )
    assert shards.read(0, 5).ids.tolist() == [0]
    source = random.Random(0)
    places = [source.randrange(shards.size - 5) for _ in range(500)]
    start = time.process_time()
    found = [shards.read(first, first + 5).ids for first in places]
    assert (time.process_time() - start) / len(places) < 280e-6
    assert [ids[0] for ids in found] == np.searchsorted(ends, places, side="right").tolist()
    assert [ids[-1] for ids in found] == np.searchsorted(
        ends, np.add(places, 4), side="right"
    ).tolist()


def copy_of(many, tmp_path):
    directory, _ = many
    manifest = Manifest.read(directory)
    entries = manifest.train[:3]
    for entry in (*entries, *manifest.counts):
        (tmp_path / entry.file).write_bytes((directory / entry.file).read_bytes())
    Manifest(**{**vars(manifest), "train": entries}).write(tmp_path)
    return tmp_path / entries[1].file, entries


def test_a_shard_of_another_size_is_named_at_the_start(many, tmp_path):
    path, _ = copy_of(many, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CorruptError, match=rf"{path.name}: {path.stat().st_size} bytes, but the manifest says"
    ):
        TokenSet.open(tmp_path)


def test_another_file_of_the_same_size_is_named_when_it_is_read(many, tmp_path):
    path, entries = copy_of(many, tmp_path)
    size = path.stat().st_size
    write_tokens(
        path,
        [[5] * count for count in (1, 1, entries[1].tokens - 2)],
        vocab_size=100,
        bytes_of_text=9,
        tokenizer_sha256="t",
        sources_sha256="s",
    )
    assert path.stat().st_size == size
    train = TokenSet.open(tmp_path).train
    assert len(train.read(0, 2).ids) == 2  # another shard
    with pytest.raises(CorruptError, match=rf"{path.name}: another file than the manifest says"):
        train.read(entries[0].tokens, entries[0].tokens + 1)


def test_a_manifest_of_another_version_is_no_damage(many, tmp_path):
    copy_of(many, tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(
        text.replace(f'"version": {MANIFEST_VERSION}', '"version": 1')
    )
    with pytest.raises(
        InputError, match=r"version 1, .*prepare the data again, with another --output"
    ) as caught:
        TokenSet.open(tmp_path)
    assert not isinstance(caught.value, CorruptError)
