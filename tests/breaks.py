"""Breaks the code on purpose, one place at a time in a copy, and shows which test notices (`make
test-breaks`).

Two kinds of break. `BREAKS` are promises: each replaces one passage, which must occur exactly once,
and must make a test fail by an assertion. `make test-mutations` picks places by a fixed seed across
the package, so that no test can be written for them in advance, and prints the share that is
caught.

A run takes the tests of the folders that the broken file belongs to, stops at the first failure,
and shares compiled programs with the other runs.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).parent.parent
# The tests of each folder of the package; files beside the folders ("") are about numbers of
# models.
FOLDERS = {
    "": (
        "tests/test_presets.py",
        "tests/test_python_api.py",
        "tests/test_structure.py",
        "tests/planning",
    ),
    "parallel": ("tests/parallel", "tests/test_compiler_options.py", "tests/model"),
}
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if sys.version_info < (3, 12):
    QUICK_COMPILATION += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
TEST_LIMIT, RUN_LIMIT = 120, 1200  # seconds; only to end what would never end


@dataclasses.dataclass(frozen=True)
class Break:
    """One passage of a file and what takes its place.

    Attributes:
      name: the promise that is broken, or the place.
      file: below `llama_jax/`.
      old: the passage; occurs exactly once in the file.
      new: what takes its place.
      tests: folders or files whose tests are run; those of the file's folder by default.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    def targets(self) -> tuple[str, ...]:
        """What pytest is given."""
        folder = self.file.rpartition("/")[0]
        return self.tests or FOLDERS.get(folder, (f"tests/{folder}",))

    def apply(self, root: pathlib.Path) -> str:
        """Breaks the file below a root; returns what it was."""
        path = root / "llama_jax" / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(
                f"{self.name}: the passage occurs {text.count(self.old)} times in "
                f"{self.file}; 1 expected"
            )
        path.write_text(text.replace(self.old, self.new))
        return text


