"""`load`: every kind of model on disk, found by what lies at the path, and the same weights whoever
wrote them.
"""

import collections
import dataclasses
import inspect
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from hub import TEMPLATE, TINY_CONTEXT
from support import TINY, float64_logits, random_parameters, random_tokens, unrolled_parameters

from llama_jax.accounting import parameter_shapes
from llama_jax.errors import CorruptError, InputError
from llama_jax.generation.text import generate
from llama_jax.model.llama import logits
from llama_jax.model.quantize import leaf_quantizer, quantize
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, tree_shardings
from llama_jax.weights import restore as slices
from llama_jax.weights.assemble import stack, unstack
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.hf_write import export_hugging_face
from llama_jax.weights.inspect import report
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model
from llama_jax.weights.restore import SlicedCheckpoint


def test_hugging_face_directory(tiny_directory):
    model = load(tiny_directory)
    assert model.config == dataclasses.replace(
        TINY, vocab_size=model.tokenizer.vocab_size, context_length=TINY_CONTEXT
    )
    assert model.template.source == TEMPLATE
    assert model.stop_ids == (
        0,
        2,
    )  # what the config declares, and the end of a turn that it forgets
    assert model.origin == "Hugging Face tiny"
    assert model.tokenizer.decode(model.tokenizer.encode("cat 你好")) == "cat 你好"


@pytest.mark.parity
def test_hugging_face_logits_equal_transformers(tiny_directory):
    """transformers reads the same directory."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
    import transformers

    model = load(tiny_directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    tokens = random_tokens(model.config, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
    np.testing.assert_allclose(
        logits(model.params, tokens, model.config), expected, atol=1e-4, rtol=0
    )


def test_forms_and_dtypes(tiny_directory):
    stacked = load(tiny_directory, "bfloat16", form="stacked")
    unrolled = load(str(tiny_directory), "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((stacked.params, unrolled.params))} == {
        jnp.dtype("bfloat16")
    }
    wq = np.asarray(stacked.params["layers"]["attention"]["wq"])
    assert (wq[1] == np.asarray(unrolled.params["layers_1"]["attention"]["wq"])).all()
    assert wq.shape[0] == stacked.config.layers


def test_without_a_tokenizer(tiny_directory, tmp_path):
    """Weights alone are enough for all that needs no text."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_directory / name, tmp_path)
    model = load(tmp_path)
    assert model.tokenizer is None
    assert model.template is None
    assert model.stop_ids == (0,)
    with pytest.raises(InputError, match=r"has no tokenizer: a directory with its tokenizer\.json"):
        generate(model, ["a"])


@pytest.mark.smollm2
def test_gguf_file(smollm2_model):
    assert smollm2_model.origin == "GGUF SmolLM2-135M-Instruct.Q4_1.gguf"
    special = smollm2_model.tokenizer.special_tokens
    assert smollm2_model.stop_ids == (special["<|endoftext|>"], special["<|im_end|>"])
    assert "<|im_start|>" in smollm2_model.template.source


@pytest.mark.parity
@pytest.mark.smollm2
def test_gguf_logits_equal_transformers(smollm2_model, smollm2_torch):
    """Weights that the gguf package dequantised and this test's own code put in order."""
    torch = pytest.importorskip("torch")
    tokens = random_tokens(smollm2_model.config, (1, 50))
    with torch.no_grad():
        expected = smollm2_torch(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
    got = np.asarray(logits(smollm2_model.params, tokens, smollm2_model.config))
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(got, expected, atol=2e-3, rtol=0)


CONFIG = dataclasses.replace(TINY, vocab_size=500)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, sentence_piece_file) -> pathlib.Path:
    """A run directory as `train.py` leaves it: two checkpoints, of steps 5 and 9, and the
    tokenizer. Only to be read.
    """
    directory = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints.open(directory / "checkpoints", keep=3) as checkpoints:
        for step in (5, 9):
            state = {"params": random_parameters(CONFIG, seed=step), "step": jnp.int32(step)}
            checkpoints.save(step, state, {"model": dataclasses.asdict(CONFIG)})
    shutil.copy(sentence_piece_file, directory / "tokenizer.model")
    return directory


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def sentence_piece_file(tmp_path_factory) -> pathlib.Path:
    import pydoc_data.topics

    import sentencepiece

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pydoc_data.topics.topics["for"].splitlines() * 20),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
        )
    return path


