"""Trackers: what reaches each of them, what is said when one is missing, and that none of them can
stop training.
"""

import importlib
import math
import sys
import types

import pytest

from llama_jax.errors import InputError
from llama_jax.training.metrics import TRACKERS, open_trackers, require_trackers


def no_warning(text: str) -> None:
    raise AssertionError(text)


class FakeRun:
    """What wandb.init and trackio.init give, as far as it is used."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def log(self, metrics, **options):
        self.calls.append((metrics, options))

    def define_metric(self, *args, **options):
        self.calls.append((args, options))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def fakes(monkeypatch):
    """Fake packages, wandb and trackio, that keep what they are given."""
    calls: dict[str, list] = {"wandb": [], "trackio": []}

    def init_of(name):
        def init(**options):
            calls[name].append(options)
            print("* a banner in the middle of the display")
            return FakeRun(calls[name])

        return init

    for name in calls:
        package = types.ModuleType(name)
        package.init, package.Settings = init_of(name), dict
        monkeypatch.setitem(sys.modules, name, package)
    return calls


def test_wandb_and_trackio_get_the_numbers(fakes, tmp_path, capsys):
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {"model": {"dim": 32}}, 0, no_warning)
    trackers.log(
        7,
        {
            "train/loss": 2.5,
            "speed/mfu": None,
            "bad": math.nan,
            "worse": math.inf,
            "train/tokens": 64,
        },
    )
    trackers.close()
    start, _, numbers, end = fakes["wandb"]
    assert (start["project"], start["name"], start["config"]) == (
        "llama_jax",
        tmp_path.name,
        {"model": {"dim": 32}},
    )
    assert numbers == ({"train/loss": 2.5, "train/tokens": 64.0, "step": 7}, {})
    assert end == "finish"
    begin, numbers, end = fakes["trackio"]
    assert begin["name"] == f"{tmp_path.name}-{start['id']}"
    assert numbers == ({"train/loss": 2.5, "train/tokens": 64.0}, {"step": 7})
    assert end == "finish"


def test_a_resumed_run_goes_on_with_its_curve_and_a_fresh_one_begins_another(fakes, tmp_path):
    for step in (0, 5, 5, 0):
        open_trackers(["wandb"], tmp_path, {}, step, no_warning).close()
    first, second, third, fresh = [call["id"] for call in fakes["wandb"] if isinstance(call, dict)]
    assert first == second == third != fresh


def test_tensorboard_reads_back(tmp_path):
    """The event file, read by tensorboardX's own record format: length, crc, protobuf, crc."""
    pytest.importorskip("tensorboardX")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = open_trackers(["tensorboard"], tmp_path, {}, start, no_warning)
        for step in steps:
            trackers.log(step, {"train/loss": 1 / step})
        trackers.close()
    points = [
        point for path in sorted((tmp_path / "tensorboard").iterdir()) for point in events(path)
    ]
    assert [(step, tag) for step, tag, _ in points] == [(s, "train/loss") for s in (1, 2, 3, 3, 4)]
    assert [value for *_, value in points] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3, 1 / 4])


def events(path):
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_before_the_run(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)
    with pytest.raises(
        InputError, match=rf"is not installed, which this needs; pip install 'llama-jax\[{name}\]'"
    ):
        require_trackers([name])
    with pytest.raises(InputError):
        open_trackers([name], tmp_path, {}, 0, no_warning)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker():
    with pytest.raises(
        InputError, match="tracker 'tensorbord' is unknown; tensorboard, wandb, trackio expected"
    ):
        require_trackers(["tensorbord"])


def test_a_tracker_that_cannot_start_is_left_out(fakes, tmp_path, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    warnings = []
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {}, 0, warnings.append)
    trackers.log(1, {"a": 1.0})
    assert warnings == [
        "warning: wandb: ConnectionError: no network at all; training continues without"
    ]
    assert fakes["trackio"][-1] == ({"a": 1.0}, {"step": 1})


def test_a_tracker_that_fails_is_warned_of_once_and_tried_again(fakes, tmp_path):
    warnings = []
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {}, 0, warnings.append)
    working, broken = FakeRun.log, True

    def flaky(self, metrics, **options):
        if broken and "step" in metrics:
            raise OSError(28, "No space left on device")
        working(self, metrics, **options)

    FakeRun.log = flaky
    try:
        trackers.log(1, {"a": 1.0})
        trackers.log(2, {"a": 2.0})
        broken = False
        trackers.log(3, {"a": 3.0})
    finally:
        FakeRun.log = working
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert fakes["wandb"][-1] == ({"a": 3.0, "step": 3}, {})
    assert [options["step"] for _, options in fakes["trackio"][1:]] == [1, 2, 3]


def test_an_unwritable_directory_for_tensorboard_is_a_warning(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("a file where a directory should be")
    warnings = []
    trackers = open_trackers(["tensorboard"], tmp_path, {}, 0, warnings.append)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert len(warnings) == 1
