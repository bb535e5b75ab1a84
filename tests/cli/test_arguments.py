"""The command line of train.py: what it accepts, and the one line it says otherwise."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import yaml

from llama_jax.cli.arguments import parse_train, to_yaml
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import PRESETS
from llama_jax.training.config import TrainConfig

MODEL = """
model:
  vocab_size: 4096
  dim: 64
  layers: 2
  heads: 4
  kv_heads: 2
  head_dim: 16
  ffn_dim: 128
  norm_eps: 1e-5
  rope_theta: 1e4
  rope_scaling: null
  context_length: 256
  tied_head: true
"""
BASE = "run: {steps: 300}\noptimizer: {learning_rate: 1e-4}\n" + MODEL


@pytest.fixture
def default(tmp_path) -> Path:
    return write(tmp_path, "base.yaml", BASE)


@pytest.fixture(autouse=True)
def _without_type_checks(monkeypatch):
    """Leaves wrong types to the code under test; otherwise the checks of the test runner come
    first.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def line_of(arguments, default) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(InputError) as caught:
        parse_train(arguments, default)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(default))
    return str(caught.value)


def test_the_default_file(default):
    config = parse_train([], default)
    assert config.run.steps == 300
    assert config.optimizer.learning_rate == 1e-4
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.model == LlamaConfig(4096, 64, 2, 4, 2, 16, 128, 1e-5, 1e4, None, 256, True)
    assert config.data == TrainConfig(model=config.model).data


@pytest.mark.parametrize(
    "words",
    [
        ["--model.dim", "128", "--optimizer.learning_rate", "2e-4"],
        ["--model.dim=128", "--optimizer.learning_rate=2e-4"],
        ["model.dim=128", "optimizer.learning_rate=2e-4"],
    ],
)
def test_overrides_in_three_spellings(default, words):
    config = parse_train(words, default)
    assert (config.model.dim, config.optimizer.learning_rate) == (128, 2e-4)


def test_values_of_every_kind(default):
    words = [
        "--run.overwrite",
        "true",
        "--run.dir",
        "runs/5",
        "--data.paths",
        "[a.txt, b]",
        "--data.tokenizer",
        "t=1.model",
        "--mesh.data",
        "-1",
        "--compute.dtype",
        "bfloat16",
        "--optimizer.weight_decay",
        "0",
    ]
    config = parse_train(words, default)
    assert config.run.overwrite is True
    assert config.run.dir == "runs/5"
    assert config.data.paths == ("a.txt", "b")
    assert config.data.tokenizer == "t=1.model"
    assert config.mesh.data == -1
    assert config.compute.dtype == "bfloat16"
    assert config.optimizer.weight_decay == 0.0
    assert parse_train([*words, "--data.tokenizer", "null"], default).data.tokenizer is None


def test_steps_to_trace_in_every_spelling(default, tmp_path):
    """Also as YAML 1.1 would read as 615, ten minutes and fifteen seconds."""
    named = write(tmp_path, "traced.yaml", "run: {profile: 10:15}\n")
    spellings = ["--profile 10:15", "--profile=10:15", "--run.profile 10:15", "run.profile=10:15"]
    for words in spellings:
        config = parse_train(words.split(), default)
        assert config.run.profile == "10:15"
        again = write(tmp_path, "again.yaml", to_yaml(config))
        assert parse_train(["--config", str(again)], default) == config
    assert (
        parse_train(["--config", str(default), "--config", str(named)], default).run.profile
        == "10:15"
    )
    assert parse_train(["--profile", "null"], default).run.profile is None
    prompts = parse_train(
        ["--run.sample_prompts", '["def ", "1:30", "The cat"]'], default
    ).run.sample_prompts
    assert prompts == ("def ", "1:30", "The cat")
    line = line_of(["--profile", "15:10"], default)
    assert (
        line == "run.profile: '15:10' given, FIRST:LAST from 1 to run.steps (300), such as "
        "10:15, or null expected"
    )
    assert "--profile: nothing given" in line_of(["--profile"], default)


