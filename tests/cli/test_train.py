"""train.py as people run it: stopped, killed, resumed, refused, piped.

Real processes for signals, pipes and exit statuses; elsewhere its main function, on so many of the
test's own devices.
"""

import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import yaml
from tiny_runs import (
    ROOT,
    child_environment,
    read_lines,
    read_state,
    snapshot,
    start_train,
    state_bytes,
    tiny_config,
    train,
    without_speed,
    write_corpus,
    write_yaml,
)

from llama_jax.cli.arguments import parse_train
from llama_jax.cli.main import run_program
from llama_jax.cli.train import main
from llama_jax.training.config import TrainConfig
from llama_jax.training.display import open_display
from llama_jax.training.loop import prepare
from llama_jax.training.step import Guard

STEPS = 30
STOP = 17  # no multiple of any interval


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def run(tmp_path, corpus):
    """A run of 30 steps that writes into the test's own directory."""
    return make_run(tmp_path, corpus)


def make_run(directory: pathlib.Path, corpus: pathlib.Path, **changes) -> TrainConfig:
    intervals = {"steps": STEPS, "eval_every": 10, "checkpoint_every": 5}
    config = tiny_config(directory / "run", corpus, run=intervals)
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in changes.items()
    }
    config = dataclasses.replace(config, **changed)
    write_yaml(directory / "tiny.yaml", config)
    return config


