"""How many functions of the package a reader goes through from a program to its compiled loop."""

import json
import pathlib
import subprocess
import sys

import pytest
from tiny_runs import ROOT, child_environment, tiny_config, write_corpus, write_yaml

# Runs a program of the checkout under a profiler. At the first call of the compiled program (a
# C++ object that JAX names by the function under it) it keeps the stack of named functions of the
# package; and it counts the functions and files that ran until then.
PROBE = """
import json, pathlib, runpy, sys
target, out, *arguments = sys.argv[1:]
package = str(pathlib.Path("llama_jax").absolute())
seen, found = set(), []

def profile(frame, event, argument):
    code = frame.f_code
    if not code.co_filename.startswith(package) or event != "call":
        return
    seen.add((code.co_filename, code.co_name))
    if code.co_qualname == target and not found:
        stack, caller = [], frame.f_back
        while caller is not None:
            inner = caller.f_code
            if inner.co_filename.startswith(package) and not inner.co_name.startswith("<"):
                stack.append(f"{pathlib.Path(inner.co_filename).stem}.{inner.co_qualname}")
            caller = caller.f_back
        found.append(stack[::-1])
        files = {name for name, _ in seen}
        counts = {"stack": found[0], "functions": len(seen), "files": len(files)}
        pathlib.Path(out).write_text(json.dumps(counts))

sys.argv = [arguments[0], *arguments[1:]]
sys.setprofile(profile)
try:
    runpy.run_path(arguments[0], run_name="__main__")
except SystemExit as error:
    sys.setprofile(None)
    raise
"""


def calls(target: str, out: pathlib.Path, *arguments: str) -> dict:
    """The stack under the first call of a function, and what ran before it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, target, str(out), *arguments],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 profiles differently")
def test_six_calls_from_train_to_the_compiled_step(tmp_path):
    config = tiny_config(tmp_path / "run", write_corpus(tmp_path / "text"), run={"steps": 2})
    path = str(write_yaml(tmp_path / "config.yaml", config))
    found = calls("sharded_step.<locals>.step", tmp_path / "calls", "train.py", "--config", path)
    assert found["stack"] == [
        "main.run_program",
        "train.main",
        "train.train",
        "loop.Run.train",
        "loop.Run._steps",
    ]
    print(found["functions"], found["files"])


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 profiles differently")
def test_seven_calls_from_infer_to_the_compiled_loop(tmp_path, tiny_directory):
    words = ["--model", str(tiny_directory), "--prompt", "The cat", "--max-new-tokens", "4"]
    found = calls("advance", tmp_path / "calls", "infer.py", *words)
    *calls_to_it, tracing = found["stack"]
    assert calls_to_it == [
        "main.run_program",
        "infer.main",
        "infer._complete",
        "text.TextSession.stream",
        "session.Session.stream",
        "session.Session._advance",
        "programs.Programs._program.<locals>.run",
    ]
    assert tracing == "programs.Programs._program.<locals>.traced"
