"""Whole parameter trees, in both forms, against what transformers saved and the original library decodes."""

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llama_jax.accounting import parameter_shapes
from llama_jax.weights.assemble import assemble
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hugging_face import HuggingFaceSource
from llama_jax.weights.source import flat_shapes

LAYER = {
    "attention_norm/scale": "input_layernorm", "feed_forward_norm/scale": "post_attention_layernorm",
    "attention/wq": "self_attn.q_proj", "attention/wk": "self_attn.k_proj", "attention/wv": "self_attn.v_proj",
    "attention/wo": "self_attn.o_proj",
    "feed_forward/gate": "mlp.gate_proj", "feed_forward/up": "mlp.up_proj", "feed_forward/down": "mlp.down_proj",
}  # fmt: skip


def saved_model(directory, dtype: str, tied: bool, **options) -> dict[str, np.ndarray]:
    """Saves a random tiny model with transformers; returns its state, float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=72, intermediate_size=136, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, **options)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def unrolled_values(state: dict[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """The unrolled tree, flat, by the names of transformers."""
    expected = {"embedding": state["model.embed_tokens.weight"], "final_norm/scale": state["model.norm.weight"]}
    expected |= {} if tied else {"head": state["lm_head.weight"].T}
    return expected | {f"layers_{layer}/{ours}": state[f"model.layers.{layer}.{theirs}.weight"].T
                       for layer in range(3) for ours, theirs in LAYER.items()}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tied", "shard"), [("float32", False, "5GB"), ("bfloat16", True, "40KB"),
                                                      ("float32", True, "50KB"), ("bfloat16", False, "5GB")])  # fmt: skip
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
    assert {path: tensor.shape for path, tensor in stacked.items()} == flatten_dict(parameter_shapes(source.config), sep="/")
    for path, tensor in stacked.items():
        layers = [expected[path.replace("layers", f"layers_{layer}")] for layer in range(3)]
        np.testing.assert_array_equal(np.asarray(tensor, np.float32), np.stack(layers) if "layers" in path else layers[0])


@pytest.mark.smollm2
def test_real_weights_equal_the_original_librarys(smollm2_gguf, original):
    source = GgufSource.open(smollm2_gguf)
    tree = assemble(source, "stacked", jnp.float32)
    assert jax.tree.map(np.shape, tree) == parameter_shapes(source.config)
    wanted = ("token_embd.weight", "blk.7.ffn_down.weight", "blk.7.attn_v.weight", "blk.29.attn_norm.weight")
    originals = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in original.tensors
        if tensor.name in wanted
    }
    layers = tree["layers"]
    ours = (tree["embedding"], layers["feed_forward"]["down"][7].T, layers["attention"]["wv"][7].T,
            layers["attention_norm"]["scale"][29])  # fmt: skip
    for name, tensor in zip(wanted, ours):
        np.testing.assert_array_equal(tensor, originals[name])


def test_types_are_rounded_as_by_numpy(write_gguf, tensors):
    tree = assemble(GgufSource.open(write_gguf()), "stacked", jnp.bfloat16)
    np.testing.assert_array_equal(tree["head"], tensors["output.weight"].T.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_placement_sees_every_path_once_and_decides_the_result(write_gguf, form):
    source = GgufSource.open(write_gguf())
    seen = {}

    def place(name, tensor):
        assert name not in seen
        seen[name] = tensor
        return jnp.full((), len(seen))

    tree = assemble(source, form, jnp.float32, place)
    assert flatten_dict(tree, sep="/") == {name: number + 1 for number, name in enumerate(seen)}
    assert len(seen) == (len(flat_shapes(source.config)) if form == "stacked" else 3 + 9 * source.config.layers)
    assert all(tensor.flags.c_contiguous for tensor in seen.values())


def test_trees_outlive_the_file(write_gguf, tensors):
    """Nothing placed refers to the mapped file: overwriting it in place changes no weight."""
    path = write_gguf()
    tree = assemble(GgufSource.open(path), "unrolled", jnp.float32)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(tree["embedding"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(tree["final_norm"]["scale"], tensors["output_norm.weight"])


def test_one_tensor_at_a_time_is_on_the_host(write_gguf):
    """Beside the placed arrays, about one stacked tensor exists at a time."""
    import tracemalloc

    random = np.random.default_rng(7)
    shapes = {"ffn_gate": (1024, 64), "ffn_up": (1024, 64), "ffn_down": (64, 1024)}
    wide = {f"blk.{layer}.{name}.weight": random.standard_normal(shape, np.float32)
            for layer in range(2) for name, shape in shapes.items()}  # fmt: skip
    types = dict.fromkeys(wide, "Q8_0")
    source = GgufSource.open(write_gguf({"llama.feed_forward_length": 1024}, wide, types))
    largest = 2 * 1024 * 64 * 4
    tracemalloc.start()
    assemble(source, "stacked", jnp.float32, lambda name, tensor: jnp.zeros(()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest
