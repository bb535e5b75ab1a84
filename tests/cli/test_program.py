"""How programs end."""

import errno
import subprocess
import sys

import pytest

from llama_jax.cli.main import run_program
from llama_jax.errors import CorruptError, InputError


def ending(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_of_the_program(status, capsys):
    assert run_program(lambda: status) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("run.steps: 0 given"), 2, "error: run.steps: 0 given\n"),
        (InputError("two\n  lines"), 2, "error: two lines\n"),
        (CorruptError("checkpoint 5"), 5, "error: checkpoint 5\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_the_user(error, status, text, capsys):
    assert run_program(ending(error)) == status
    assert capsys.readouterr() == ("", text)


def test_our_own_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_program(ending(ZeroDivisionError()))


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away(lines):
    code = "import sys; from llama_jax.cli.main import run_program\n"
    code += (
        f"def main():\n  for _ in range({lines}): print('x' * 50)\n  return "
        "0\nsys.exit(run_program(main))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait(timeout=300) == 141


def test_a_full_disk_is_one_line(capsys):
    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/data")

    assert run_program(full) == 2
    assert (
        capsys.readouterr().err
        == "error: runs/x/data: No space left on device; make room or name another directory\n"
    )
    with pytest.raises(
        OSError, match="odd"
    ):  # what is not known to be the machine's fault keeps its traceback
        run_program(lambda: (_ for _ in ()).throw(OSError(errno.EBADF, "odd")))


CLOSED = """
import sys
from llama_jax.cli.main import run_program
def main():
    print("note", file=sys.stderr)
    with open(sys.argv[1]) as file:
        print(sys.stdin.read() + file.read())
    return 0
sys.exit(run_program(main))
"""


@pytest.mark.parametrize(
    ("closing", "out", "err"),
    [
        ("<&-", "content\n", "note\n"),
        (">&-", "", "note\n"),
        ("2>&-", "content\n", ""),
        ("<&- >&- 2>&-", "", ""),
    ],
)
def test_closed_streams_are_the_null_device(tmp_path, closing, out, err):
    """A shell closes them with `>&-`: no traceback, and no note where the text belongs."""
    (tmp_path / "file").write_text("content")
    command = f'exec "$0" -c "$1" "$2" {closing}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, CLOSED, tmp_path / "file"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