def test_run_directory(run):
    model = load(run)
    assert model.origin == "run run at step 9"
    assert model.config == CONFIG
    tokens = random_tokens(CONFIG, (1, 9))
    expected = float64_logits(random_parameters(CONFIG, seed=9), tokens, CONFIG)
    np.testing.assert_allclose(logits(model.params, tokens, CONFIG), expected, atol=1e-5)
    assert model.tokenizer.decode(model.tokenizer.encode("for it")) == "for it"
    assert model.stop_ids == (model.tokenizer.end_id,)
    assert "layers_1" in model.params
    assert load(run, form="stacked").params["layers"]["attention"]["wq"].shape[0] == CONFIG.layers


def damage(run: pathlib.Path, step: int) -> None:
    for path in (run / "checkpoints" / str(step) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7] + b"damaged")


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(run):
    damage(run, 9)
    model = load(run)
    assert model.origin.startswith("run run at step 5 (")
    assert "checkpoints/9 is damaged" in model.origin
    assert "\n" not in model.origin
    damage(run, 5)
    with pytest.raises(CorruptError, match="all checkpoints are damaged"):
        load(run)


def test_damage_that_shows_late_begins_anew(run, monkeypatch):
    """The last array of the newest checkpoint is another: nothing of that step is in the result."""
    read, steps = SlicedCheckpoint.read, []

    def damaged(self, path, layer):
        steps.append(self._manifest.step)
        if steps[-1] == 9 and "feed_forward_norm" in path and layer == CONFIG.layers - 1:
            raise CorruptError("damaged at last")
        return read(self, path, layer)

    monkeypatch.setattr(SlicedCheckpoint, "read", damaged)
    expected = jax.tree.leaves(random_parameters(CONFIG, seed=5))
    restored = jax.tree.leaves(load(run, form="stacked").params)
    assert steps.count(9) > CONFIG.layers
    assert steps == sorted(steps, reverse=True)
    assert steps.count(5) == 3 + 9 * CONFIG.layers
    assert all(map(np.array_equal, restored, expected))


def test_of_a_run_every_slice_is_verified_and_then_read_once(run, tmp_path, monkeypatch):
    """An export verifies all slices first, since half of it cannot be taken back, and then reads
    each once.
    """
    read, places = SlicedCheckpoint.read, collections.Counter()
    monkeypatch.setattr(
        SlicedCheckpoint, "read", lambda s, *place: places.update([place]) or read(s, *place)
    )
    opened = open_model(run)._replace(tokenizer=None)  # transformers could not read this one
    export_hugging_face(opened, tmp_path / "out", max_shard_size="100KB")
    assert (
        len(places) == 3 + 9 * CONFIG.layers
    )  # embedding, norm, head, and of every layer seven matrices and two norms
    assert set(places.values()) == {2}
    params = load(tmp_path / "out", form="stacked").params
    assert jax.tree.all(jax.tree.map(np.array_equal, params, random_parameters(CONFIG, seed=9)))


def test_a_flipped_slice_is_damage(run, monkeypatch):
    """The sums of the layers add up to the checksum of the whole array, so that one number of one
    layer shows.
    """
    fold = slices.fold_part
    SlicedCheckpoint(run / "checkpoints", 9).verify()

    def flipped(array, start):
        return fold(array.at[0].add(1) if start else array, start)

    monkeypatch.setattr(slices, "fold_part", flipped)
    with pytest.raises(CorruptError, match=r"layers/.* is damaged: checksum"):
        SlicedCheckpoint(run / "checkpoints", 9).verify()


PEAK = """
import resource, sys
import jax, numpy as np
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model
from llama_jax.weights.restore import SlicedCheckpoint

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
source = open_model(sys.argv[1]).source
checkpoint = SlicedCheckpoint(source.directory / "checkpoints", 1)
checkpoint.read("layers/attention_norm/scale", 0)
for path in ("attention/wq", "feed_forward/gate"):  # compiles, warms what reads
    checkpoint.read("layers/" + path, 0)
before = peak()
for layer in range(source.config.layers):
    source.read("layers/feed_forward/gate", layer)
exported = peak() - before
before = peak()
params = load(sys.argv[1], form="unrolled").params
result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(exported, peak() - before - result)
"""


