"""Exports that go wrong: nothing is left that looks whole, nothing of others is touched, and one
line says why.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from exported import require_equal, tensors_of
from support import TINY, random_parameters

from llama_jax import storage as fresh_directory_module
from llama_jax.errors import InputError
from llama_jax.storage import claimed
from llama_jax.weights.assemble import ParameterSource, unstack
from llama_jax.weights.gguf_write import write_gguf
from llama_jax.weights.hf_write import export_hugging_face, save_hugging_face
from llama_jax.weights.load import load
from llama_jax.weights.open import Opened, open_model


class Failing:
    """A source that fails after some tensors."""

    def __init__(self, source, error: BaseException, after: int = 5) -> None:
        self.config = source.config
        self._source, self._error, self._left = source, error, after

    def read(self, name: str, layer: int | None) -> np.ndarray:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._source.read(name, layer)


@pytest.mark.parametrize(
    "error", [RuntimeError("lost"), KeyboardInterrupt(), InputError("damaged")], ids=repr
)
def test_a_failure_in_the_middle_leaves_nothing(error, tiny_directory, tmp_path):
    opened = open_model(tiny_directory)
    with pytest.raises(type(error)):
        export_hugging_face(
            opened._replace(source=Failing(opened.source, error)), tmp_path / "out", "float32"
        )
    assert list(tmp_path.iterdir()) == []


CHILD = """if True:
    import sys, time
    from llama_jax.weights.hf_write import export_hugging_face
    from llama_jax.weights.open import open_model
    def slowly(count):
        print("read", flush=True)
        time.sleep(0.2)
    export_hugging_face(open_model(sys.argv[1]), sys.argv[2], watcher=slowly, max_shard_size="20KB")
"""


def test_a_killed_process_leaves_nothing_that_looks_whole(tiny_directory, tmp_path):
    command = [sys.executable, "-c", CHILD, str(tiny_directory), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(8):
            assert child.stdout.readline() == "read\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("out.partial-")
    assert list(partial.glob("*.safetensors"))  # it was in the middle
    with pytest.raises(InputError):
        load(partial)
    export_hugging_face(open_model(tiny_directory), tmp_path / "out")
    require_equal(tensors_of(tmp_path / "out"), tensors_of(tiny_directory))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_still_being_written_is_left_alone(tiny_directory, tmp_path):
    """And what only has a name like it."""
    (tmp_path / "out.partial-mine").mkdir()
    (tmp_path / "other.partial-00000000").mkdir()
    command = [sys.executable, "-c", CHILD, str(tiny_directory), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "read\n"
        before = {path.name for path in tmp_path.iterdir()}
        export_hugging_face(open_model(tiny_directory), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
        child.kill()


@pytest.mark.parametrize("alive", [False, True])
def test_a_half_file_of_gguf(alive, tmp_path):
    (tmp_path / ".out.gguf.12345.partial").write_bytes(b"half")
    with contextlib.ExitStack() as stack:
        if alive:
            stack.enter_context(claimed(tmp_path / ".out.gguf.12345.partial"))
        write_gguf(
            ParameterSource(TINY, random_parameters(TINY)),
            tmp_path / "out.gguf",
            "float32",
            {},
            None,
            "tiny",
        )
        assert (tmp_path / ".out.gguf.12345.partial").exists() is alive


def test_a_value_beyond_float16_is_named(tmp_path):
    params = random_parameters(TINY)
    wide = params["layers"]["feed_forward"]["down"].at[2, 3, 4].set(-70000.0)
    params["layers"]["feed_forward"]["down"] = wide
    with pytest.raises(
        InputError,
        match=r"tensor model\.layers\.2\.mlp\.down_proj\.weight holds 70000, beyond .* float16",
    ):
        save_hugging_face(params, TINY, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    save_hugging_face(params, TINY, tmp_path / "out", dtype="bfloat16")


def test_infinities_and_nans_are_kept(tmp_path):
    params = random_parameters(TINY)
    params["embedding"] = params["embedding"].at[0, :3].set(jnp.array([jnp.inf, -jnp.inf, jnp.nan]))
    save_hugging_face(params, TINY, tmp_path / "out", dtype="float16")
    np.testing.assert_array_equal(
        tensors_of(tmp_path / "out")["model.embed_tokens.weight"][0, :3],
        np.array([np.inf, -np.inf, np.nan], np.float16),
    )


@pytest.mark.parametrize("taken", ["directory", "file", "link"])
def test_a_place_that_is_taken_is_refused(taken, tmp_path):
    out = tmp_path / "out"
    home = tmp_path / "home" if taken == "link" else out
    if taken == "file":
        out.write_text("mine")
    else:
        home.mkdir()
        (home / "mine").write_text("mine")
    if taken == "link":
        out.symlink_to(home)
    source = Failing(ParameterSource(TINY, random_parameters(TINY)), RuntimeError("read"), after=0)
    with pytest.raises(
        InputError, match=r"given, nothing or an empty directory expected"
    ):  # before anything is read
        export_hugging_face(
            Opened(source, None, None, (), "run", tmp_path, "a run"), out, "float32"
        )
    assert (out if taken == "file" else home / "mine").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_an_empty_directory_and_missing_parents_will_do(tmp_path):
    params = random_parameters(TINY)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_hugging_face(params, TINY, tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").exists()
    save_hugging_face(params, TINY, tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "config.json").exists()


def test_a_disk_without_room_is_told_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=4_300_000)
    monkeypatch.setattr(fresh_directory_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"0\.00 GB to be written, 0\.00 GB free there; make room"):
        save_hugging_face(random_parameters(TINY), TINY, tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_linked_tokenizer_file_is_not_carried_off(tiny_directory, tmp_path):
    source = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "source"))
    (tmp_path / "secret.json").write_text('{"key": "value"}')
    opened = open_model(source)  # which refuses a link that is there already
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=r"special_tokens_map\.json links to .* outside"):
        export_hugging_face(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_architecture(tmp_path):
    params = random_parameters(TINY)
    for wrong in (
        dataclasses.replace(TINY, layers=2),
        dataclasses.replace(TINY, tied_head=True),
        dataclasses.replace(TINY, ffn_dim=65),
    ):
        for form in (params, unstack(params)):
            with pytest.raises(
                InputError, match=r"parameters: tensors do not fit the architecture"
            ):
                ParameterSource(wrong, form)
    with pytest.raises(InputError, match=r"parameters: embedding is a list; an array expected"):
        ParameterSource(TINY, {**params, "embedding": [1.0]})


def test_parameters_that_are_no_floats(tmp_path):
    params = random_parameters(TINY)
    params["embedding"] = params["embedding"].astype(jnp.int8)
    with pytest.raises(
        InputError, match=r"tensor model\.embed_tokens\.weight is int8; one of .* expected"
    ):
        save_hugging_face(params, TINY, tmp_path / "out")


def test_stops_outside_the_vocabulary(tmp_path):
    for stop in (10**9, -1, TINY.vocab_size):
        with pytest.raises(
            InputError,
            match=rf"stop_ids: {stop} given, ids of the vocabulary, 0 to {TINY.vocab_size - 1}",
        ):
            save_hugging_face(random_parameters(TINY), TINY, tmp_path / "out", stop_ids=(0, stop))
    assert list(tmp_path.iterdir()) == []
