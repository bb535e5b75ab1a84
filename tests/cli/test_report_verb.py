"""`report`: what is read from runs, and that the curves in the terminal and in pictures are where
the numbers are.
"""

import io
import json
import sys

import pytest

from llama_jax.cli.main import run_program
from llama_jax.cli.report import Line, main, plot, read_runs, shown_range, smoothed
from llama_jax.errors import InputError


def write_run(directory, steps=60, slope=0.05, resumed=(20,)):
    directory.mkdir(parents=True)
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            entry = {
                "step": step,
                "train/loss": 5 - slope * step,
                "train/learning_rate": 1e-3,
                "train/gradient_norm": 1.0,
                "train/tokens": step * 1000,
                "speed/tokens_per_second": 5000.0,
            }
            entry |= {"held_out/loss": 5.1 - slope * step} if step % 20 == 0 else {}
            file.write(json.dumps(entry) + "\n")
    with open(directory / "goodput.jsonl", "w") as file:
        for start in (0, *resumed):
            file.write(json.dumps({"time": 100.0 + start, "event": "start", "step": start}) + "\n")
        file.write(json.dumps({"time": 200.0, "step": steps, "seconds": {"step": 75.0}}) + "\n")
    return directory


def run(*arguments) -> int:
    return run_program(lambda: main([str(argument) for argument in arguments]))


def test_what_is_read(tmp_path):
    first, second = read_runs(
        [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run") / "metrics.jsonl"]
    )
    assert (first.name, second.name) == ("a/run", "b/run")
    assert first.points("train/loss")[0][:2] == [1.0, 2.0]
    assert first.points("held_out/loss", "tokens")[0] == [20000.0, 40000.0, 60000.0]
    assert (first.marks(), first.marks("tokens")) == ([20.0], [20000.0])
    assert first.goodput.share == pytest.approx(0.75)


def test_numbers_that_are_none_are_left_out(tmp_path):
    directory = write_run(tmp_path / "run", steps=3, resumed=())
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "train/loss": null}\n{"step": 5, "event": '
            '"checkpoint_saved"}\n{"step": 6, "train/loss"'
        )
    (found,) = read_runs([directory])
    assert found.points("train/loss")[0] == [1.0, 2.0, 3.0]


def test_a_line_is_drawn_where_it_is():
    """A straight line from the lower left to the upper right: one dot a column and row, on the
    diagonal.
    """
    rows = plot("up", [Line(([0, 15], [0, 15]), "a")], [], width=8 + 11, height=4, unicode=True)
    assert rows[0] == "up"
    field = [row[11:].ljust(8) for row in rows[1:5]]
    dots = {
        (2 * column + across, 4 * (3 - row) + 3 - down)
        for row, line in enumerate(field)
        for column, character in enumerate(line)
        for down, bits in enumerate(((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80)))
        for across, bit in enumerate(bits)
        if character != " " and (ord(character) - 0x2800) & bit
    }
    assert dots == {(i, i) for i in range(16)}
    assert rows[1].startswith("       15 │")
    assert rows[4].startswith("        0 │")


def test_marks_and_other_curves_are_characters():
    rows = plot(
        "t",
        [Line(([0, 10], [1, 1]), "a"), Line(([5], [0]), "b")],
        [5],
        width=22,
        height=3,
        unicode=False,
    )
    assert rows[0] == "t  * a  o b"
    assert rows[1] == "        1 |*         *"
    assert rows[3] == "        0 |     o"
    assert rows[4] == "          +-----^-----"
    assert rows[5].split() == ["0", "10"]


@pytest.mark.parametrize(
    "points", [([3.0], [2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 1.0], [-5.0, 1e9])]
)
def test_ranges_without_extent(points):
    rows = plot("t", [Line(points, "a")], [], 40, 5, unicode=True)
    assert len(rows) == 8
    assert all(len(row) <= 40 for row in rows)


def test_a_spike_does_not_press_the_rest_flat():
    values = [1.0 + i / 1000 for i in range(200)]
    assert shown_range([*values, 500.0], from_zero=False) == (1.0, pytest.approx(1.199, abs=0.01))
    assert shown_range(values, from_zero=True) == (0.0, max(values))
    smooth = smoothed([*values[:100], 500.0, *values[100:]], 3)
    assert max(smooth) < 1.2
    assert smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 2.0, 3.0, 4.0]  # a slope stays where it is


def test_in_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert run(write_run(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    for words in (
        "loss, nats/token",
        "learning rate",
        "gradient norm",
        "tokens/second",
        "o run, held out",
        "┴",
        "run: 60 steps, 60k tokens, loss 2.0000",
        "held-out loss 2.1000, at best 2.1000 at step 60",
        "resumed from step 20",
        "goodput     75.0%",
    ):
        assert words in out
    assert max(map(len, out.splitlines()[:-4])) <= 70
    assert "\x1b" not in out


def test_in_a_terminal_of_another_encoding(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run(write_run(tmp_path / "läufe" / "run"), write_run(tmp_path / "b" / "run")) == 0
    text = raw.getvalue().decode("ascii")
    assert "l?ufe/run" in text
    assert "*" in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(tmp_path, capsys, ending):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", steps=200), write_run(tmp_path / "b", slope=0.01, resumed=())]
    picture = tmp_path / f"curves.{ending}"
    assert run(*runs, "--output", picture, "--x", "tokens") == 0
    out = capsys.readouterr().out
    assert f"{picture} written" in out
    assert "│" not in out  # no charts in the terminal unless asked for
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 10_000


def test_the_picture_shows_the_numbers(tmp_path, monkeypatch):
    """The curves handed to matplotlib are the points of the files, and the resume stands where it
    was.
    """
    pytest.importorskip("matplotlib")
    import matplotlib.axes

    plotted, marked = [], []
    plot_of, line_of = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.axvline
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, *a, **k: plotted.append(a) or plot_of(self, *a, **k),
    )
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "axvline",
        lambda self, x, **k: marked.append(x) or line_of(self, x, **k),
    )
    assert run(write_run(tmp_path / "run", steps=30), "--output", tmp_path / "a.png") == 0
    assert plotted[0][1] == pytest.approx([5 - 0.05 * step for step in range(1, 31)])
    assert plotted[1][:2] == ([20.0], [pytest.approx(4.1)])
    assert marked == [20.0] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "none: cannot be read"),
        (["empty"], "no metrics yet"),
        (["run", "--output", "curves.bmp"], "a file ending in .png, .svg, .pdf expected"),
        (["run", "--output", "nowhere/curves.png"], "there is no directory nowhere"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    if "--output" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(write_run(tmp_path / "run", steps=2), "--output", tmp_path / "a.png") == 2
    assert "pip install 'llama-jax[plot]'" in capsys.readouterr().err


def test_a_run_without_numbers(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_runs([tmp_path / "none"])
