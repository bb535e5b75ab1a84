"""`python -m llama_jax VERB`, the manners that all verbs share, and where compiled programs are
kept.
"""

import os
import stat
import subprocess
import sys

import jax
import pytest

import llama_jax
from llama_jax.cli.distributed import keep_compiled_programs
from llama_jax.cli.main import run_program, run_verb


def as_module(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama_jax", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage(arguments, capsys):
    assert run_verb(arguments) == 0
    out = capsys.readouterr().out
    assert llama_jax.__version__ in out
    assert all(f"  {verb} " in out for verb in ("train", "infer", "eval"))


def test_version(capsys):
    assert run_verb(["--version"]) == 0
    assert capsys.readouterr().out == f"{llama_jax.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "near"),
    [("inferr", "infer"), ("evaluate", "eval"), ("trian", "train"), ("xyz", "train")],
)
def test_unknown_verb(verb, near, capsys):
    assert run_program(lambda: run_verb([verb])) == 2
    assert capsys.readouterr().err == f"error: verb {verb!r} is unknown; the nearest is {near}\n"


def test_as_a_module():
    done = as_module("infer", "--modle", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument '--modle' is unknown; the nearest is --model\n"


@pytest.mark.parametrize("verb", ["infer", "eval", "train"])
def test_help_names_the_options_and_needs_no_jax(verb):
    code = f"""if True:
        import sys
        from llama_jax.cli.main import run_verb
        try:
            run_verb([{verb!r}, "--help"])
        finally:
            assert "jax" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


@pytest.fixture
def cache_directory(monkeypatch):
    """Where a program of an environment keeps what it compiled: a function of the variables."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def found(**environment: str) -> str | None:
        for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        jax.config.update(
            "jax_compilation_cache_dir", None
        )  # as JAX is without JAX_COMPILATION_CACHE_DIR
        keep_compiled_programs()
        return jax.config.jax_compilation_cache_dir

    yield found
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_for_their_owner_only(tmp_path, cache_directory):
    kept = tmp_path / "llama_jax" / "compiled"
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path)) == str(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    kept.chmod(0o755)  # as something else may have made it
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path)) == str(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert cache_directory(XDG_CACHE_HOME="", HOME=str(tmp_path)) == str(
        tmp_path / ".cache" / "llama_jax" / "compiled"
    )


def test_a_choice_of_the_user_wins(tmp_path):
    """As a process, whose JAX reads it."""
    code = (
        "from llama_jax.cli.distributed import keep_compiled_programs as keep; keep(); import jax; "
    )
    code += "print(jax.config.jax_compilation_cache_dir)"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "mine")), done.stderr


def test_nowhere_to_keep_them(tmp_path, cache_directory, monkeypatch):
    """A home that is no directory, or a user whom the system does not know, as in a container:
    compile anew each time.
    """
    (tmp_path / "file").touch()
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path / "file")) is None
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_directory(XDG_CACHE_HOME="") is None