BREAKS = (
    Break(
        "RoPE factor",
        "model/rope.py",
        "frequencies / scaling.factor + keep",
        "frequencies / 8.0 + keep",
    ),
    Break(
        "RMSNorm epsilon",
        "model/layers.py",
        "rsqrt(mean_square + eps)",
        "rsqrt(mean_square + 1e-8)",
    ),
    Break(
        "causal mask off by one",
        "model/mask.py",
        "seen &= slots <= start[",
        "seen &= slots <= 1 + start[",
    ),
    Break(
        "document mask dropped",
        "model/mask.py",
        "seen &= mask.documents[:, :, None] == theirs[:, None, :]",
        "seen &= jnp.ones_like(theirs[:, None, :] == 0)",
    ),
    Break(
        "order of grouped heads",
        "model/blockwise.py",
        "return q.reshape(blocks, batch, kv_heads, heads // kv_heads, size, head_dim)",
        "return q.reshape(blocks, batch, heads // kv_heads, kv_heads, size, "
        "head_dim).swapaxes(2, 3)",
    ),
    Break(
        "layout of q and k in GGUF",
        "weights/gguf.py",
        "return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, "
        "2).reshape(rows.shape)",
        "return rows",
    ),
    Break(
        "sum for a mean in accumulation",
        "training/step.py",
        "targets = recipe.objective.targets(batch)",
        "targets = recipe.objective.targets(jax.tree.map(lambda x: x[0], batch))",
    ),
    Break(
        "weight decay on norms",
        "training/optimizer.py",
        'lambda path, _: path[-1].key != "scale"',
        "lambda path, _: True",
    ),
    Break(
        "schedule off by one",
        "training/optimizer.py",
        "done = jnp.asarray(count, jnp.float32) + 1",
        "done = jnp.asarray(count, jnp.float32)",
    ),
    Break(
        "checksum not compared",
        "weights/integrity.py",
        "if checksum != manifest.arrays[path].checksum:",
        "if not checksum:",
    ),
    Break(
        "data order depends on hosts",
        "data/batches.py",
        "np.arange(start, stop, dtype=np.int64)",
        "np.arange(stop - start, dtype=np.int64)",
    ),
    Break(
        "seed ignored",
        "generation/sampling.py",
        "jax.vmap(jax.random.fold_in)(sampling.key, position)",
        "jax.vmap(lambda _, at: jax.random.key(at))(sampling.key, position)",
    ),
    Break(
        "top-p keeps one token too many",
        "generation/sampling.py",
        "enough = jnp.sum(jnp.where(bits < candidate[:, None], weights, 0.0), axis=-1) >= target",
        "enough = jnp.sum(jnp.where(bits < candidate[:, None], weights, 0.0), axis=-1) > "
        "target + 1e-6 * (target < 1)",
    ),
    Break(
        "stop string lost at a chunk's border",
        "text/stops.py",
        "certain = len(self._held) - self._open()",
        "certain = len(self._held)",
    ),
    Break(
        "BOS doubled",
        "text/tokenizer.py",
        "return begin + tokenizer.encode(text)",
        "return begin + begin + tokenizer.encode(text)",
    ),
    Break(
        "loss mask shifted",
        "data/packing.py",
        "batch.weights[sequence, at : at + take] = learned[1:]",
        "batch.weights[sequence, at : at + take] = learned[:-1]",
    ),
    Break("LoRA scale", "training/setup.py", "adapter.alpha / adapter.rank", "adapter.alpha"),
    Break(
        "axis of int8 scales",
        "model/quantize.py",
        "scales = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127",
        "scales = jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True) / 127 + 0 * wide[..., :1]",
    ),
    Break(
        "resume from step + 1",
        "training/loop.py",
        "        step = int(state.step)\n        before",
        "        step = int(state.step) + (int(state.step) > 0)\n        before",
    ),
    Break(
        "checkpoint removed before the next is committed",
        "weights/checkpoint.py",
        "            _sweep(self._directory, step)\n        meta",
        "            _sweep(self._directory, step)\n"
        "            _remove([self._directory / str(s) for s in self.steps()])\n        meta",
    ),
    Break(
        "path that leaves its folder",
        "weights/hf_read.py",
        "if not (target.is_relative_to(home) or target.is_relative_to(blobs)):",
        "if not target:",
    ),
    Break(
        "unknown pickle operation",
        "weights/pth_pickle.py",
        '_refuse(f"uses the operation {operation.name}")',
        "continue",
    ),
    Break("time limit of templates", "text/sandbox.py", "_BUDGET = 1 << 24", "_BUDGET = 1 << 29"),
    Break(
        "positions in splash",
        "model/splash.py",
        "mask.q_sequence = balanced_positions(length, parts)",
        "mask.q_sequence = np.arange(length, dtype=np.int32)",
    ),
    Break(
        "positions in the ring",
        "model/context_parallel.py",
        "own._replace(key_positions=held.positions, key_documents=held.documents)",
        "own._replace(key_documents=held.documents)",
    ),
)


def mutations(root: pathlib.Path, seed: int, count: int) -> list[Break]:
    """Places picked by a seed across the package, each with one operator, number or truth value
    replaced.
    """
    candidates = []
    for path in sorted((root / "llama_jax").rglob("*.py")):
        text = path.read_text()
        file = path.relative_to(root / "llama_jax").as_posix()
        candidates += [(file, *place) for place in _places(text)]
    chosen = random.Random(seed).sample(candidates, count)
    return [_mutation(root, *place) for place in sorted(chosen)]


_SWAPS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.And: "or",
    ast.Or: "and",
}