def test_a_run_is_read_by_slices_of_layers(tmp_path, sentence_piece_file):
    """Beside the result about one layer's largest matrix is in memory, and not the array of all
    layers: 3 MB of 72.
    """
    config = dataclasses.replace(CONFIG, layers=24, dim=256, ffn_dim=3072, vocab_size=500)
    with Checkpoints.open(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        params = jax.tree.map(
            lambda shape: jnp.ones(shape),
            parameter_shapes(config),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        checkpoints.save(1, {"params": params}, {"model": dataclasses.asdict(config)})
    shutil.copy(sentence_piece_file, tmp_path / "run" / "tokenizer.model")
    largest = config.dim * config.ffn_dim * 4
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    exported, loaded = map(int, done.stdout.split())
    assert (
        exported < 6 * largest
    )  # a slice, its copy on the device for the checksum, what the reader of the files holds
    assert loaded < 8 * largest
    assert 8 * largest < config.layers * largest / 2


def test_a_run_with_unrolled_layers_is_the_same_model(run, tmp_path):
    """Loaded in either form, inspected, exported."""
    other = tmp_path / "unrolled"
    with Checkpoints.open(other / "checkpoints", keep=3) as checkpoints:
        state = {"params": unrolled_parameters(CONFIG, seed=9), "step": jnp.int32(9)}
        checkpoints.save(9, state, {"model": dataclasses.asdict(CONFIG)})
    shutil.copy(run / "tokenizer.model", other)
    opened = open_model(other)
    assert report(opened).parameters == report(open_model(run)).parameters
    export_hugging_face(opened._replace(tokenizer=None), tmp_path / "out")
    for form in ("stacked", "unrolled"):
        expected = load(run, form=form).params
        for path in (other, tmp_path / "out"):
            found = load(path, form=form).params
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert load(other, form="stacked").origin == "run unrolled at step 9"


def write_adapter_run(directory, tree, base, config=CONFIG):
    """A run of adapters of rank 2 and alpha 6 as the loop leaves it, as far as loading goes."""
    adapter, made_from = {"rank": 2, "alpha": 6.0}, {"path": str(base)}
    with Checkpoints.open(directory / "checkpoints", keep=3) as checkpoints:
        for step, adapters in ((5, jax.tree.map(jnp.zeros_like, tree)), (9, tree)):
            metadata = {
                "model": dataclasses.asdict(config),
                "adapter": adapter,
                "made_from": made_from,
            }
            checkpoints.save(step, {"params": adapters}, metadata)
    return directory


@pytest.mark.parametrize(
    "form", [stack, pytest.param(unstack, marks=pytest.mark.slow)], ids=["stacked", "unrolled"]
)
def test_a_run_of_adapters_is_its_model_with_them_merged(run, tmp_path, form):
    """Over a run; `W + A B alpha / rank` by hand."""
    rng = np.random.default_rng(3)
    a, b = (
        rng.normal(size=(CONFIG.layers, *shape)) for shape in ((CONFIG.dim, 2), (2, CONFIG.ffn_dim))
    )
    up = ("layers", "feed_forward", "up")
    tree = form(
        unflatten_dict({(*up, "a"): a.astype(np.float32), (*up, "b"): b.astype(np.float32)})
    )
    tree = jax.tree.map(jnp.asarray, tree)
    mine = write_adapter_run(tmp_path / "mine", tree, run)
    shutil.copy(run / "tokenizer.model", mine)
    before, after = (load(path, form="stacked") for path in (run, mine))
    expected, found = flatten_dict(before.params), flatten_dict(after.params)
    expected[up] = np.asarray(expected[up], np.float64) + np.einsum("lir,lro->lio", a, b) * 3
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-5 if path == up else 0)
    assert after.origin == f"{before.origin} with adapters of run mine at step 9"
    assert after.tokenizer is not None
    assert after.report.parameters == before.report.parameters
    export_hugging_face(open_model(mine)._replace(tokenizer=None), tmp_path / "out")
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "out", form="stacked").params, after.params
    )