def test_flags_win_over_files_and_later_over_earlier(default, tmp_path):
    more = write(tmp_path, "more.yaml", "run: {steps: 700, seed: 1}\n")
    config = parse_train(
        ["--run.seed", "3", "--config", str(default), "--config", str(more), "--run.seed=4"],
        default,
    )
    assert (config.run.steps, config.run.seed) == (700, 4)
    assert parse_train(["--run.steps", "900", f"--config={default}"], default).run.steps == 900


def test_a_given_file_replaces_the_default(tmp_path):
    other = write(tmp_path, "other.yaml", MODEL)
    assert (
        parse_train(["--config", str(other)], tmp_path / "missing.yaml").run.steps
        == TrainConfig.__dataclass_fields__["run"].default.steps
    )


def test_a_preset_in_place_of_a_model(default, tmp_path):
    words = ["--model", "llama3.2-1b"]
    assert parse_train(words, default).model == PRESETS["llama3.2-1b"]
    named = write(tmp_path, "preset.yaml", "model: llama2-7b\n")
    config = parse_train(["--config", str(named), "--model.layers", "2"], default)
    assert config.model == dataclasses.replace(PRESETS["llama2-7b"], layers=2)


def test_rope_scaling_by_its_parts(default):
    words = ["--model.rope_scaling.rope_type", "linear", "--model.rope_scaling.factor", "2"]
    assert parse_train(words, default).model.rope_scaling == RopeScaling("linear", 2.0)
    words = ["--model=llama3.1-8b", "--model.rope_scaling.factor=4"]
    assert parse_train(words, default).model.rope_scaling == RopeScaling(
        "llama3", 4.0, 1.0, 4.0, 8192
    )
    assert parse_train([*words, "--model.rope_scaling=null"], default).model.rope_scaling is None


# Refusals


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--optimizer.learning_rat 2",
            ["optimizer.learning_rat'", "nearest is optimizer.learning_rate"],
        ),
        ("--learning_rate 3", ["'learning_rate'", "nearest is optimizer.learning_rate"]),
        ("--optimiser.beta1 0.9", ["nearest is optimizer.beta1"]),
        ("--zzz 3", ["'zzz'", "sections are run, model"]),
        ("--model.rope_scaling.factr 3", ["model.rope_scaling.factor"]),
        ("--run.steps abc", ["run.steps: 'abc' given, a whole number expected"]),
        ("--run.steps 1.5", ["run.steps: '1.5' given, a whole number expected"]),
        ("--run.steps 0", ["run.steps: 0 given", "from 1"]),
        ("--run.steps", ["run.steps", "a value expected"]),
        ("--run.steps --run.seed 3", ["run.steps", "a value expected"]),
        ("--run 5", ["run: '5' given, a mapping of dir, steps"]),
        ("--run.overwrite maybe", ["run.overwrite: 'maybe' given, true or false expected"]),
        (
            "--optimizer.learning_rate nan",
            ["optimizer.learning_rate: 'nan' given, a number expected"],
        ),
        ("--data.paths a.txt", ["data.paths: 'a.txt' given, a list such as [a, b] expected"]),
        (
            "--compute.dtype half",
            ["compute.dtype: 'half' given, auto or float32 or bfloat16 expected"],
        ),
        ("--model llama9", ["llama9", "nearest are"]),
        ("--model.kv_heads 3", ["model.kv_heads: 3 given", "a divisor of heads (4)"]),
        (
            "--model.rope_scaling.rope_type yarn --model.rope_scaling.factor 2",
            ["model.rope_scaling.rope_type: 'yarn' given"],
        ),
        (
            "--model.rope_scaling.rope_type linear",
            ["model.rope_scaling: {'rope_type': 'linear'} given", "factor"],
        ),
        ("--data.length 512", ["data.length: 512 given", "model.context_length (256)"]),
        ("--mesh.fsdp -1", ["mesh.fsdp: -1 given"]),
        ("train", ["'train'", "--section.key VALUE"]),
        ("--config nowhere.yaml", ["nowhere.yaml", "No such file"]),
        ("--config /", ["/: cannot be read"]),
    ],
)
def test_a_refusal_is_one_line_that_names_the_key(default, words, parts):
    line = line_of(words.split(), default)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modle: {dim: 3}", ["'modle'", "nearest is model"]),
        ("run: {stepps: 3}", ["'run.stepps'", "nearest is run.steps"]),
        ("run: {steps: abc}", ["run.steps: 'abc' given"]),
        ("run: {steps: null}" + MODEL, ["run.steps: None given"]),
        ("run: [1, 2]", ["run: [1, 2] given, a mapping of dir"]),
        (
            "run: {steps: !!python/object/apply:os.system ['touch PWNED']}",
            ["line 1", "python/object/apply"],
        ),
        ("!!python/object/new:os.system [echo]", ["line 1", "python/object/new"]),
        ("run: {steps: [\n", ["line 2", "plain YAML"]),
        ("run: {steps: 1}\nrun: {seed: 2}\n", ["line 2", "'run' is given twice"]),
        ("run: {steps: 1, steps: 2}\n", ["'steps' is given twice"]),
        ("- 1\n", ["[1] given, a mapping of sections"]),
        ("", ["None given, a mapping of sections"]),
        ("{1: 2}", ["key '1' is unknown"]),
        ("run: &a {dir: *a}", ["base.yaml"]),
        ("? [a, b]\n: 1", ["base.yaml"]),
        ("\x00", ["base.yaml", "plain YAML"]),
        ("[" * 5000, ["base.yaml", "plain YAML"]),
        ("run: {steps: 3}", ["model", "--model llama3.2-1b"]),
        ("model: {dim: 64}", ["model.vocab_size", "model.tied_head", "missing"]),
        ("run: {dir: '" + "x" * (1 << 20) + "'}", ["a config of at most"]),
    ],
)
def test_a_file_is_refused_in_one_line(tmp_path, monkeypatch, text, parts):
    monkeypatch.chdir(tmp_path)
    line = line_of([], write(tmp_path, "base.yaml", text))
    for part in parts:
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["base.yaml"]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "base.yaml").write_bytes(b"run: \xff\xfe")
    assert "UTF-8" in line_of([], tmp_path / "base.yaml")