def _places(text: str) -> list[tuple[int, int, str]]:
    """Start and end of what is replaced, in characters, and its replacement."""
    lines = [
        0,
        *itertools.accumulate(len(line.encode()) for line in text.splitlines(keepends=True)),
    ]
    data = text.encode()

    def offset(line: int, column: int) -> int:
        return lines[line - 1] + column

    def between(left: ast.expr, right: ast.expr, new: str) -> tuple[int, int, str]:
        start, end = (
            offset(left.end_lineno, left.end_col_offset),
            offset(right.lineno, right.col_offset),
        )
        inside = data[start:end].decode()
        bare = inside.strip("() \n\\")
        at = inside.index(bare)
        return start + at, start + at + len(bare.encode()), new

    found = []
    for node in _statements(ast.parse(text)):
        if isinstance(node, ast.Compare):
            for left, operation, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators
            ):
                found.append(between(left, right, _SWAPS[type(operation)]))
        elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPS:
            found.append(between(node.left, node.right, _SWAPS[type(node.op)]))
        elif isinstance(node, ast.BoolOp):
            found += [
                between(left, right, _SWAPS[type(node.op)])
                for left, right in itertools.pairwise(node.values)
            ]
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            new = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
            found.append(
                (
                    offset(node.lineno, node.col_offset),
                    offset(node.end_lineno, node.end_col_offset),
                    new,
                )
            )
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = offset(node.lineno, node.col_offset)
            found.append((start, start + len("not "), ""))
    # Comments between two operands would be taken for the operator.
    return [(start, end, new) for start, end, new in found if b"#" not in data[start:end]]


def _statements(tree: ast.AST):
    """All nodes but annotations, decorators and what stands inside of strings."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield node
                yield from _statements(node)


def _mutation(root: pathlib.Path, file: str, start: int, end: int, new: str) -> Break:
    """The place as a passage that occurs once: as many lines around it as that takes."""
    data = (root / "llama_jax" / file).read_bytes()
    left, right = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", end)
    while data.count(data[left:right]) > 1:
        left, right = data.rfind(b"\n", 0, left - 1) + 1, data.find(b"\n", right + 1)
    line = data.count(b"\n", 0, start) + 1
    changed = data[left:start] + new.encode() + data[end:right]
    name = f"{file}:{line} {data[start:end].decode()!r} -> {new!r}"
    return Break(name, file, data[left:right].decode(), changed.decode())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a break.

    Attributes:
      name: of the break.
      caught: whether a test failed.
      by: the test, or what else ended the run.
      assertion: whether it failed by an assertion.
      reason: the first line of the failure.
      seconds: of the run.
    """

    name: str
    caught: bool
    by: str
    assertion: bool
    reason: str
    seconds: float


def run_broken(broken: Break, copy: pathlib.Path, stamp: int, first: str = "") -> Outcome:
    """Breaks a copy, runs a test that is likely to notice and then the others, mends the copy."""
    original = broken.apply(copy)
    path = copy / "llama_jax" / broken.file
    os.utime(path, (stamp, stamp))  # compiled modules are told apart by seconds only
    begin = time.monotonic()
    try:
        caught, by, reason = (False, "", "") if not first else _run_tests(copy, (first,), stamp)
        if not caught or by.startswith("pytest"):  # another suite may not have that test
            caught, by, reason = _run_tests(copy, broken.targets(), stamp)
    finally:
        path.write_text(original)
        os.utime(path, (stamp + 1, stamp + 1))
    assertion = reason.startswith(("AssertionError", "assert ", "Failed: DID NOT RAISE"))
    return Outcome(broken.name, caught, by, assertion, reason, time.monotonic() - begin)


def _run_tests(copy: pathlib.Path, targets: tuple[str, ...], stamp: int) -> tuple[bool, str, str]:
    """Whether a test of a copy fails, which comes first, and why."""
    report = copy / f"report-{stamp}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--timeout={TEST_LIMIT}",
        "-m",
        "not smollm2",
        f"--junitxml={report}",
        *targets,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "XLA_FLAGS": QUICK_COMPILATION,
        "PYTHONDONTWRITEBYTECODE": "",
    }
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(copy.parent / "compiled"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=RUN_LIMIT
        )
    except subprocess.TimeoutExpired:
        return True, "the time limit of a run", ""
    return _first_failure(done, report)