def test_a_run_of_adapters_without_its_model(run, tmp_path):
    tree = {
        "layers": {"attention": {"wk": {"a": jnp.zeros((3, 48, 3)), "b": jnp.zeros((3, 3, 20))}}}
    }
    gone = write_adapter_run(tmp_path / "gone", tree, tmp_path / "moved")
    other = write_adapter_run(
        tmp_path / "other", tree, run, dataclasses.replace(CONFIG, rope_theta=5.0)
    )
    silent = tmp_path / "silent"
    with Checkpoints.open(silent / "checkpoints", keep=3) as checkpoints:
        checkpoints.save(9, {"params": tree}, {"model": dataclasses.asdict(CONFIG)})
    for path, words in (
        (
            gone,
            "adapters of the model .*moved', not here; name it: adapters merge MODEL .*gone DST",
        ),
        (
            other,
            "adapters of another model than .* is now; name theirs: adapters merge MODEL "
            ".*other DST",
        ),
        (silent, "step 9 does not say of which model"),
    ):
        with pytest.raises(InputError, match=words) as error:
            load(path)
        assert "\n" not in str(error.value)


def test_an_export_says_which_checkpoint_it_is(run, tmp_path):
    damage(run, 9)
    opened = open_model(run)._replace(tokenizer=None)
    export_hugging_face(opened, tmp_path / "out")
    params = load(tmp_path / "out", form="stacked").params
    assert jax.tree.all(jax.tree.map(np.array_equal, params, random_parameters(CONFIG, seed=5)))
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        origin = json.loads(file.metadata()["llama_jax.made_from"])["origin"]
    assert origin == load(run).origin
    assert origin.startswith("run run at step 5 (")
    assert "made from run run at step 5 (" in (tmp_path / "out" / "README.md").read_text()


NARROW = [("run", "stacked", 8), ("hugging_face", "unrolled", 4)]
OTHERS = [("run", "unrolled", 4), ("hugging_face", "stacked", 8)]


@pytest.mark.parametrize(
    ("origin", "form", "bits"),
    [*NARROW, *(pytest.param(*o, marks=pytest.mark.slow) for o in OTHERS)],
)
def test_narrow_weights_leaf_by_leaf(origin, form, bits, run, tiny_directory):
    """Those of the whole tree, narrowed afterwards."""
    path = run if origin == "run" else tiny_directory
    narrow = load(path, form=form, finish=leaf_quantizer(bits, group=4)).params
    expected = quantize(load(path, form=form).params, bits, group=4)
    assert jax.tree.structure(narrow) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, narrow, expected))


@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_a_run_goes_straight_to_its_shards(run, form):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole, sharded = load(run, form=form), load(run, form=form, mesh=mesh)
    places = tree_shardings(sharded.params, mesh, TRAINING)
    assert jax.tree.all(
        jax.tree.map(
            lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), sharded.params, places
        )
    )
    jax.tree.map(np.testing.assert_array_equal, whole.params, sharded.params)


def test_sharded_and_whole_models_agree(tiny_directory):
    """A step of the model on its mesh gives the logits of one device."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    whole, sharded = load(tiny_directory), load(tiny_directory, mesh=mesh)
    tokens = random_tokens(whole.config, (4, 9))
    with jax.set_mesh(mesh):
        got = logits(sharded.params, tokens, whole.config)
    np.testing.assert_allclose(got, logits(whole.params, tokens, whole.config), atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["no such file or directory", "another file given", "a directory without a model given"]
)
def test_a_path_that_is_none_of_these(kind, tmp_path):
    path = tmp_path / "model"
    if kind == "another file given":
        path.write_text("Some text.")
    if kind == "a directory without a model given":
        path.mkdir()
    with pytest.raises(InputError) as refused:
        load(path)
    assert str(refused.value) == (
        f"{path}: {kind}; a run directory, a directory with config.json (Hugging Face) "
        "or params.json (Meta), "
        "a .gguf file, or a name on the Hub expected"
    )


def test_damaged_files_are_named(tiny_directory, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("Some text that is no model. " * 10)
    with pytest.raises(InputError, match=r"text\.gguf"):
        load(path)
    directory = pathlib.Path(shutil.copytree(tiny_directory, tmp_path / "damaged"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="gpt2"):
        load(directory)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"dtype": "int8"},
            "dtype: 'int8' given; one of float32, bfloat16, float16, float64 expected",
        ),
        ({"dtype": "nonsense"}, "dtype: 'nonsense' given"),
        ({"dtype": jnp.int32}, "dtype: .* given"),
        ({"form": "scan"}, "form: 'scan' given; stacked or unrolled expected"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "hugging_face"])
def test_other_types_and_forms_are_refused(kind, settings, words, run, tiny_directory):
    load_unchecked = inspect.unwrap(load)  # the tests check types as well; users do not
    with pytest.raises(InputError, match=words):
        load_unchecked(run if kind == "run" else tiny_directory, **settings)
