"""The `.pth` reader: what torch.save wrote, and nothing run, unbounded or out of place for a file
that is hostile.
"""

import collections
import io
import pathlib
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from matrix import rounds

from llama_jax.errors import InputError
from llama_jax.weights.pth import PthFile

FUZZ = pathlib.Path(__file__).parent.parent / "pth_fuzz.py"


def refusal(path, data: bytes | None = None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        PthFile.open(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    return message


def in_little_memory(*arguments) -> list[str]:
    """The lines that `pth_fuzz.py` prints."""
    done = subprocess.run(
        [sys.executable, FUZZ, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


# --- pickles and archives by hand ---


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(
    key: str = "0", count: int = 4, kind: str = "FloatStorage", tag: str = "storage"
) -> bytes:
    return (
        b"("
        + text(tag)
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )


def tensor(where: bytes, offset: int = 0, shape=(4,), strides=(1,)) -> bytes:
    sizes = b"".join(b"(" + b"".join(map(number, axes)) + b"t" for axes in (shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + where
        + number(offset)
        + sizes
        + b"\x89"
        + hooks
        + b"tR"
    )


def state(*values: bytes) -> bytes:
    return (
        b"\x80\x02}"
        + b"".join(text(f"w{i}") + value + b"s" for i, value in enumerate(values))
        + b"."
    )


GOOD = state(tensor(storage()))
NUMBERS = np.arange(4, dtype=np.float32)


def archive(
    stream: bytes = GOOD, folder: str = "a", method: int = zipfile.ZIP_STORED, **records: bytes
) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as out:
        out.writestr(f"{folder}/data.pkl", stream)
        for name, content in ({"data/0": NUMBERS.tobytes()} | records).items():
            out.writestr(f"{folder}/{name}", content)
    return packed.getvalue()


def wide_archive(entries: dict[str, bytes], **false: int) -> bytes:
    """An archive with 64-bit numbers everywhere, as beyond 4 GiB; some of them false."""
    body, directory = b"", b""
    for name, content in entries.items():
        raw, extra = (
            name.encode(),
            struct.pack("<2H3Q", 1, 24, len(content), len(content), len(body)),
        )
        checksum, none = zlib.crc32(content), 0xFFFFFFFF
        directory += (
            struct.pack(
                "<4s6H3L5H2L",
                b"PK\1\2",
                45,
                45,
                0,
                0,
                0,
                0,
                checksum,
                none,
                none,
                len(raw),
                len(extra),
                0,
                0,
                0,
                0,
                none,
            )
            + raw
            + extra
        )
        body += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, checksum, none, none, len(raw), 20
        )
        body += raw + struct.pack("<2H2Q", 1, 16, len(content), len(content)) + content
    values = {"count": len(entries), "nbytes": len(directory), "start": len(body)} | false
    closing = struct.pack(
        "<4sQ2H2L4Q",
        b"PK\6\6",
        44,
        45,
        45,
        0,
        0,
        values["count"],
        values["count"],
        values["nbytes"],
        values["start"],
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body) + len(directory), 1)
    short = false.get("short", 0xFFFF)
    return (
        body
        + directory
        + closing
        + locator
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, none, none, 0)
    )


# --- good files ---


def test_pickles_and_archives_by_hand_are_good(tmp_path):
    for data in (archive(), wide_archive({"a/data.pkl": GOOD, "a/data/0": NUMBERS.tobytes()})):
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
        (tmp_path / "good.pth").write_bytes(data)
        np.testing.assert_array_equal(PthFile.open(tmp_path / "good.pth").read("w0"), NUMBERS)


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_read_as_torch_reads_them(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3)).to(torch.bfloat16)
    base = torch.randn(6, 8)
    given = module.state_dict()
    given.update(
        {
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "half": torch.randn(7, dtype=torch.float16),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "long": torch.arange(3),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(0.5),
            "empty": torch.empty(0, 3),
            "same": base,
            "row": base[2],
            "turned": base.T,
            "window": base[1:4, 2:7:2],
        }
    )
    torch.save(given, tmp_path / "state.pth", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "state.pth", weights_only=False)
    file = PthFile.open(tmp_path / "state.pth")
    assert file.tensors.keys() == expected.keys()
    for name, value in expected.items():
        got = file.read(name)
        assert got.dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(
            np.asarray(got, np.float64), value.detach().double().numpy(), strict=True
        )
    assert not file.read("same").flags.owndata
    assert file.tensors["same"].storage == file.tensors["turned"].storage


@pytest.mark.parity
def test_the_formats_that_torch_had_before_are_refused_with_advice(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "torch.save it again" in refusal(tmp_path / "old.pth")
    assert "torch.save it again" in refusal(
        tmp_path / "older.pth", bytes(257) + b"ustar" + bytes(250)
    )
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    assert "torch.save" in refusal(tmp_path / "script.pth")


def test_numbers_need_not_be_aligned(tmp_path):
    for shift in range(8):
        (tmp_path / "odd.pth").unlink(missing_ok=True)
        (tmp_path / "odd.pth").write_bytes(
            archive(
                state(tensor(storage(kind="BFloat16Storage", count=8), shape=(8,))),
                "a" * (shift + 1),
            )
        )
        got = PthFile.open(tmp_path / "odd.pth").read("w0").astype(np.float32)
        np.testing.assert_array_equal(
            got, (np.frombuffer(NUMBERS.tobytes(), "<u2").astype(np.uint32) << 16).view(np.float32)
        )


# --- pickles that would run something ---


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_something_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "executed"
    stream = pickle.dumps({"w": Harmful(marker)}, protocol)
    pickle.loads(stream)
    assert marker.exists()  # it would have
    marker.unlink()
    refusal(tmp_path / "bad.pth", archive(stream))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (state(b"cos\nsystem\n(" + text("true") + b"tR"), "names 'os.system'"),
        (state(b"c__builtin__\neval\n(" + text("1") + b"tR"), "names '__builtin__.eval'"),
        (state(b"cbuiltins\neval\n(" + text("1") + b"tR"), "names 'builtins.eval'"),
        (
            state(text("builtins") + text("exec") + b"\x93(" + text("1") + b"tR"),
            "names 'builtins.exec'",
        ),
        (state(text("torch") + text("load") + b"\x93(" + text("1") + b"tR"), "names 'torch.load'"),
        (
            state(b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R"),
            "names 'torch._utils._rebuild_device",
        ),
        (state(b"(ios\nsystem\n"), "operation INST"),
        (state(b"(ccollections\nOrderedDict\no"), "operation OBJ"),
        (state(b"ccollections\nOrderedDict\n)\x81"), "operation NEWOBJ"),
        (state(b"ccollections\nOrderedDict\n)}\x92"), "operation NEWOBJ_EX"),
        (state(b"\x82\x01"), "operation EXT1"),
        (state(b"\x83\x01\x00"), "operation EXT2"),
        (state(b"\x84\x01\x00\x00\x00"), "operation EXT4"),
        (state(b"P0\n"), "operation PERSID"),
        (state(b"\x97"), "operation NEXT_BUFFER"),
        (state(b"]"), "operation EMPTY_LIST"),
        (state(tensor(storage()) + b"}" + text("__class__") + b"Nsb"), "sets attributes"),
        (state(b"}}" + text("__class__") + b"Nsb"), "sets attributes"),
        (state(tensor(storage()) + b"}" + text("_metadata") + b"Nsb"), "sets attributes"),
        (state(b"ctorch\nFloatStorage\n)R"), "calls torch.FloatStorage"),
        (state(b"ccollections\nOrderedDict\n(" + text("a") + b"tR"), "fills an OrderedDict"),
        (state(b"ctorch._utils\n_rebuild_parameter\n(NtR"), "parameter that is no tensor"),
        (
            state(b"(" + text("storage") + storage() + text("0") + text("cpu") + number(4) + b"tQ"),
            "is no storage",
        ),
        (state(storage(tag="module")), "is no storage"),
        (state(b"NQ"), "values where others belong"),
        (state(tensor(storage(key="../0"))), "storage '../0'"),
        (state(tensor(storage(key="0\n"))), "is not supported"),
        (state(tensor(storage(count=-4))), "is not supported"),
        (state(tensor(storage(kind="QInt8Storage"))), "names 'torch.QInt8Storage'"),
        (state(tensor(b"ctorch._utils\n_rebuild_parameter\n")), "tensor without storage"),
        (state(tensor(storage(), -1)), "that cannot be"),
        (state(tensor(storage(), 0, (-4,))), "that cannot be"),
        (state(tensor(storage(), 0, (4,), (-1,))), "that cannot be"),
        (state(tensor(storage(), 0, (4,), ())), "that cannot be"),
        (state(tensor(storage(), 0, (1,) * 9, (1,) * 9)), "that cannot be"),
        (state(tensor(storage(), 1)), "reaches out"),
        (state(tensor(storage(), 1 << 70)), "reaches out"),
        (state(tensor(storage(), 0, (5,))), "reaches out"),
        (state(tensor(storage(), 0, (1 << 40,), (0,))), "reaches out"),
        (state(tensor(storage(), 0, (1 << 1000,) * 8, (1 << 1000,) * 8)), "reaches out"),
        (state(tensor(storage(), 0, (2, 2), (3, 1))), "reaches out"),
        (state(tensor(storage(), 5, (0,))), "reaches out"),
        (state(tensor(storage("1"))), "storage 1 of 4 float32 is missing"),
        (state(tensor(storage(count=5))), "16 bytes long"),
        (state(tensor(storage(kind="DoubleStorage"))), "16 bytes long"),
        (state(tensor(storage(count=1 << 900))), "16 bytes long"),
        (state(tensor(storage()), b"}"), "'w1' is a dict"),
        (state(b"N"), "'w0' is a NoneType"),
        (b"\x80\x02N.", "holds a NoneType"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "holds a class"),
        (b"\x80\x02}NNs.", "a NoneType as a key"),
        (b"\x80\x02})Ns.", "a tuple as a key"),
        (b"\x80\x02}" + (text("w") + b"Ns") * 2 + b".", "'w' twice"),
        (b"\x80\x02}(Nu.", "no dict"),
        (b"\x80\x02)" + text("w") + b"Ns.", "no dict"),
        (b"\x80\x01}.", "protocol 1"),
        (b"\x80\x06}.", "protocol 6"),
        (b"\x80\x02}}.", "is damaged"),
        (b"\x80\x02.", "is damaged"),
        (b"\x80\x02t.", "is damaged"),
        (b"\x80\x02h\x05.", "is damaged"),
        (b"\x80\x02}", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_everything_else_in_a_pickle_is_refused_by_name(tmp_path, stream, named):
    assert named in refusal(tmp_path / "bad.pth", archive(stream))


def test_every_operation_there_is_ends_well(tmp_path):
    """Each with arguments of zeros, on an empty stack and on a full one."""
    for operation in pickletools.opcodes:
        for before in (b"", b"(}}))NNN"):
            refusal(
                tmp_path / "bad.pth",
                archive(
                    b"\x80\x02" + before + operation.code.encode("latin-1") + bytes(9) + b"\n."
                ),
            )


MEGABYTES = 1 << 20
BOMBS = {
    "doubled tuples": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 500 + text("w") + b"h\x00s.",
    "doubled tuples in a dict": b"\x80\x02})q\x00"
    + b"h\x00h\x00\x86q\x00" * 500
    + b"0"
    + text("w")
    + b"h\x00s.",
    "doubled tuples as a storage": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 500 + b"Q.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 400_000 + b".",
    "deep dicts": b"\x80\x02" + (b"}" + text("w")) * 100_000 + b"}" + b"s" * 100_000 + b".",
    "deep marks": b"\x80\x02" + b"(" * 500_000 + b".",
    "endless": b"\x80\x02" + b"}" * MEGABYTES + b".",
    "quadratic memo": b"\x80\x02(" + b"N" * 200_000 + b"tq\x00" + b"h\x00\x85" * 150_000 + b".",
    "large tuple called often": b"\x80\x02("
    + b"N" * 200_000
    + b"tq\x00"
    + b"ccollections\nOrderedDict\nh\x00R" * 9_000
    + b".",
    "memo numbers": b"\x80\x02N"
    + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(200_000))
    + b".",
    "digits": b"\x80\x02I" + b"1" * (8 * MEGABYTES) + b"\n.",
    "long number": b"\x80\x02\x8b"
    + struct.pack("<I", 8 * MEGABYTES)
    + b"\x7f" * (8 * MEGABYTES)
    + b".",
    "long text": b"\x80\x02}X" + struct.pack("<I", 8 * MEGABYTES) + b"w" * (8 * MEGABYTES) + b"Ns.",
    "text longer than the file": b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"w.",
    "bytes longer than memory": b"\x80\x02\x8e" + struct.pack("<Q", 1 << 62) + b"w.",
    "frame longer than memory": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}}.",
    "large": b"\x80\x02}" + bytes(17 * MEGABYTES),
}


def test_bombs_are_refused_in_bounded_time_and_memory(tmp_path):
    """In a process with 256 MiB to spare."""
    for name, stream in BOMBS.items():
        (tmp_path / f"{name}.pth").write_bytes(archive(stream))
    for name, line in zip(
        BOMBS, in_little_memory("open", *(tmp_path / f"{name}.pth" for name in BOMBS))
    ):
        seconds, _, message = line.partition(" ")
        assert f"{name}.pth: " in message
        assert ("more than 524288 operations" in message) == (name == "endless")
        assert float(seconds) < 5, name


# --- archives that are not what they seem ---


def patched(data: bytes, name: str, offset: int, layout: str, value) -> bytes:
    """An archive with one field of the directory's record of an entry changed, counted from the
    record's beginning.
    """
    at = data.rindex(name.encode()) - 46 + offset
    return data[:at] + struct.pack(layout, value) + data[at + struct.calcsize(layout) :]


STORED = archive()
END = len(STORED) - 22
WIDE_FIELD = struct.pack("<2H", 1, 24)


def counted(here: int, everywhere: int) -> bytes:
    """The archive with other numbers of entries."""
    return STORED[: END + 8] + struct.pack("<2H", here, everywhere) + STORED[END + 12 :]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (archive(method=zipfile.ZIP_DEFLATED), "is compressed"),
        (patched(STORED, "a/data/0", 8, "<H", 1), "encrypted"),
        (patched(STORED, "a/data/0", 34, "<H", 1), "split"),
        (patched(STORED, "a/data/0", 24, "<L", 20), "two sizes"),
        (
            patched(patched(STORED, "a/data/0", 24, "<L", 1 << 30), "a/data/0", 20, "<L", 1 << 30),
            "lies over another part",
        ),
        (patched(STORED, "a/data/0", 42, "<L", 0), "described in two different ways"),
        (patched(STORED, "a/data/0", 42, "<L", 1 << 30), "is not where the archive says"),
        (patched(STORED, "a/data/0", 42, "<L", 3), "is not where the archive says"),
        (patched(STORED, "a/data/0", 42, "<L", 0xFFFFFFFF), "lacks its 64-bit size"),
        (
            patched(patched(STORED, "a/data.pkl", 24, "<L", 300), "a/data.pkl", 20, "<L", 300),
            "lies over another part",
        ),
        (STORED.replace(b"a/data/0", b"a/../abc"), "has a name that"),
        (STORED.replace(b"a/data/0", b"a//abcde"), "has a name that"),
        (STORED.replace(b"a/data/0", b"/etc/abc"), "has a name that"),
        (STORED.replace(b"a/data/0", b"a\\data\\0"), "has a name that"),
        (STORED.replace(b"a/data/0", b"a/data\n0"), "has a name that"),
        (STORED.replace(b"a/data/0", b"a/data/\xff"), "not UTF-8"),
        (STORED.replace(b"a/data/0", b"b/data/0"), "2 folders"),
        (archive(**{"code/x.py": b""}), "TorchScript"),
        (archive(byteorder=b"big"), "byte order b'big'"),
        (archive(byteorder=b"l" * (17 << 20)), "byteorder has 17825792 bytes"),
        (wide_archive({"a/data/0": b"", "a/version": b"3"}), "has no data.pkl"),
        (wide_archive({"a/data.pkl": GOOD} | {"a/data/0": b""}), "0 bytes long"),
        (STORED + b"comment", "cut short or damaged"),
        (STORED[:-1] + b"\1" + b"x", "cut short or damaged"),
        (b"PK\3\4" + STORED, "not where it should be"),
        (counted(60000, 60000), "60000 entries"),
        (counted(3, 3), "3 entries in"),
        (counted(1, 2), "not where it should be"),
        (wide_archive({"a/data.pkl": GOOD}, count=1 << 60), "entries in"),
        (wide_archive({"a/data.pkl": GOOD}, nbytes=1 << 60), "not where it should be"),
        (wide_archive({"a/data.pkl": GOOD}, start=1 << 63), "not where it should be"),
        (wide_archive({"a/data.pkl": GOOD}, short=7), "disagree"),
        (
            wide_archive({"a/data.pkl": GOOD}).replace(WIDE_FIELD, struct.pack("<2H", 1, 16)),
            "lacks its 64-bit size",
        ),
        (
            wide_archive({"a/data.pkl": GOOD}).replace(WIDE_FIELD, struct.pack("<2H", 1, 25)),
            "lacks its 64-bit size",
        ),
        (
            wide_archive({"a/data.pkl": GOOD}).replace(WIDE_FIELD, struct.pack("<2H", 2, 24)),
            "lacks its 64-bit size",
        ),
        (b"PK\3\4", "ends too early"),
        (b"", "not a .pth file"),
        (b"GGUF" + bytes(100), "not a .pth file"),
    ],
)
def test_archives_with_tricks_are_refused(tmp_path, data, named):
    assert named in refusal(tmp_path / "bad.pth", data)


