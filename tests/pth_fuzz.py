"""A process with little memory that opens hostile `.pth` files.

    python pth_fuzz.py open FILE ...          CPU seconds and what became of each, a line a file
    python pth_fuzz.py damage FILE ROUNDS     damages a good file in as many ways: how many were
    refused, how many read

Anything but an `InputError`, and a damaged archive that is read with other numbers, ends it with a
traceback.
"""

import io
import pathlib
import random
import resource
import sys
import time
import zipfile

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.pth import PthFile

HEADROOM = 256 << 20


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Flips bytes, cuts, repeats or moves pieces."""
    kind = draw.randrange(4)
    at, other, length = draw.randrange(len(data)), draw.randrange(len(data)), draw.randrange(1, 64)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(data))] = draw.choice(
                (0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256))
            )
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[other : other + length] + data[at:]
    return data[:at] + data[other : other + length] + data[at + length :]


def repacked(data: bytes, draw: random.Random) -> bytes:
    """The same archive, valid, around a damaged pickle."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged(content, draw) if name.endswith("data.pkl") else content)
    return packed.getvalue()


def opened(path: pathlib.Path) -> PthFile | str:
    """The open file, or the one line that refuses it."""
    try:
        return PthFile.open(path)
    except InputError as error:
        return str(error)


def copies(path: pathlib.Path) -> dict[str, np.ndarray] | str:
    """Copies of all tensors, or the one line that refuses the file."""
    file = opened(path)
    try:
        return (
            file
            if isinstance(file, str)
            else {name: file.read(name).copy() for name in file.tensors}
        )
    except InputError as error:
        return str(error)


def require_line_or_same(got: dict[str, np.ndarray] | str, good: dict[str, np.ndarray]) -> None:
    """What became of a damaged file: one line, or tensors of the good one."""
    if isinstance(got, str):
        assert "\n" not in got, got
        assert len(got) < 1000, got
        return
    for name, tensor in got.items():
        assert tensor.dtype == good[name].dtype, name
        assert tensor.tobytes() == good[name].tobytes(), name


def damage(path: pathlib.Path, rounds: int) -> None:
    """Damages the file itself and the pickle inside in turns."""
    data, good, draw = path.read_bytes(), copies(path), random.Random(8)
    assert isinstance(good, dict), good
    target, refused = path.with_name("damaged.pth"), 0
    for number in range(rounds):
        target.unlink(missing_ok=True)  # a file in use is not changed under its reader
        target.write_bytes(repacked(data, draw) if number % 2 else damaged(data, draw))
        got = copies(target)
        refused += isinstance(got, str)
        # A damaged pickle in a valid archive may have other names and shapes: then it is another
        # good file.
        require_line_or_same(got, got if number % 2 and isinstance(got, dict) else good)
    print(f"{rounds} damaged files: {refused} refused, {rounds - refused} read")


def limit_memory() -> None:
    """From here on, `HEADROOM` more bytes of addresses than are in use."""
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))


def main(command: str, *arguments: str) -> None:
    limit_memory()
    if command == "damage":
        damage(pathlib.Path(arguments[0]), int(arguments[1]))
        return
    for path in arguments:
        start = time.process_time()
        message = opened(pathlib.Path(path))
        print(time.process_time() - start, message)


if __name__ == "__main__":
    main(*sys.argv[1:])