def test_nested_aliases_are_refused_at_once(tmp_path):
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    text = "run:\n  dir: {" + ", ".join(rows) + "}\n"
    assert "an alias is not accepted" in line_of([], write(tmp_path, "bomb.yaml", text))


# Writing


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model", "llama3.1-8b"],
        ["--data.paths=[a, 'b c', é]", "--data.tokenizer=null", "--run.dir=runs/5"],
        ["--optimizer.eps=1e-15", "--run.dir=null", "--mesh.fsdp=2"],
        ["--run.dir=1e3", "--data.paths=['1', 'true']"],
    ],
)
def test_what_is_written_reads_back_equal(default, tmp_path, words):
    config = parse_train(words, default)
    again = write(tmp_path, "again.yaml", to_yaml(config))
    assert parse_train([], again) == config
    assert yaml.safe_load(to_yaml(config))["run"]["steps"] == 300


def test_print_config_prints_it_and_stops(default, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train(["--print_config", "--run.steps", "500"], default)
    assert caught.value.code == 0
    assert capsys.readouterr().out == to_yaml(parse_train(["--run.steps", "500"], default))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_key_with_meaning_and_default(default, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        parse_train([flag], default)
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, values in dataclasses.asdict(parse_train([], default)).items():
        for name in values:
            assert f"--{section}.{name} " in text
    assert "peak, reached at the end of the warm-up (type: float, default: 0.0003)" in text
    assert "steps between two comparisons of the copies of parameters" in text
    assert "name of a preset" in text


def test_help_imports_no_jax(default):
    code = f"""
import sys
from pathlib import Path
from llama_jax.cli.arguments import parse_train
try:
    parse_train(["--help"], Path({str(default)!r}))
finally:
    heavy = [name for name in ("jax", "orbax", "flax", "torch") if name in sys.modules]
    print(len(sys.modules), heavy, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    count, modules = done.stderr.split(maxsplit=1)
    assert done.returncode == 0
    assert modules.strip() == "[]"
    assert int(count) < 600
