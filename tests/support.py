"""What several tests share: tiny architectures, the same weights in transformers, and the model
written out in float64.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.model.llama import Llama
from llama_jax.weights.assemble import unstack

LLAMA3_SCALING = RopeScaling(
    "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32
)
TINY = LlamaConfig(
    vocab_size=97,
    dim=48,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=10,
    ffn_dim=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context_length=128,
    tied_head=False,
)

# Every kind of head sharing, head, head width, rotary scaling and base that a LLaMA has.
VARIANTS = {
    "gqa-untied": TINY,
    "mha-untied": dataclasses.replace(TINY, kv_heads=6, head_dim=8),
    "mqa-tied": dataclasses.replace(TINY, kv_heads=1, tied_head=True),
    "gqa-tied-theta5e5": dataclasses.replace(TINY, kv_heads=3, tied_head=True, rope_theta=5e5),
    "linear": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3-factor8": dataclasses.replace(
        TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, head_dim=16
    ),
    "llama3-factor32-tied": dataclasses.replace(
        TINY,
        rope_theta=5e5,
        tied_head=True,
        rope_scaling=dataclasses.replace(LLAMA3_SCALING, factor=32.0),
    ),
    "eps1e-6-deep": dataclasses.replace(TINY, norm_eps=1e-6, layers=6, dim=24),
    "wide-head": dataclasses.replace(TINY, head_dim=32, heads=4, kv_heads=2),
}


@functools.cache
def _shapes(config: LlamaConfig):
    return jax.eval_shape(
        lambda: Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )["params"]


def _drawn(config: LlamaConfig, seed: int, std: float):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(center, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, _shapes(config))


def random_parameters(config: LlamaConfig, seed: int = 0, std: float = 0.15):
    """A stacked tree of weights large enough that every part of the model shows in the logits."""
    return jax.tree.map(jnp.asarray, _drawn(config, seed, std))


def unrolled_parameters(config: LlamaConfig, seed: int = 0, std: float = 0.15):
    """`unstack(random_parameters(...))`, without a compiled program for each slice."""
    return jax.tree.map(jnp.asarray, unstack(_drawn(config, seed, std)))


def shallow(model, layers: int = 1):
    """What `load` gave, without the later layers."""
    kept = {
        name: leaf
        for name, leaf in model.params.items()
        if int(name.partition("layers_")[2] or 0) < layers
    }
    return model._replace(config=dataclasses.replace(model.config, layers=layers), params=kept)


def random_tokens(config: LlamaConfig, shape: tuple[int, ...], seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


# --- the model in float64 ---


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position of each pair of channels; `llama3` pair by pair, as in Meta's
    llama-models.
    """
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    found = []
    for frequency in plain:
        turns = scaling.original_context * frequency / (2 * np.pi)
        if turns > scaling.high_freq_factor:
            found.append(frequency)
        elif turns < scaling.low_freq_factor:
            found.append(frequency / scaling.factor)
        else:
            smooth = (turns - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            found.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.asarray(found)


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _self_attention(x: np.ndarray, weights, config: LlamaConfig, seen: np.ndarray) -> np.ndarray:
    def heads(name: str, count: int, turn: bool) -> np.ndarray:
        """`[B, count, T, H]`; keys and queries as complex numbers turned by their positions."""
        out = (x @ weights[name]).reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)
        if not turn:
            return out
        half = config.head_dim // 2
        angles = np.arange(x.shape[1])[:, None] * _frequencies(config)
        turned = (out[..., :half] + 1j * out[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    group = config.heads // config.kv_heads
    q, k, v = (
        heads("wq", config.heads, True),
        heads("wk", config.kv_heads, True),
        heads("wv", config.kv_heads, False),
    )
    scores = q @ np.repeat(k, group, 1).swapaxes(2, 3) / np.sqrt(config.head_dim)
    scores = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    out = scores / scores.sum(-1, keepdims=True) @ np.repeat(v, group, 1)
    return out.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ weights["wo"]


def float64_states(params, inputs, config: LlamaConfig, documents=None) -> np.ndarray:
    """The residual stream before the first layer and after each layer, in NumPy; `inputs` are
    tokens or embeddings.
    """
    wide = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(np.float64), unstack(jax.tree.map(np.asarray, params))
    )
    inputs = np.asarray(inputs)
    x = wide["embedding"][inputs] if inputs.ndim == 2 else inputs.astype(np.float64)
    length = x.shape[1]
    seen = np.tril(np.ones((length, length), bool))[None, None]
    if documents is not None:
        seen = seen & (
            np.asarray(documents)[:, None, :, None] == np.asarray(documents)[:, None, None, :]
        )
    states = [x]
    for i in range(config.layers):
        layer = wide[f"layers_{i}"]
        x = x + _self_attention(
            _norm(x, layer["attention_norm"]["scale"], config.norm_eps),
            layer["attention"],
            config,
            seen,
        )
        inner, feed = (
            _norm(x, layer["feed_forward_norm"]["scale"], config.norm_eps),
            layer["feed_forward"],
        )
        gate = inner @ feed["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (inner @ feed["up"])) @ feed["down"]
        states.append(x)
    return np.stack(states)


def float64_logits(params, inputs, config: LlamaConfig, documents=None) -> np.ndarray:
    """Logits of the next token at every position, in NumPy: nothing is compiled, and no code of the
    model is used.
    """
    last = _norm(
        float64_states(params, inputs, config, documents)[-1],
        np.asarray(params["final_norm"]["scale"]),
        config.norm_eps,
    )
    head = np.asarray(params["embedding"]).T if config.tied_head else np.asarray(params["head"])
    return last @ head.astype(np.float64)


def float64_logprobs(params, tokens: Sequence[int], config: LlamaConfig) -> np.ndarray:
    """`[T, V]`: log-probabilities of what follows each token of one text."""
    logits = float64_logits(params, [list(tokens)], config)[0]
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def greedy_continues(
    params, prompt: Sequence[int], answer: Sequence[int], config: LlamaConfig
) -> bool:
    """Whether each token of an answer is the most probable one after all before it."""
    if not answer:
        return True
    best = float64_logits(params, [[*prompt, *answer][:-1]], config)[0].argmax(-1)
    return best[len(prompt) - 1 :].tolist() == list(answer)


def transformers_config(config: LlamaConfig):
    import transformers

    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tied_head,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def torch_name(path: tuple[str, ...]) -> str:
    """The name in transformers of the parameter at a path of the per-layer tree, e.g. ("layers_3",
    "attention", "wq").
    """
    top = {"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    if path[0] in top:
        return top[path[0]] + ".weight"
    inner = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    key = path[1] if path[-1] == "scale" else path[-1]
    return f"model.layers.{path[0].removeprefix('layers_')}.{inner[key]}.weight"


def torch_state(params) -> dict:
    """A parameter tree (either form) as a state dict of transformers' LlamaForCausalLM, `[out, in]`
    float32.
    """
    import torch

    state = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(
        unstack(jax.tree.map(np.asarray, params))
    )[0]:
        names = tuple(part.key for part in path)
        array = np.array(leaf, np.float32)
        state[torch_name(names)] = torch.from_numpy(
            array.T.copy() if array.ndim == 2 and names[0] != "embedding" else array
        )
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