def test_two_entries_of_one_name_are_refused(tmp_path):
    data = archive(**{"data/1": NUMBERS.tobytes()}).replace(b"a/data/1", b"a/data/0")
    assert "two entries are called 'a/data/0'" in refusal(tmp_path / "bad.pth", data)


def test_an_entry_inside_of_another_is_refused(tmp_path):
    """The bytes of one storage hold a header and the numbers of the other: both intact, the same
    bytes twice.
    """
    plain = archive(**{"data/1": NUMBERS.tobytes()})
    inner = plain[plain.index(b"a/data/1") - 30 :][: 30 + 8 + 16]
    data = archive(**{"data/0": inner, "data/1": NUMBERS.tobytes()})
    hidden = patched(data, "a/data/1", 42, "<L", data.index(inner))
    assert zipfile.ZipFile(io.BytesIO(hidden)).read("a/data/1") == NUMBERS.tobytes()
    assert "'a/data/1' lies over another part" in refusal(tmp_path / "bad.pth", hidden)


def test_a_flipped_bit_in_the_numbers_is_noticed_when_they_are_read(tmp_path):
    data = bytearray(
        archive(state(tensor(storage()), tensor(storage("1"))), **{"data/1": NUMBERS.tobytes()})
    )
    data[bytes(data).index(NUMBERS.tobytes()) + 7] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    file = PthFile.open(tmp_path / "flipped.pth")
    for _ in range(2):
        with pytest.raises(InputError, match=re.escape("'data/0' does not match its checksum")):
            file.read("w0")
    np.testing.assert_array_equal(file.read("w1"), NUMBERS)


def test_missing_tensors_files_and_pipes_are_input_errors(tmp_path):
    import os

    (tmp_path / "good.pth").write_bytes(archive())
    with pytest.raises(InputError, match="tensor 'w9' is missing"):
        PthFile.open(tmp_path / "good.pth").read("w9")
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("none.pth", "pipe.pth", "."):
        assert "cannot be read" in refusal(tmp_path / name)


@pytest.mark.parity
def test_damaged_files_are_refused_or_read_right_in_little_memory(tmp_path):
    torch = pytest.importorskip("torch")
    layers = collections.OrderedDict(
        first=torch.nn.Linear(5, 3), second=torch.nn.Linear(3, 4).to(torch.bfloat16)
    )
    torch.save(
        {**torch.nn.Sequential(layers).state_dict(), "turned": torch.randn(4, 6).T},
        tmp_path / "good.pth",
    )
    count = rounds(800, 4000)
    (line,) = in_little_memory("damage", tmp_path / "good.pth", count)
    print(line)
    refused, read = map(
        int, re.fullmatch(rf"{count} damaged files: (\d+) refused, (\d+) read", line).groups()
    )
    assert refused > count / 2
    assert read > count / 80
