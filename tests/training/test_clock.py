"""Where the time goes: the ledger of one program, and the goodput of a run over several."""

import contextlib
import json

import jax.numpy as jnp
import pytest
from tiny_runs import tiny_config

from llama_jax.parallel.chips import peak_flops
from llama_jax.training.goodput import Clock, Goodput, GoodputLog, read_goodput
from llama_jax.training.run_log import StepLog, mfu_line, total_peak
from llama_jax.training.step import StepMetrics


class Watch:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_every_second_is_in_one_part():
    watch = Watch()
    clock = Clock(watch)
    with clock("data"):
        watch.pass_by(2)
    watch.pass_by(5)
    with clock("save"):
        watch.pass_by(1)
        with clock("eval"):
            watch.pass_by(3)
    with contextlib.suppress(KeyError), clock("data"):
        watch.pass_by(0.5)
        raise KeyError
    assert clock.take() == pytest.approx({"data": 2.5, "save": 1, "eval": 3, "step": 5})
    watch.pass_by(7)
    assert clock.take() == pytest.approx({"step": 7})


def test_what_is_unclaimed_is_compiling():
    watch = Watch()
    clock = Clock(watch)
    with clock("data"):
        watch.pass_by(2)
    watch.pass_by(30)
    clock.claim("compile")
    watch.pass_by(4)
    assert clock.take() == pytest.approx({"data": 2, "compile": 30, "step": 4})


def test_goodput_over_a_crash(tmp_path):
    """80 s of updates, 30 of them lost to a crash, 10 s of saving, 10 s down, 100 s in all: half
    was of use.
    """
    path, watch = tmp_path / "goodput.jsonl", Watch()
    log = GoodputLog(path, 0, no_warning, watch)
    watch.pass_by(60)
    assert log.add(10, {"step": 50.0, "save": 10.0}) == pytest.approx(50 / 60)
    watch.pass_by(30)
    assert log.add(20, {"step": 30.0}) == pytest.approx(80 / 90)
    log.close()
    watch.pass_by(10)  # killed after step 20, whose checkpoint was not written
    again = GoodputLog(path, 10, no_warning, watch)
    assert again.goodput == Goodput(100, 50, 30, {"save": 10}, 10, 2)
    assert again.goodput.share == pytest.approx(0.5)
    watch.pass_by(30)
    assert again.add(20, {"step": 30.0}) == pytest.approx(80 / 130)
    assert read_goodput(path) == again.goodput
    words = again.goodput.lines()
    assert (
        words["goodput"]
        == "61.5%: 1m 20s in updates that were kept, of 2m 10s since the start of the run "
        "(2 starts)"
    )
    assert words["other time"] == "save 7.7%, redone 23.1%, start-up and down 7.7%"


def test_a_clock_set_back_makes_no_share_above_one(tmp_path):
    watch = Watch()
    log = GoodputLog(tmp_path / "goodput.jsonl", 0, no_warning, watch)
    watch.pass_by(-3600)
    assert log.add(1, {"step": 20.0}) <= 1
    assert log.goodput.wall >= 20


def test_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "goodput.jsonl"
    path.write_text(
        '{"time": 5, "event": "start", "step": 0}\n[1]\n{"time": "x", "step": '
        '1}\n{"time": 9, "step": 1, "seconds": {"step": 4'
    )
    log = GoodputLog(path, 0, no_warning, lambda: 10.0)
    assert log.goodput == Goodput(5, 0, 0, {}, 5, 2)
    assert (
        json.loads(path.read_text().splitlines()[-1])["event"] == "start"
    )  # not glued to the torn line


def test_a_disk_that_fails_is_told_of_once(tmp_path):
    warnings = []
    (tmp_path / "file").write_text("")
    log = GoodputLog(tmp_path / "file" / "goodput.jsonl", 0, warnings.append)
    assert log.add(1, {"step": 1.0}) is not None
    assert len(warnings) == 1
    assert "goodput cannot be written" in warnings[0]
    assert read_goodput(tmp_path / "none") == Goodput()
    assert Goodput().lines() == {}


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 2307 / 2),
        ("TPU v3", 61.5),
    ],
)
def test_published_peaks(kind, tera):
    assert peak_flops(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA GeForce RTX 4090", "TPU"])
def test_no_peak_is_invented(kind):
    assert peak_flops(kind) is None


def figures() -> StepMetrics:
    return StepMetrics(*map(jnp.float32, (2.0, 1.0, 1e-3, 128.0)), jnp.bool_(False), {})


def test_mfu_is_its_formula(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    chips = ["TPU v4"] * 2
    log = StepLog(config, lambda step: step * 128, chips)
    for _ in range(3):
        log.add(figures())
    record = log.record(3)
    model = config.model
    matmul = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 320 * 32
    flops = 6 * matmul + 6 * model.layers * 32 * config.data.length
    assert record.mfu == pytest.approx(flops * record.tokens_per_second / (2 * 275e12), rel=1e-6)
    assert record.flat()["speed/mfu"] == record.mfu
    assert "peak 275 TFLOP/s a device" in mfu_line(config, chips)


def test_no_mfu_on_a_cpu(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    log = StepLog(config, lambda step: step * 128, ["cpu"])
    log.add(figures())
    assert log.record(1).mfu is None
    assert mfu_line(config, ["cpu"]) == "n/a: the peak of cpu is not known"
    assert total_peak(["TPU v4", "cpu"]) is None


def test_records_tell_the_time_split_and_the_goodput(tmp_path):
    watch = Watch()
    clock = Clock(watch)
    goodput = GoodputLog(tmp_path / "goodput.jsonl", 0, no_warning, watch)
    log = StepLog(
        tiny_config(tmp_path, tmp_path), lambda step: step * 128, clock=clock, goodput=goodput
    )
    watch.pass_by(20)
    log.add(figures())
    watch.pass_by(8)
    log.add(figures())
    with clock("data"):
        watch.pass_by(2)
    record = log.record(2)
    assert record.time == pytest.approx({"compile": 20, "step": 8, "data": 2})
    assert record.goodput == pytest.approx(8 / 30)
    assert record.flat()["speed/time_data"] == pytest.approx(2)
    with clock("eval"):
        watch.pass_by(6)
    watch.pass_by(4)
    log.close(2)
    assert goodput.goodput == Goodput(
        40, 8, 0, {"compile": 20, "data": 2, "eval": 6, "save": 4}, 0, 1
    )
