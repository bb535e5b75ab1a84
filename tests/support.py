"""What several tests share: tiny architectures, and the same weights in transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.model.llama import Llama
from llama_jax.weights.forms import stack

LLAMA3_SCALING = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
TINY = LlamaConfig(vocab_size=97, dim=48, layers=3, heads=6, kv_heads=2, head_dim=10, ffn_dim=64, norm_eps=1e-5,
                   rope_theta=1e4, rope_scaling=None, context_length=128, tied_head=False)  # fmt: skip

# Every kind of head sharing, head, head width, rotary scaling and base that a LLaMA has.
VARIANTS = {
    "gqa-untied": TINY,
    "mha-untied": dataclasses.replace(TINY, kv_heads=6, head_dim=8),
    "mqa-tied": dataclasses.replace(TINY, kv_heads=1, tied_head=True),
    "gqa-tied-theta5e5": dataclasses.replace(TINY, kv_heads=3, tied_head=True, rope_theta=5e5),
    "linear": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3-factor8": dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, head_dim=16),
    "llama3-factor32-tied": dataclasses.replace(
        TINY, rope_theta=5e5, tied_head=True, rope_scaling=dataclasses.replace(LLAMA3_SCALING, factor=32.0)
    ),
    "eps1e-6-deep": dataclasses.replace(TINY, norm_eps=1e-6, layers=6, dim=24),
    "wide-head": dataclasses.replace(TINY, head_dim=32, heads=4, kv_heads=2),
}


def random_parameters(config: LlamaConfig, seed: int = 0, std: float = 0.15):
    """A stacked tree of weights large enough that every part of the model shows in the logits."""
    shapes = jax.eval_shape(lambda: Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(center, std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(config: LlamaConfig, shape: tuple[int, ...], seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


def transformers_config(config: LlamaConfig):
    import transformers

    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_context}  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim, intermediate_size=config.ffn_dim,
        rms_norm_eps=config.norm_eps, rope_parameters=rope, max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tied_head, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None)  # fmt: skip


def torch_name(path: tuple[str, ...]) -> str:
    """The name in transformers of the parameter at a path of the per-layer tree, e.g. ("layers_3", "attention", "wq")."""
    top = {"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    if path[0] in top:
        return top[path[0]] + ".weight"
    inner = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
             "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "gate": "mlp.gate_proj",
             "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
    key = path[1] if path[-1] == "scale" else path[-1]
    return f"model.layers.{path[0].removeprefix('layers_')}.{inner[key]}.weight"


def torch_state(params) -> dict:
    """A parameter tree (either form) as a state dict of transformers' LlamaForCausalLM, `[out, in]` float32."""
    import torch

    from llama_jax.weights.forms import unstack

    state = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(unstack(stack(params)))[0]:
        names = tuple(part.key for part in path)
        array = np.array(leaf, np.float32)
        state[torch_name(names)] = torch.from_numpy(array.T.copy() if array.ndim == 2 and names[0] != "embedding" else array)
    return state


def transformers_model(config: LlamaConfig, params):
    """transformers' LlamaForCausalLM in float32 with the same weights."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers_config(config)).to(torch.float32).eval()
    missing, unexpected = model.load_state_dict(torch_state(params), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied_head else set())
    if config.tied_head:
        model.tie_weights()
    return model
