"""Tiny models as Meta publishes them, written by torch.save, and Meta's own reference to compare
with.
"""

import importlib
import json
import pathlib
import sys
import types

import jax
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling

_SCALING = RopeScaling(
    "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)


def _family(kv_heads, theta, scaling, context, tied=False, eps=1e-5) -> LlamaConfig:
    """Widths of which eight shards hold equal parts, and unequal ones wherever an axis could be
    taken for another.
    """
    return LlamaConfig(
        vocab_size=96,
        dim=64,
        layers=2,
        heads=8,
        kv_heads=kv_heads,
        head_dim=8,
        ffn_dim=176,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=context,
        tied_head=tied,
    )


# One tiny model of each family. Eight shards of four key/value heads hold copies of them.
FAMILIES = {
    "llama": _family(8, 1e4, None, 2048, eps=1e-6),
    "llama2": _family(4, 1e4, None, 2048),
    "llama3": _family(4, 5e5, None, 8192),
    "llama3.1": _family(4, 5e5, _SCALING, 131072),
    "llama3.2": _family(4, 5e5, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), 131072, tied=True),
}


def embedding_axis(config: LlamaConfig) -> int:
    """Along which axis Meta cut the embedding table: in LLaMA 1 and 2 along its width, later along
    the vocabulary.
    """
    return 1 if config.rope_theta == 1e4 else 0


def declared(config: LlamaConfig, **changed) -> dict:
    """`params.json` of a model, with some keys changed, or left out where they are None."""
    values = {
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": -1,
        "multiple_of": 16,
        "norm_eps": config.norm_eps,
    }
    if config.rope_theta != 1e4:
        values |= {"rope_theta": config.rope_theta, "vocab_size": config.vocab_size}
    if config.rope_scaling:
        values |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_scaling.factor}
    return {key: value for key, value in (values | changed).items() if value is not None}


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with rotary halves, reordered to adjacent pairs."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).transpose(0, 2, 1, 3).reshape(rows.shape)


def meta_tensors(config: LlamaConfig, params) -> dict[str, np.ndarray]:
    """A stacked tree under Meta's names, `[out, in]`, in adjacent pairs."""
    params = jax.device_get(params)
    tensors = {
        "tok_embeddings.weight": params["embedding"],
        "norm.weight": params["final_norm"]["scale"],
    }
    if not config.tied_head:
        tensors["output.weight"] = params["head"].T
    attention, feed_forward = params["layers"]["attention"], params["layers"]["feed_forward"]
    for layer in range(config.layers):
        for ours, theirs, heads in (
            ("wq", "wq", config.heads),
            ("wk", "wk", config.kv_heads),
            ("wv", "wv", 0),
            ("wo", "wo", 0),
        ):
            rows = attention[ours][layer].T
            tensors[f"layers.{layer}.attention.{theirs}.weight"] = (
                pairs(rows, heads) if heads else rows
            )
        for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            tensors[f"layers.{layer}.feed_forward.{theirs}.weight"] = feed_forward[ours][layer].T
        tensors[f"layers.{layer}.attention_norm.weight"] = params["layers"]["attention_norm"][
            "scale"
        ][layer]
        tensors[f"layers.{layer}.ffn_norm.weight"] = params["layers"]["feed_forward_norm"]["scale"][
            layer
        ]
    return {name: np.array(tensor, np.float32, order="C") for name, tensor in tensors.items()}


def part(name: str, tensor: np.ndarray, number: int, count: int, config: LlamaConfig) -> np.ndarray:
    """What shard `number` of `count` holds of a tensor."""
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        return tensor
    if kind in ("wk", "wv") and count > config.kv_heads:
        head = number * config.kv_heads // count
        return tensor[head * config.head_dim : (head + 1) * config.head_dim]
    axis = embedding_axis(config) if kind == "tok_embeddings" else int(kind in ("wo", "w2"))
    return np.split(tensor, count, axis)[number]


def shards(config: LlamaConfig, params, count: int = 1) -> list[dict[str, np.ndarray]]:
    """The tensors of every shard."""
    tensors = meta_tensors(config, params)
    return [
        {name: part(name, tensor, number, count, config) for name, tensor in tensors.items()}
        for number in range(count)
    ]


def save(path: pathlib.Path, tensors, dtype: str = "float32") -> None:
    """torch.save of a state dict."""
    import torch

    torch.save(
        {name: torch.tensor(tensor).to(getattr(torch, dtype)) for name, tensor in tensors.items()},
        path,
    )


def write_meta(
    directory: pathlib.Path, config: LlamaConfig, params, count: int = 1, dtype: str = "float32"
) -> pathlib.Path:
    """A directory of Meta's with `count` shards, `rope.freqs` in them as in the older files."""
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(declared(config)))
    for number, tensors in enumerate(shards(config, params, count)):
        save(
            directory / f"consolidated.{number:02}.pth",
            {**tensors, "rope.freqs": np.ones(4)},
            dtype,
        )
    return directory


def _fairscale() -> dict[str, types.ModuleType]:
    """The few names of fairscale that Meta's code imports, for one process."""
    import torch

    names = (
        "fairscale",
        "fairscale.nn",
        "fairscale.nn.model_parallel",
        "fairscale.nn.model_parallel.initialize",
        "fairscale.nn.model_parallel.layers",
    )
    modules = {name: types.ModuleType(name) for name in names}
    initialize, layers = modules[names[3]], modules[names[4]]
    modules[names[2]].initialize = initialize
    initialize.get_model_parallel_world_size, initialize.get_model_parallel_rank = (
        lambda: 1,
        lambda: 0,
    )
    layers.ColumnParallelLinear = layers.RowParallelLinear = lambda *sizes, **_: torch.nn.Linear(
        *sizes, bias=False
    )
    layers.VocabParallelEmbedding = lambda *sizes, **_: torch.nn.Embedding(*sizes)
    return modules


def metas_own(module: str, monkeypatch) -> types.ModuleType:
    """A module of `llama_models` that needs fairscale."""
    for name, stand_in in _fairscale().items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, f"llama_models.{module}", raising=False)
    return importlib.import_module(f"llama_models.{module}")


def metas_logits(config: LlamaConfig, tensors, tokens: np.ndarray, monkeypatch) -> np.ndarray:
    """Logits of Meta's own Transformer with these tensors, `[B, T, V]`; the factor of its scaling
    is written into it: 8.
    """
    import torch

    model_file = metas_own("llama3.model", monkeypatch)
    arguments = importlib.import_module("llama_models.llama3.args").ModelArgs(
        **declared(
            config,
            vocab_size=config.vocab_size,
            rope_theta=config.rope_theta,
            max_batch_size=len(tokens),
            max_seq_len=tokens.shape[1],
        )
    )
    model = model_file.Transformer(arguments)
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    model.load_state_dict(state)
    return model(torch.tensor(tokens, dtype=torch.long), 0).numpy()
