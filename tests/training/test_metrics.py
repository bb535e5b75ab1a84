"""The metrics file: every line whole, no step twice, no failure that reaches training."""

import json
import math

import numpy as np
import pytest

from llama_jax.training.metrics import LineFile, MetricsFile, StepRecord, read_events, read_metrics

RECORD = StepRecord(
    step=3,
    loss=2.5,
    learning_rate=1e-4,
    gradient_norm=0.5,
    tokens=6144,
    tokens_per_second=1e4,
    step_seconds=0.2,
)


def no_warning(text: str) -> None:
    raise AssertionError(text)


def write(path, resume_step, steps):
    metrics = MetricsFile(path, resume_step, no_warning)
    for step in steps:
        metrics.write(step, {"train/loss": 1.0 / step})
    metrics.close()


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl", 0, no_warning)
    metrics.write(RECORD.step, RECORD.flat())
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 3,
        "train/loss": 2.5,
        "train/learning_rate": 1e-4,
        "train/gradient_norm": 0.5,
        "train/tokens": 6144,
        "speed/tokens_per_second": 1e4,
        "speed/step_seconds": 0.2,
    }


def test_optional_numbers_appear_when_known():
    assert not {"speed/mfu", "held_out/loss"} & RECORD.flat().keys()
    known = RECORD._replace(mfu=0.4, held_out_loss=2.0).flat()
    assert (known["speed/mfu"], known["held_out/loss"]) == (0.4, 2.0)


def test_numbers_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, no_warning)
    metrics.write(1, {"a": math.nan, "b": math.inf, "c": np.float64(0.5), "d": 7, "e": None})

    def refuse(name):
        raise AssertionError(name)

    values = json.loads(path.read_text(), parse_constant=refuse)
    assert values == {"step": 1, "a": None, "b": None, "c": 0.5, "d": 7, "e": None}


@pytest.mark.parametrize(
    ("resume_step", "expected"),
    [(20, [10, 20, 21]), (15, [10, 21]), (0, [21]), (99, [10, 20, 30, 21])],
)
def test_resuming_drops_what_came_after(tmp_path, resume_step, expected):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [10, 20, 30])
    write(path, resume_step, [21])
    assert steps_of(path) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-9])
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    write(path, 3, [4])
    assert steps_of(path) == [1, 2, 4]


def test_foreign_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"stop": 2}\n\xff\xfe\n\n{"step": "x"}\n{"step": 2}\n')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        kept = data[: self.room]
        self.room -= len(kept)
        self.file.write(kept)
        return len(kept)

    def close(self):
        self.file.close()


def test_a_full_disk_is_one_warning(tmp_path):
    warnings = []
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, warnings.append)
    metrics.write(1, {"a": 1.0})
    metrics._file._file = FullDisk(metrics._file._file, 5)
    metrics.write(2, {"a": 2.0})
    metrics.write(3, {"a": 3.0})
    metrics._file._file.room = 1000  # somebody made room
    metrics.write(4, {"a": 4.0})
    metrics.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert [entry["step"] for entry in read_metrics(path)] == [1, 4]


def test_a_path_that_cannot_be_written_is_one_warning(tmp_path):
    warnings = []
    (tmp_path / "file").write_text("")
    metrics = MetricsFile(tmp_path / "file" / "metrics.jsonl", 0, warnings.append)
    metrics.write(1, {"a": 1.0})
    metrics.close()
    assert len(warnings) == 1


def test_a_crash_while_rewriting_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2, 3])

    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, 1, no_warning)
    assert steps_of(path) == [1, 2, 3]


def test_events_stand_beside_the_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, no_warning)
    metrics.write(1, {"train/loss": 3.0})
    metrics.event(1, "checkpoint_saved", seconds=0.5)
    metrics.write(2, {"train/loss": 2.0})
    metrics.event(2, "checkpoint_saved")
    metrics.close()
    MetricsFile(path, 1, no_warning).close()
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    assert read_events(path) == [{"step": 1, "event": "checkpoint_saved", "seconds": 0.5}]


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "lines"
    path.write_text("torn")
    file = LineFile(path, "lines", no_warning)
    file.write("one")
    file.write("two")
    assert path.read_text() == "torn\none\ntwo\n"
