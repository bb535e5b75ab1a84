"""What rematerialisation keeps of a layer for the backward pass, in bytes, and what it computes again, in FLOPs."""

from llama_jax.config import LlamaConfig
from llama_jax.model.remat import layer_parts, saved_names

_SHORT_SCORES = 512 * 512  # up to here attention keeps its scores, see `llama_jax.model.attention`
_ROOT_BYTES = 2 * 4  # of one token and layer: both norms keep the root of the mean square, float32, whatever else is kept
_SCORE_BYTES = 26  # of each: five arrays in float32, two masks, the softmax in the compute dtype


def activation_bytes(config: LlamaConfig, itemsize: int, tensor: int = 1) -> dict[str, float]:
    """Bytes of each named activation of one token in one layer, on one of `tensor` devices that share the heads.

    `context` brings along the float32 logsumexp of each head; of `middle`, as of the stream between blocks, each of the devices
    has some tokens.
    """
    query, key = config.heads * config.head_dim / tensor, config.kv_heads * config.head_dim / tensor
    ffn, heads = config.ffn_dim / tensor, config.heads / tensor
    wide = {"q": query, "k": key, "v": key, "context": query, "middle": config.dim / tensor, "gate": ffn, "up": ffn}
    return {name: size * itemsize + (4 * heads if name == "context" else 0) for name, size in wide.items()}


def saved_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes that one layer keeps of one token for the backward pass: its input, what `remat` names, and the roots in its norms.

    `none` keeps all that differentiation asks for, which is more than the names: both norms in float32 (before and after
    scaling) with the roots of their mean squares, the normed streams, and six arrays as wide as the feed-forward layer.

    Args:
      config: the architecture.
      remat: setting of `compute.remat`, without split.
      itemsize: bytes of a number of the activations.
      tensor: devices that share heads and feed-forward channels.
    """
    each = activation_bytes(config, itemsize, tensor)
    if remat != "none":
        return (config.dim * itemsize + _ROOT_BYTES) / tensor + sum(each[name] for name in saved_names(remat))
    streams = config.dim * (4 * 4 / tensor + 2 * itemsize) + 16 / tensor  # blocks gather what they have normed
    return streams + each["q"] + each["k"] + each["v"] + each["context"] + 3 * (each["gate"] + each["up"])


def all_saved_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes that all layers keep of one token; the setting may be a split."""
    parts = layer_parts(remat, config.layers)
    return sum(count * saved_bytes(config, each, itemsize, tensor) for count, each in parts)


def recomputed_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes of the named activations of one token that the backward pass makes again, in a layer that keeps least."""
    kept = frozenset.intersection(*(saved_names(each) for _, each in layer_parts(remat, config.layers)))
    return sum(size for name, size in activation_bytes(config, itemsize, tensor).items() if name not in kept)


def score_bytes(config: LlamaConfig, length: int, tensor: int = 1) -> float:
    """Bytes of one token's scores, masks and softmax in one layer, where rows are short enough for attention to keep them."""
    return _SCORE_BYTES * config.heads / tensor * length if length * length <= _SHORT_SCORES else 0.0


def recomputed_flops(config: LlamaConfig, remat: str, length: int) -> int:
    """FLOPs of one token, all layers, that the backward pass does a second time; attention counted as causal.

    The product with `down` is never among them: nothing in the backward pass needs what it gives.
    """
    dim = config.dim
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    costs = {"q": 2 * dim * query, "k": 2 * dim * key, "v": 2 * dim * key, "context": 2 * query * length,
             "middle": 2 * query * dim, "gate": 2 * dim * config.ffn_dim, "up": 2 * dim * config.ffn_dim}  # fmt: skip
    parts = [(count, saved_names(each)) for count, each in layer_parts(remat, config.layers)]
    return sum(count * sum(cost for name, cost in costs.items() if name not in kept) for count, kept in parts)
