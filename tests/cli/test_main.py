"""`python -m llama_jax VERB`, the manners that all verbs share, and where compiled programs are kept."""

import os
import stat
import subprocess
import sys

import pytest

import llama_jax
from llama_jax.cli.main import run_verb
from llama_jax.cli.program import run_program


def as_module(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage(arguments, capsys):
    assert run_verb(arguments) == 0
    out = capsys.readouterr().out
    assert llama_jax.__version__ in out
    assert all(f"  {verb} " in out for verb in ("train", "infer", "eval"))


def test_version(capsys):
    assert run_verb(["--version"]) == 0
    assert capsys.readouterr().out == f"{llama_jax.__version__}\n"


@pytest.mark.parametrize(("verb", "near"), [("inferr", "infer"), ("evaluate", "eval"), ("trian", "train"), ("xyz", "train")])
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


KEEP = """if True:
    import os, pathlib
    if "NOBODY" in os.environ:  # as a container's user whom the system does not know
        pathlib.os.path.expanduser = lambda path: path
    from llama_jax.cli.compilation import keep_compiled_programs
    keep_compiled_programs()
    import jax
    print(jax.config.jax_compilation_cache_dir)
"""


def cache_directory(**environment) -> str:
    """Where a program of this environment keeps what it compiled."""
    given = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | environment
    done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True, timeout=60, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled_programs_are_kept_for_their_owner_only(tmp_path):
    kept = tmp_path / "llama_jax" / "compiled"
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path)) == str(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    kept.chmod(0o755)  # as something else may have made it
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path)) == str(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert cache_directory(XDG_CACHE_HOME="", HOME=str(tmp_path)) == str(tmp_path / ".cache" / "llama_jax" / "compiled")


def test_a_choice_of_the_user_wins(tmp_path):
    assert cache_directory(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(tmp_path / "mine")


def test_nowhere_to_keep_them(tmp_path):
    """A home that is no directory: compile anew each time."""
    (tmp_path / "file").touch()
    assert cache_directory(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
    assert cache_directory(XDG_CACHE_HOME="", NOBODY="1") == "None"