def arguments(config: TrainConfig, *more: str) -> list[str]:
    return ["--config", str(pathlib.Path(config.run.dir).parent / "tiny.yaml"), *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> TrainConfig:
    """The same run, finished in one go."""
    config = make_run(tmp_path_factory.mktemp("undisturbed"), corpus)
    with log_of(config).open("w") as log:
        train(arguments(config, "--compute.remat", "auto"), stdout=log, stderr=log)
    return config


def log_of(config: TrainConfig) -> pathlib.Path:
    """Where the output of the undisturbed run is."""
    return pathlib.Path(config.run.dir).parent / "log"


@pytest.fixture
def finished(tmp_path, undisturbed, corpus) -> TrainConfig:
    """A copy of the finished run, to be spoilt."""
    shutil.copytree(undisturbed.run.dir, tmp_path / "run")
    return make_run(tmp_path, corpus)


def assert_same_end(config: TrainConfig, reference: TrainConfig, stopped: int = 0) -> None:
    """Both runs ended in the same state, bit by bit, by way of the same metrics.

    Args:
      config: the run that was disturbed.
      reference: the one that was not.
      stopped: step at which the first was asked to end: it did not stop to evaluate.
    """
    steps = reference.run.steps
    ours, theirs = (state_bytes(read_state(c, steps)) for c in (config, reference))
    # Step; parameters and two moments; the count of the optimizer; the guard.
    assert len(ours) == 1 + 3 * 11 + 1 + len(Guard._fields)
    assert [path for path in ours if ours[path] != theirs[path]] == []
    lines, expected = (
        without_speed(read_lines(pathlib.Path(c.run.dir))) for c in (config, reference)
    )
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in expected:
        for name in [
            name for name in line if name.startswith("held_out/") and line["step"] == stopped
        ]:
            del line[name]
    assert lines == expected


def stop_at(config: TrainConfig, step: int) -> None:
    """What a program does that uses the library: stops where it likes."""
    given = parse_train(arguments(config), pathlib.Path())
    with open(os.devnull, "w") as nowhere:
        summary = prepare(given, open_display(nowhere, interactive=False)).train(
            should_stop=lambda at: at == step
        )
    assert (summary.step, summary.steps, summary.evaluation, summary.saved) == (
        step,
        config.run.steps,
        None,
        True,
    )


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Reads a run's output until the line of a step."""
    for line in process.stdout:
        if re.match(rf" *{step}/", line):
            return
    raise AssertionError(process.stderr.read())


def in_process(capsys, *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of train.py's main function."""
    status = run_program(lambda: main(list(words)))
    return status, *capsys.readouterr()


# Going on


@pytest.mark.slow  # the two below do the same, one in processes and one by the library
def test_a_stopped_run_goes_on_in_another_process_to_the_same_bits(run, undisturbed, on_devices):
    on_devices(1)
    stop_at(run, STOP)
    output = train(arguments(run)).stdout
    assert f"resumed from step {STOP}" in output
    assert_same_end(run, undisturbed)


def test_the_same_with_accumulation_on_two_devices(tmp_path, corpus, on_devices, capsys):
    on_devices(2)
    runs = []
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
        shorter = {"steps": 8, "eval_every": 0}
        changes = {"run": shorter, "data": {"accumulation": 2}, "mesh": {"data": 1, "fsdp": 2}}
        runs.append(make_run(tmp_path / name, corpus, **changes))
    status, output, _ = in_process(capsys, *arguments(runs[0]))
    assert status == 0
    assert "2 x cpu (data 1 x fsdp 2 x context 1 x tensor 1)" in output
    stop_at(runs[1], 6)
    assert in_process(capsys, *arguments(runs[1]))[0] == 0
    assert_same_end(runs[1], runs[0])


def test_sigterm_saves_kill_9_loses_nothing_that_was_saved_and_the_same_command_ends_the_run(
    run, undisturbed
):
    with start_train(arguments(run)) as process:
        wait_for_step(process, 2)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert errors == "SIGTERM: saving after this step; Ctrl-C within 5 s ends at once\n"
    reached = read_lines(pathlib.Path(run.run.dir))[-1]["step"]
    assert 2 <= reached < STEPS
    assert f"{reached} of {STEPS}" in output
    assert (
        max(int(path.name) for path in pathlib.Path(run.run.dir, "checkpoints").iterdir())
        == reached
    )
    source = random.Random()
    moments = (source.randint(reached + 1, max(reached + 1, STEPS - 3)), source.random() / 10)
    print("killed at", moments)
    with start_train(arguments(run)) as process:
        wait_for_step(process, moments[0])
        time.sleep(moments[1])
        process.kill()
    train(arguments(run))
    assert_same_end(run, undisturbed, stopped=reached)


# Nothing left to do, more steps, anew


def test_a_finished_run_is_left_alone(undisturbed, capsys):
    before = snapshot(pathlib.Path(undisturbed.run.dir))
    status, output, errors = in_process(capsys, *arguments(undisturbed))
    assert re.fullmatch(
        rf"{undisturbed.run.dir} has {STEPS} of {STEPS} steps: nothing left to do\. .*\n", output
    )
    assert (status, errors) == (0, "")
    assert snapshot(pathlib.Path(undisturbed.run.dir)) == before


def test_a_finished_run_of_another_model_is_not_this_one(undisturbed, capsys):
    before = snapshot(pathlib.Path(undisturbed.run.dir))
    status, _, errors = in_process(capsys, *arguments(undisturbed, "--model.layers", "3"))
    assert status == 2
    assert "model.layers" in errors
    assert snapshot(pathlib.Path(undisturbed.run.dir)) == before


@pytest.mark.parametrize("how", [pytest.param("all_gather", marks=pytest.mark.slow), "ring"])
def test_rows_over_devices_train_the_same_model(run, undisturbed, how, capsys, on_devices):
    """Long sequences cut over the mesh, held-out loss and samples included; then on from what they
    left with more steps on one device, with another rhythm and another learning rate, which shows
    in the step after the next.
    """
    words = [
        "--compute.context_attention",
        how,
        "--run.sample_prompts",
        '["<3> al"]',
        "--run.sample_tokens",
        "8",
    ]
    words += ["--run.steps", "12", "--optimizer.schedule_steps", str(STEPS)]
    mesh = ["--mesh.data", "2", "--mesh.tensor", "2", "--mesh.context", "2"]
    status, first, _ = in_process(capsys, *arguments(run, *words, *mesh))
    assert status == 0
    assert "data 2 x fsdp 1 x context 2 x tensor 2" in first
    assert "sample    '<3> al'" in first
    words = [
        "--run.steps",
        "15",
        "--run.log_every",
        "13",
        "--data.accumulation",
        "1",
        "--optimizer.learning_rate",
        "1e-3",
    ]
    on_devices(1)
    status, then, _ = in_process(capsys, *arguments(run, *words))
    assert status == 0
    assert "resumed from step 12" in then
    assert re.search(
        r"^changed   optimizer\.learning_rate: [0-9.e-]+ -> 0\.001$", then, re.MULTILINE
    )
    assert re.search(r"^changed   the learning rate jumps at step 13: ", then, re.MULTILINE)
    kept = yaml.safe_load(
        pathlib.Path(run.run.dir, "config_history", "until_step_12.yaml").read_text()
    )
    assert (
        kept["run"]["steps"]
        == 12
        < yaml.safe_load(pathlib.Path(run.run.dir, "config.yaml").read_text())["run"]["steps"]
    )
    lines, expected = (
        [x for x in read_lines(pathlib.Path(c.run.dir)) if "event" not in x]
        for c in (run, undisturbed)
    )
    assert [line["step"] for line in lines] == [*range(1, 14), 15]
    for name in ("train/loss", "held_out/loss", "train/gradient_norm"):
        pairs = [
            (line[name], other[name])
            for line, other in zip(lines[:13], expected)
            if name in line and name in other
        ]
        assert pairs
        np.testing.assert_allclose(
            *zip(*pairs), rtol=1e-4 if name == "train/gradient_norm" else 1e-5
        )


def test_overwrite_starts_anew_on_the_prepared_data(finished, undisturbed, on_devices, capsys):
    on_devices(1)
    directory = pathlib.Path(finished.run.dir)
    before = snapshot(directory / "data")
    status, output, _ = in_process(capsys, *arguments(finished, "--run.overwrite", "true"))
    assert status == 0
    assert "from the start" in output
    assert "encoding" not in output
    assert snapshot(directory / "data") == before
    assert_same_end(finished, undisturbed)
    assert (
        parse_train(["--config", str(directory / "config.yaml")], pathlib.Path()).run.overwrite
        is False
    )


def test_overwrite_with_a_mistake_loses_nothing(finished, capsys):
    before = snapshot(pathlib.Path(finished.run.dir))
    words = ("--run.overwrite", "true", "--mesh.data", "8")  # sequences do not divide by it
    assert in_process(capsys, *arguments(finished, *words))[0] == 2
    assert snapshot(pathlib.Path(finished.run.dir)) == before


# What a run leaves behind


def test_metrics_are_one_object_a_step(undisturbed):
    lines = read_lines(pathlib.Path(undisturbed.run.dir))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "held_out/loss" in line] == [10, 20, 30]
    assert [line["train/tokens"] for line in lines] == [
        4 * 32 * step for step in range(1, STEPS + 1)
    ]
    assert all(line["speed/step_seconds"] > 1e-4 for line in lines)


def test_remat_auto_is_none_on_a_cpu_and_the_run_says_so(undisturbed):
    heading = next(
        line for line in log_of(undisturbed).read_text().splitlines() if line.startswith("model ")
    )
    assert heading.endswith("float32 compute, remat none")
    written = yaml.safe_load((pathlib.Path(undisturbed.run.dir) / "config.yaml").read_text())
    assert written["compute"]["remat"] == "none"


def test_config_parses_back_equal(undisturbed):
    path = pathlib.Path(undisturbed.run.dir) / "config.yaml"
    assert parse_train(["--config", str(path)], pathlib.Path()) == undisturbed


def test_newest_checkpoints_are_kept(undisturbed):
    assert sorted(
        path.name for path in pathlib.Path(undisturbed.run.dir, "checkpoints").iterdir()
    ) == ["20", "25", "30"]


# Another run in the same directory


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model.dim", "64"], "model.dim"),
        (["--model.rope_theta", "500000"], "model.rope_theta"),
        (
            ["--model.rope_scaling.rope_type", "linear", "--model.rope_scaling.factor", "2"],
            "model.rope_scaling",
        ),
        (["--data.seed", "1"], "data.seed"),
        (["--data.batch_size", "8"], "data.batch_size"),
        (["--data.length", "16"], "data.length"),
        (["--data.held_out_fraction", "0.3"], "data.held_out_fraction"),
        (["--data.vocab_size", "300"], "data.vocab_size"),
        (["--data.tokenizer", "OTHER/tokenizer.model"], "data.tokenizer"),
        (["--data.paths", "[OTHER]"], "data.paths"),
    ],
)
def test_going_on_with_another_run_is_refused(finished, tmp_path, words, key, capsys):
    other = tmp_path / "other"
    write_corpus(other, 19)
    shutil.copy(pathlib.Path(finished.run.dir, "tokenizer.model"), other)
    with (other / "tokenizer.model").open("ab") as file:
        file.write(
            b"\x28\x00"
        )  # a field that SentencePiece does not know: the same pieces in another file
    words = [word.replace("OTHER", str(other)) for word in words]
    before = snapshot(pathlib.Path(finished.run.dir))
    status, output, errors = in_process(
        capsys,
        *arguments(
            finished,
            "--run.steps",
            "50",
            "--mesh.tensor",
            "2",
            "--mesh.fsdp",
            "4",
            "--mesh.data",
            "1",
            *words,
        ),
    )
    assert (status, output) == (2, "")
    assert re.fullmatch(
        rf"error: .* holds a run with {re.escape(key)}[ .].* was asked for; .*\n", errors
    )
    assert snapshot(pathlib.Path(finished.run.dir)) == before


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optimizer.learning_rat", "1"],
            "key 'optimizer.learning_rat' is unknown; the nearest is optimizer.learning_rate",
        ),
        (["--run.steps", "many"], "run.steps: 'many' given, a whole number expected"),
        (
            ["--model", "llama3.2-1x"],
            "preset 'llama3.2-1x' is unknown; the nearest are llama3.2-1b",
        ),
        (["--mesh.data", "3"], "mesh data 3 .* does not make up the 8 devices"),
        (
            ["--mesh.data", "8"],
            "data.batch_size: micro-batches of 4 sequences given; a multiple of .* expected",
        ),
        (
            ["--data.batch_size", "6", "--data.accumulation", "4"],
            "data.accumulation: 4 given, a divisor of data.batch_size",
        ),
        (["--mesh.tensor", "8"], "kv_heads|heads"),
        (
            ["--mesh.context", "8", "--data.length", "24"],
            r"data.length: 24 given, a multiple of 2 \* mesh.context \(16\) expected",
        ),
        (["--compute.context_attention", "spiral"], "context_attention"),
        (
            ["--data.tokenizer", "TOKENIZER", "--model.vocab_size", "100"],
            r"model.vocab_size: 100 given, at least 320",
        ),
        (
            ["--data.tokenizer", "/nowhere/tokenizer.model"],
            "/nowhere/tokenizer.model: no such file",
        ),
        (["--compute.attention", "fast"], "attention"),
        (["--compute.remat", "some"], "remat"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_mistake_is_one_line_and_leaves_no_trace(run, undisturbed, words, message, there, capsys):
    directory = pathlib.Path(run.run.dir)
    if there:
        directory.mkdir()
        (directory / "notes.txt").write_text("mine")
    before = snapshot(directory.parent)
    words = [word.replace("TOKENIZER", f"{undisturbed.run.dir}/tokenizer.model") for word in words]
    mesh = [] if "mesh" in " ".join(words) else ["--mesh.data", "4", "--mesh.tensor", "2"]
    status, output, errors = in_process(capsys, *arguments(run, *mesh, *words))
    assert (status, output) == (2, "")
    assert re.fullmatch(rf"error: .*({message}).*\n", errors), errors
    assert snapshot(directory.parent) == before


@pytest.mark.parametrize("directory", ["file/run", "file", "/proc/run"])
def test_a_directory_that_cannot_be_written(tmp_path, run, directory, capsys):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    words = ("--run.dir", str(tmp_path / directory), "--mesh.data", "4", "--mesh.tensor", "2")
    status, output, errors = in_process(capsys, *arguments(run, *words))
    assert (status, output) == (2, "")
    assert re.fullmatch(r"error: run\.dir: .*; name a writable directory\n", errors)
    assert snapshot(tmp_path) == before


def test_a_mistake_in_a_real_process(run):
    done = train(arguments(run, "--data.paths", "[/nowhere]"), status=2)
    assert done.stdout == ""
    assert re.fullmatch(r"error: /nowhere: .*\n", done.stderr)


# The disk, the terminal, the default


def test_a_disk_that_fails_is_told_and_training_goes_on(run, undisturbed):
    # Metrics and config fit under the limit, which stands for a full disk; checkpoints do not.
    fixed = ("--optimizer.schedule_steps", str(STEPS))  # the very programs of the other run
    # Compiled programs are read, but none is written: the cache must not be left with halves of
    # them.
    environment = child_environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    shutil.copytree(f"{undisturbed.run.dir}/data", f"{run.run.dir}/data")
    with start_train(arguments(run, "--run.steps", "12", *fixed), env=environment) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 5
    assert "ERROR" not in errors  # TensorStore's own threads cannot be kept from printing
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    reasons = [
        re.search(r"checkpoints/(\d+) was not written: (\w+ \w+ \w+)", line).groups()
        for line in warnings
    ]
    assert {reason for _, reason in reasons} == {"File too large"}
    steps = [
        int(step) for step, _ in reasons
    ]  # each save that failed is tried again, first a step after it is known
    assert steps[0] == 5
    assert steps[-2:] == [12, 12]
    assert [line["step"] for line in read_lines(pathlib.Path(run.run.dir))] == list(range(1, 13))
    assert "12 of 12" in output


def test_output_into_a_file_has_no_control_codes(undisturbed):
    text = log_of(undisturbed).read_text()
    assert f"{STEPS}/{STEPS}" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f]", text)


def test_a_reader_that_goes_away_ends_it_quietly(run):
    with start_train(arguments(run, "--run.steps", "100000")) as process:
        assert process.stdout.readline() != ""
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 141


def test_without_arguments_it_is_the_debug_run(tmp_path):
    shown = train(["--print_config"], cwd=tmp_path).stdout
    values = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    resolved = yaml.safe_load(shown)
    assert resolved["run"]["dir"] == "runs/debug"
    for section, keys in values.items():
        assert keys.items() <= resolved[section].items()
    assert list(tmp_path.iterdir()) == []
