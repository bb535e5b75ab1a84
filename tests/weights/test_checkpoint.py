"""Checkpoints under damage: detected and passed over, never silently wrong."""

import functools
import json
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matrix import rounds

from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checkpoint import Checkpoints, SaveError
from llama_jax.weights.restore import restore_parameters


class State(NamedTuple):
    params: dict
    optimizer: Any
    step: jax.Array


@functools.cache
def make_state(step: int) -> State:
    rng = np.random.default_rng(step)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
        "layers": {"attention": {"wq": jnp.asarray(rng.normal(size=(2, 32, 64)), jnp.bfloat16)}},
        "final_norm": {"scale": jnp.ones(8) * step},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    noisy = jax.tree.map(lambda x: x + jnp.asarray(rng.integers(1, 9), x.dtype), optimizer)
    return State(params, noisy, jnp.int32(step))


def like(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def equal(left: Any, right: Any) -> bool:
    """Bitwise equality of two trees, structure and dtypes included."""
    same = jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return same and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


LIKE = like(make_state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 10 and 20 on disk; only to be copied."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints.open(directory, keep=3) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {"config": {"dim": 8}, "tokens": step * 100})
    return directory


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def newest(directory: Path) -> Any:
    with Checkpoints.open(directory, keep=3) as checkpoints:
        return checkpoints.restore_newest(LIKE)


def data_files(step_directory: Path) -> list[Path]:
    """The files that hold weights."""
    return sorted(path for path in step_directory.rglob("d/*") if path.is_file())


def damage_weights(step_directory: Path) -> None:
    for path in data_files(step_directory):
        path.write_bytes(bytes(path.stat().st_size))


# Round trips


def test_round_trip(run):
    with Checkpoints.open(run, keep=3) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert equal(checkpoints.restore(10, LIKE), make_state(10))
        assert checkpoints.metadata(10) == {"config": {"dim": 8}, "tokens": 1000}
        restored = checkpoints.restore_newest(LIKE)
    assert restored.step == 20
    assert restored.metadata["tokens"] == 2000
    assert restored.warnings == []
    assert equal(restored.state, make_state(20))


def test_a_new_directory_has_nothing_to_restore(tmp_path):
    with Checkpoints.open(tmp_path / "a" / "b", keep=1) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore_newest(LIKE) is None


def test_restores_under_any_sharding_with_the_same_checksums(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = [
        PartitionSpec(),
        PartitionSpec("a", "b"),
        PartitionSpec("b", "a"),
        PartitionSpec(None, ("a", "b")),
    ]
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    seals = set()
    for number, spec in enumerate(specs):
        state = {"params": {"w": jax.device_put(values, NamedSharding(mesh, spec))}}
        with Checkpoints.open(tmp_path / str(number), keep=1) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            for other in specs:
                placed = checkpoints.restore(1, like(state, NamedSharding(mesh, other)))["params"][
                    "w"
                ]
                assert placed.sharding.spec == other
                assert np.array_equal(placed, values)
        seals.add((tmp_path / str(number) / "1" / "meta" / "metadata").read_text())
    assert len(seals) == 1


def test_the_state_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.arange(3e5)}}
    expected = jax.device_get(state)
    with Checkpoints.open(tmp_path, keep=1) as checkpoints:
        shapes = like(state)
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = overwrite(state)
        checkpoints.wait()
        assert equal(checkpoints.restore(1, shapes), expected)


def test_keeps_the_newest(tmp_path):
    with Checkpoints.open(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.ones(3)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("step", [5, 20])
def test_a_step_not_above_the_newest_is_refused(run, step):
    with Checkpoints.open(run, keep=3) as checkpoints, pytest.raises(InputError, match="above 20"):
        checkpoints.save(step, make_state(step), {})


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints.open(Path("here"), keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
    assert restore_parameters(Path("here")).step == 1


# Damage


def _flips(step_directory: Path) -> list[tuple[Path, int]]:
    """Places in every file of a checkpoint, and twelve in those that hold weights."""
    some = rounds(1, 3)
    rng = random.Random(0)
    files = [path for path in step_directory.rglob("*") if path.is_file() and path.stat().st_size]
    files.sort(
        key=lambda path: (path.stat().st_size, path.name)
    )  # names are drawn anew in each run
    weights = data_files(step_directory)
    return [
        (path, rng.randrange(path.stat().st_size * 8))
        for path in files
        for _ in range(12 if path in weights else some)
    ]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # TensorStore's own clean-up
def test_a_flipped_bit_is_never_restored(run):
    detected = []
    with Checkpoints.open(run, keep=3) as checkpoints:
        for path, bit in _flips(run / "20"):
            clean = path.read_bytes()
            damaged = bytearray(clean)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            restored = checkpoints.restore_newest(LIKE)
            assert equal(restored.state, make_state(restored.step)), (path, bit)
            if restored.step == 10:
                assert "20" in restored.warnings[0]
                (run / "20.corrupt").rename(run / "20")
                detected.append(path)
            path.write_bytes(clean)
    assert len(detected) > 20
    assert set(detected) & set(data_files(run / "20"))


@pytest.mark.parametrize("harm", ["truncated", "deleted", "zeroed"])
def test_a_file_cut_or_gone(run, harm):
    with Checkpoints.open(run, keep=3) as checkpoints:
        for path in data_files(run / "20"):
            clean = path.read_bytes()
            harms = {"truncated": clean[: len(clean) // 2], "zeroed": bytes(4096) + clean[4096:]}
            path.write_bytes(harms[harm]) if harm in harms else path.unlink()
            restored = checkpoints.restore_newest(LIKE)
            assert equal(restored.state, make_state(restored.step))
            if restored.step == 10:
                (run / "20.corrupt").rename(run / "20")
            path.write_bytes(clean)


def test_training_goes_on_from_the_older_one(run):
    damage_weights(run / "20")
    with Checkpoints.open(run, keep=3) as checkpoints:
        restored = checkpoints.restore_newest(LIKE)
        assert restored.step == 10
        assert len(restored.warnings) == 1
        assert "\n" not in restored.warnings[0]
        assert data_files(run / "20.corrupt")
        checkpoints.save(15, make_state(15), {})
        checkpoints.save(20, make_state(20), {})
    assert newest(run).step == 20
    damage_weights(run / "20")
    assert newest(run).step == 15
    assert {path.name for path in run.iterdir()} == {"10", "15", "20.corrupt", "20.corrupt2"}


def test_damage_names_step_and_array(run):
    """Weights exchanged between two whole checkpoints: every file is valid, the content is
    another.
    """
    shutil.rmtree(run / "20" / "state")
    shutil.copytree(run / "10" / "state", run / "20" / "state")
    with (
        Checkpoints.open(run, keep=3) as checkpoints,
        pytest.raises(CorruptError, match=r"20: \w+/\S+ is damaged"),
    ):
        checkpoints.restore(20, LIKE)


def test_all_damaged_is_an_error_again_and_again(run):
    for step in ("10", "20"):
        damage_weights(run / step)
    for _ in range(2):  # nothing was renamed: the second start must not begin from scratch
        with pytest.raises(CorruptError, match="all checkpoints are damaged"):
            newest(run)
    assert {path.name for path in run.iterdir()} == {"10", "20"}


def test_a_changed_manifest_is_damage(run):
    path = run / "20" / "meta" / "metadata"
    path.write_text(path.read_text().replace("2000", "2001"))
    with Checkpoints.open(run, keep=3) as checkpoints:
        with pytest.raises(CorruptError, match="seal"):
            checkpoints.metadata(20)
        assert checkpoints.restore_newest(LIKE).step == 10


def test_a_missing_manifest_is_damage(run):
    shutil.rmtree(run / "20" / "meta")
    assert newest(run).step == 10


def test_a_newer_schema_is_not_damage(run):
    path = run / "20" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(InputError, match="schema 99") as caught:
        newest(run)
    assert not isinstance(caught.value, CorruptError)


def test_a_directory_of_another_step_is_damage(run):
    (run / "20").rename(run / "30")
    assert newest(run).step == 10


def test_left_overs_do_not_count(run):
    (run / "30" / "default").mkdir(parents=True)
    (run / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    (run / "020").mkdir()
    with Checkpoints.open(run, keep=3) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        checkpoints.save(30, make_state(30), {})
    assert newest(run).step == 30
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "40.orbax-checkpoint-tmp").exists()


# A state that does not fit


def _misfits() -> dict[str, Any]:
    embedding = LIKE.params["embedding"]
    other = {
        "shape": {
            "embedding": jax.ShapeDtypeStruct((65, 64), jnp.float32, sharding=embedding.sharding)
        },
        "dtype": {
            "embedding": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=embedding.sharding)
        },
        "extra": {"head": embedding},
    }
    trees = {
        name: LIKE._replace(params={**LIKE.params, **change}) for name, change in other.items()
    }
    kept = {name: leaf for name, leaf in LIKE.params.items() if name != "embedding"}
    return {**trees, "missing": LIKE._replace(params=kept)}


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("shape", "params/embedding"),
        ("dtype", "params/embedding"),
        ("extra", "params/head"),
        ("missing", "params/embedding"),
    ],
)
def test_a_state_that_does_not_fit_names_the_path(run, kind, path):
    with Checkpoints.open(run, keep=3) as checkpoints:
        for restore in (
            lambda: checkpoints.restore(20, _misfits()[kind]),
            lambda: checkpoints.restore_newest(_misfits()[kind]),
        ):
            with pytest.raises(InputError, match=path) as caught:
                restore()
            assert not isinstance(caught.value, CorruptError)
            assert "\n" not in str(caught.value)
    assert {path.name for path in run.iterdir()} == {"10", "20"}


def test_an_unknown_step(run):
    with (
        Checkpoints.open(run, keep=3) as checkpoints,
        pytest.raises(InputError, match=r"15 given, one of \[10, 20\]"),
    ):
        checkpoints.restore(15, LIKE)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Checkpoints.open(tmp_path / "file" / "run", keep=1)


# Failing saves

_DISK_FULL = """
import resource, sys, time
from pathlib import Path
import jax.numpy as jnp, numpy as np
from llama_jax.weights.checkpoint import Checkpoints, SaveError

small, large = {"w": jnp.ones(10)}, {"w": jnp.asarray(np.random.default_rng(0).normal(size=400_000))}
with Checkpoints.open(Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, small, {})
    checkpoints.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
    checkpoints.save(2, large, {})
    try:
        for _ in range(200):
            checkpoints.poll()
            time.sleep(0.05)
        print("silent")
    except SaveError as error:
        print("polled", "/2 was not written" in str(error), "\\n" in str(error))
    print(checkpoints.steps())
    checkpoints.poll()
    checkpoints.save(3, large, {})
    while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.05)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    try:
        checkpoints.save(4, small, {})
    except SaveError as error:
        print("next save", "/3 was not written" in str(error))
    checkpoints.wait()
    print(checkpoints.steps())
    checkpoints.save(5, large, {})
"""


def test_a_full_disk(tmp_path):
    script = textwrap.dedent(_DISK_FULL)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["polled True False", "[1]", "next save True", "[4]"]
    with Checkpoints.open(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [5]


def test_leaving_by_an_error_reports_that_error(tmp_path, monkeypatch):
    def leave(error: Exception | None) -> None:
        with Checkpoints.open(tmp_path, keep=1) as checkpoints:
            monkeypatch.setattr(checkpoints, "_finish", lambda: SaveError("lost"))
            if error:
                raise error

    with pytest.raises(ZeroDivisionError):
        leave(ZeroDivisionError())
    with pytest.raises(SaveError, match="lost"):
        leave(None)


# Parameters alone


def test_parameters_alone(run):
    restored = restore_parameters(run)
    assert restored.step == 20
    assert restored.metadata["config"] == {"dim": 8}
    assert equal(restored.state, make_state(20).params)


def test_parameters_in_another_dtype(run):
    cast = restore_parameters(run, dtype="bfloat16").state
    assert equal(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(20).params))


def test_parameters_fall_back_without_touching_the_directory(run):
    damage_weights(run / "20")
    before = sorted(run.rglob("*"))
    restored = restore_parameters(run)
    assert restored.step == 10
    assert len(restored.warnings) == 1
    assert equal(restored.state, make_state(10).params)
    assert sorted(run.rglob("*")) == before


def test_parameters_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        restore_parameters(tmp_path / "nowhere")
    with Checkpoints.open(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
    with pytest.raises(InputError, match="no params"):
        restore_parameters(tmp_path)
