"""Whole parameter trees, in both forms, against what transformers saved and the original library
decodes.
"""

import dataclasses
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import weakref

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from meta_files import declared, part
from safetensors.numpy import save_file

from llama_jax.accounting import parameter_count, parameter_shapes
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.presets import preset
from llama_jax.weights.assemble import assemble
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hf_read import NAMES, HuggingFaceSource, config_from_hugging_face
from llama_jax.weights.meta import NAMES as META_NAMES
from llama_jax.weights.source import file_shapes

PROC = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
LAYER = {
    "attention_norm/scale": "input_layernorm",
    "feed_forward_norm/scale": "post_attention_layernorm",
    "attention/wq": "self_attn.q_proj",
    "attention/wk": "self_attn.k_proj",
    "attention/wv": "self_attn.v_proj",
    "attention/wo": "self_attn.o_proj",
    "feed_forward/gate": "mlp.gate_proj",
    "feed_forward/up": "mlp.up_proj",
    "feed_forward/down": "mlp.down_proj",
}


def saved_model(directory, dtype: str, tied: bool, **options) -> dict[str, np.ndarray]:
    """Saves a random tiny model with transformers; returns its state, float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=72,
        intermediate_size=136,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, **options)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def unrolled_values(state: dict[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """The unrolled tree, flat, by the names of transformers."""
    expected = {
        "embedding": state["model.embed_tokens.weight"],
        "final_norm/scale": state["model.norm.weight"],
    }
    expected |= {} if tied else {"head": state["lm_head.weight"].T}
    return expected | {
        f"layers_{layer}/{ours}": state[f"model.layers.{layer}.{theirs}.weight"].T
        for layer in range(3)
        for ours, theirs in LAYER.items()
    }


@pytest.mark.parity
@pytest.mark.parametrize(
    ("dtype", "tied", "shard"),
    [
        ("float32", False, "5GB"),
        ("bfloat16", True, "40KB"),
        ("float32", True, "50KB"),
        ("bfloat16", False, "5GB"),
    ],
)
def test_trees_hold_what_transformers_saved(tmp_path, dtype, tied, shard):
    state = saved_model(tmp_path, dtype, tied, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    source = HuggingFaceSource.open(tmp_path)
    unrolled = flatten_dict(assemble(source, "unrolled", dtype), sep="/")
    stacked = flatten_dict(assemble(source, "stacked", dtype), sep="/")
    expected = unrolled_values(state, tied)
    assert unrolled.keys() == expected.keys()
    for path, tensor in unrolled.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(np.asarray(tensor, np.float32), expected[path])
    assert {path: tensor.shape for path, tensor in stacked.items()} == flatten_dict(
        parameter_shapes(source.config), sep="/"
    )
    for path, tensor in stacked.items():
        layers = [expected[path.replace("layers", f"layers_{layer}")] for layer in range(3)]
        np.testing.assert_array_equal(
            np.asarray(tensor, np.float32), np.stack(layers) if "layers" in path else layers[0]
        )


@pytest.mark.smollm2
def test_real_weights_equal_the_original_librarys(smollm2_gguf, original):
    source = GgufSource.open(smollm2_gguf)
    tree = assemble(source, "stacked", jnp.float32)
    assert jax.tree.map(np.shape, tree) == parameter_shapes(source.config)
    wanted = (
        "token_embd.weight",
        "blk.7.ffn_down.weight",
        "blk.7.attn_v.weight",
        "blk.29.attn_norm.weight",
    )
    originals = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in original.tensors
        if tensor.name in wanted
    }
    layers = tree["layers"]
    ours = (
        tree["embedding"],
        layers["feed_forward"]["down"][7].T,
        layers["attention"]["wv"][7].T,
        layers["attention_norm"]["scale"][29],
    )
    for name, tensor in zip(wanted, ours):
        np.testing.assert_array_equal(tensor, originals[name])


def test_types_are_rounded_as_by_numpy(write_gguf, tensors):
    tree = assemble(GgufSource.open(write_gguf()), "stacked", jnp.bfloat16)
    np.testing.assert_array_equal(
        tree["head"], tensors["output.weight"].T.astype(ml_dtypes.bfloat16)
    )


def test_trees_outlive_the_file(write_gguf, tensors):
    """Nothing placed refers to the mapped file: overwriting it in place changes no weight."""
    path = write_gguf()
    tree = assemble(GgufSource.open(path), "unrolled", jnp.float32)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(tree["embedding"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(tree["final_norm"]["scale"], tensors["output_norm.weight"])


# Which mesh axes cut which dimension of a matrix in training: parallel.sharding's table, written
# out. Rows and columns by mesh axes; matrices that are gathered for use are split along one side,
# by rows or by columns.
BOTH = ("tensor", "fsdp")
CUTS = {
    "embedding": (BOTH, ()),
    "head": (("fsdp",), ("tensor",)),
    "wq": ((), BOTH),
    "wk": ((), BOTH),
    "wv": ((), BOTH),
    "wo": (BOTH, ()),
    "gate": (("fsdp",), ("tensor",)),
    "up": (("fsdp",), ("tensor",)),
    "down": (BOTH, ()),
    "scale": ((),),
}


@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_shards_land_where_the_table_says(write_gguf, form):
    """On eight devices as 2 x 2 x 2: every shard is the slice that its place in the mesh asks
    for.
    """
    source = GgufSource.open(write_gguf())
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole = flatten_dict(assemble(source, form, jnp.float32), sep="/")
    sharded = flatten_dict(assemble(source, form, jnp.float32, mesh), sep="/")
    assert sharded.keys() == whole.keys()
    places = {
        device: dict(zip(mesh.axis_names, place)) for place, device in np.ndenumerate(mesh.devices)
    }
    for path, array in sharded.items():
        cuts = ((),) * path.startswith("layers/") + CUTS[path.split("/")[-1]]
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            expected = np.asarray(whole[path])
            for axis, cut in enumerate(cuts):
                for name in cut:
                    expected = np.split(expected, 2, axis)[places[shard.device][name]]
            np.testing.assert_array_equal(shard.data, expected)


def test_a_mesh_that_does_not_divide_the_model_is_refused(write_gguf):
    source = GgufSource.open(write_gguf())
    with pytest.raises(InputError, match=r"tensor of size 8 does not divide heads \(4\)"):
        assemble(source, "stacked", jnp.float32, make_mesh(fsdp=1, tensor=8))


def test_without_a_mesh_arrays_may_go_anywhere(write_gguf):
    """They are not bound to the device that they were put on."""
    tree = assemble(GgufSource.open(write_gguf()), "unrolled", jnp.float32)
    assert not any(leaf.committed for leaf in jax.tree.leaves(tree))


# Reads models and waits; its parent looks at its memory meanwhile. A first model, of another size,
# warms all machinery up.
CHILD = """
import gc, json, sys
import jax
from llama_jax.weights.load import load
for line in sys.stdin:
    small, path, form = json.loads(line)
    load(small, "bfloat16", form)
    gc.collect()
    print("ready", flush=True), sys.stdin.readline()
    tree = load(path, "bfloat16", form).params
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), flush=True), sys.stdin.readline()
    del tree