def _first_failure(
    done: subprocess.CompletedProcess, report: pathlib.Path
) -> tuple[bool, str, str]:
    """Whether a test failed, which, and why."""
    if done.returncode == 0:
        return False, "", ""
    if not report.exists():
        return (
            True,
            "pytest, which did not start",
            (done.stdout + done.stderr).strip().splitlines()[-1],
        )
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        for problem in itertools.chain(case.iter("failure"), case.iter("error")):
            return True, _test_name(case), " ".join(problem.get("message", "").split())[:200]
    return True, f"pytest, status {done.returncode}", ""


def _test_name(case: xml.etree.ElementTree.Element) -> str:
    """The name by which pytest finds a test of a report; of a file that could not be imported, its
    own.
    """
    parts = case.get("classname", "").split(".")
    folders = list(itertools.takewhile(str.islower, parts))
    return (
        "::".join(["/".join(folders) + ".py", *parts[len(folders) :], case.get("name", "")])
        if folders
        else case.get("name", "")
    )


def run_all(
    breaks: list[Break], root: pathlib.Path, jobs: int, known: dict[str, str]
) -> list[Outcome]:
    """Every break in one of `jobs` copies of a checkout, in order; `known` names tests to try
    first.
    """
    with tempfile.TemporaryDirectory(prefix="breaks-") as folder:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
        )
        for number in range(jobs):
            copy = pathlib.Path(folder) / str(number)
            for name in filter(None, listed.stdout.decode().split("\0")):
                if (root / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(root / name, copy / name)
            copies.put(copy)

        def one(number: int) -> Outcome:
            copy = copies.get()
            try:
                first = known.get(breaks[number].name, "").split("[")[0]
                outcome = run_broken(breaks[number], copy, 1_000_000_000 + 2 * number, first)
            finally:
                copies.put(copy)
            caught = f"caught by {outcome.by}" if outcome.caught else "NOT CAUGHT"
            print(
                f"{outcome.name}: {caught} in {outcome.seconds:.0f} s ({outcome.reason[:100]})",
                flush=True,
            )
            return outcome

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, range(len(breaks))))


def _known(path: pathlib.Path | None) -> dict[str, str]:
    """Which test caught each break in an earlier run."""
    outcomes = json.loads(path.read_text()) if path else []
    return {outcome["name"]: outcome["by"] for outcome in outcomes if "::" in outcome["by"]}


def main() -> int:
    """Runs breaks or mutations and says what was caught; status 1 where a promise is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mutations",
        type=int,
        default=0,
        help="places picked by the seed, in place of the named breaks",
    )
    parser.add_argument("--seed", type=int, default=20261201)
    parser.add_argument("--only", default="", help="breaks whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="checkout to copy")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the outcomes to")
    parser.add_argument(
        "--known", type=pathlib.Path, help="outcomes of another run, whose tests are tried first"
    )
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    breaks = (
        mutations(root, arguments.seed, arguments.mutations)
        if arguments.mutations
        else list(BREAKS)
    )
    breaks = [broken for broken in breaks if arguments.only in broken.name]
    begin = time.monotonic()
    outcomes = run_all(breaks, root, arguments.jobs, _known(arguments.known))
    if arguments.json:
        arguments.json.write_text(
            json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
        )
    caught = [outcome for outcome in outcomes if outcome.caught]
    print(f"{len(caught)} of {len(outcomes)} caught in {time.monotonic() - begin:.0f} s")
    if arguments.mutations:
        return 0
    bad = [outcome for outcome in outcomes if not (outcome.caught and outcome.assertion)]
    for outcome in bad:
        print(
            f"error: {outcome.name}: "
            f"{'not by an assertion: ' + outcome.reason if outcome.caught else 'no test noticed'}"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