"""


def _private_bytes(process) -> int:
    """Memory of a process that is no page of a file; those come and go as the system likes."""
    lines = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def loader():
    """A process of its own that loads one model after the other."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Arrays have pages of their own, which go back when they are freed: holes in the heap are no
    # memory that loading needs.
    allocation = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **allocation}
    with subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


def peak_beyond_result(process, *arguments: str | pathlib.Path) -> tuple[int, int]:
    """Most memory that loading takes in the process, without the parameters, and their bytes."""
    print(json.dumps([*map(str, arguments)]), file=process.stdin, flush=True)
    assert process.stdout.readline() == "ready\n"
    before = peak = _private_bytes(process)
    print(file=process.stdin, flush=True)
    while not select.select([process.stdout], [], [], 0.001)[0]:
        peak = max(peak, _private_bytes(process))
    result = int(process.stdout.readline())
    peak = max(peak, _private_bytes(process))
    print(file=process.stdin, flush=True)
    return peak - before - result, result


SIZES = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
LARGEST = 8192 * 1024 * 2  # bytes of the embedding, the largest tensor, in bfloat16


def filled(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Numbers that are no two alike in a row."""
    return np.resize(np.arange(16000, dtype=dtype), shape)


def write_hugging_face(directory: pathlib.Path, values: dict) -> pathlib.Path:
    shapes = file_shapes(config_from_hugging_face(values), NAMES)
    tensors = {
        name: filled(shape, np.uint16).view(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> list[pathlib.Path]:
    """A small model and a large one, of Hugging Face's."""
    directory = tmp_path_factory.mktemp("hub")
    small = write_hugging_face(
        directory / "small", SIZES | {"hidden_size": 64, "num_hidden_layers": 2}
    )
    return [small, write_hugging_face(directory / "large", SIZES)]


@PROC
@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_beside_the_parameters_about_one_tensor_of_one_layer_is_in_memory(loader, hub, form):
    """186 MB of bfloat16. The bound: the largest tensor and 24 MB for compiled programs and for
    holes in the heap.
    """
    beyond, result = peak_beyond_result(loader, *hub, form)
    assert result == 185_620_480
    assert beyond < LARGEST + (24 << 20)


RUN = SIZES | {"hidden_size": 768}
STACKED = (
    RUN["num_hidden_layers"] * 768 * 4096 * 4
)  # bytes of a matrix of all layers in float32, as a run holds it


def write_run(directory: pathlib.Path, values: dict, tokenizer: pathlib.Path) -> pathlib.Path:
    config = config_from_hugging_face(values)
    shapes = flatten_dict(parameter_shapes(config), sep="/")
    flat = {path: jnp.asarray(filled(shape, np.float32)) for path, shape in shapes.items()}
    with Checkpoints.open(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(
            1, {"params": unflatten_dict(flat, sep="/")}, {"model": dataclasses.asdict(config)}
        )
    shutil.copy(tokenizer / "tokenizer.json", directory)
    return directory


@PROC
def test_a_run_is_restored_one_array_at_a_time(loader, tmp_path, tiny_directory):
    """278 MB of float32 become 139 MB. The bound: an array as it is read, as it is, as it is cast,
    and 24 MB.
    """
    small = write_run(
        tmp_path / "small", SIZES | {"hidden_size": 64, "num_hidden_layers": 2}, tiny_directory
    )
    path = write_run(tmp_path / "large", RUN, tiny_directory)
    beyond, result = peak_beyond_result(loader, small, path, "unrolled")
    assert result == 139_215_360
    assert beyond < 3 * STACKED + (24 << 20)


def write_shards(directory: pathlib.Path, values: dict, count: int) -> pathlib.Path:
    """Meta's files of a model, cut as theirs are; the head is another than the embedding, whose
    copy would not be kept.
    """
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(config_from_hugging_face(values), rope_theta=5e5)
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(declared(config, ffn_dim_multiplier=None)))
    tensors = {
        name: np.broadcast_to(np.float32(1), shape)
        for name, shape in file_shapes(config, META_NAMES).items()
    }
    for number in range(count):
        shard = {
            name: torch.full(
                part(name, tensor, number, count, config).shape, len(name), dtype=torch.bfloat16
            )
            for name, tensor in tensors.items()
        }
        torch.save(shard, directory / f"consolidated.{number:02}.pth")
    return directory


@pytest.fixture(scope="module")
def metas(tmp_path_factory) -> list[pathlib.Path]:
    """A small model and a large one, of Meta's, in two files each."""
    directory = tmp_path_factory.mktemp("meta")
    small = write_shards(
        directory / "small", SIZES | {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 4}, 2
    )
    return [small, write_shards(directory / "large", SIZES, 2)]


@PROC
@pytest.mark.parametrize("form", ["stacked", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_metas_shards_are_joined_one_tensor_at_a_time(loader, metas, form):
    """186 MB of bfloat16 in two files. The bound: the largest tensor, joined and copied, and 24
    MB.
    """
    beyond, result = peak_beyond_result(loader, *metas, form)
    assert result == 185_620_480
    assert beyond < 2 * LARGEST + (24 << 20)


@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_each_leaf_is_finished_before_the_next_is_read(write_gguf, form):
    """What finishes leaves sees each under its path, and what it returns is the tree; no wide array
    outlives its turn.
    """
    seen: dict[str, weakref.ref] = {}

    def finish(path, leaf):
        assert not any(reference() is not None for reference in seen.values())
        seen[path] = weakref.ref(leaf)
        return leaf.shape

    source = GgufSource.open(write_gguf())
    shapes = flatten_dict(assemble(source, form, jnp.float32, finish=finish), sep="/")
    assert shapes == {
        path: leaf.shape
        for path, leaf in flatten_dict(assemble(source, form, jnp.float32), sep="/").items()
    }
    assert seen.keys() == shapes.keys()


@pytest.mark.smollm2
@PROC
def test_a_quantised_file_is_widened_one_tensor_at_a_time(loader, tmp_path, smollm2_gguf):
    """The bound: the largest tensor in float32, as it is decoded, and 24 MB."""
    small = write_hugging_face(
        tmp_path / "small", SIZES | {"hidden_size": 64, "num_hidden_layers": 2}
    )
    beyond, result = peak_beyond_result(loader, small, smollm2_gguf, "stacked")
    assert result == 2 * parameter_count(preset("smollm2-135m"))
    assert beyond < 49152 * 576 * 4 + (24 << 20)
