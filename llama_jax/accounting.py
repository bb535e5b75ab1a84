"""Parameters, FLOPs and bytes of a LLaMA in closed form: one place for reports, metrics and plans."""

import math

from llama_jax.config import LlamaConfig

Shapes = dict  # nested dict of shape tuples, the form of a parameter tree

# The matrices of a layer by name, in the order of use: what an adapter may stand over.
LAYER_MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def parameter_shapes(config: LlamaConfig) -> Shapes:
    """Shapes of the canonical parameter tree: 2-D weights, contraction first, layers stacked on a leading axis `L`.

    The model declares the same tree (a test holds the two together); readers of other formats check against this one.
    """
    length, dim, ffn = config.layers, config.dim, config.ffn_dim
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {
        "embedding": (config.vocab_size, dim),
        "layers": {
            "attention_norm": {"scale": (length, dim)},
            "attention": {
                "wq": (length, dim, query),
                "wk": (length, dim, key),
                "wv": (length, dim, key),
                "wo": (length, query, dim),
            },
            "feed_forward_norm": {"scale": (length, dim)},
            "feed_forward": {"gate": (length, dim, ffn), "up": (length, dim, ffn), "down": (length, ffn, dim)},
        },
        "final_norm": {"scale": (dim,)},
    }
    return shapes if config.tied_head else {**shapes, "head": (dim, config.vocab_size)}


def parameter_count(config: LlamaConfig) -> int:
    """Parameters in all; a tied head counts once."""

    def count(shapes: Shapes) -> int:
        """Parameters below one node of the tree."""
        return sum(count(s) if isinstance(s, dict) else math.prod(s) for s in shapes.values())

    return count(parameter_shapes(config))


def matmul_parameters(config: LlamaConfig) -> int:
    """Parameters that multiply activations: the head counts (tied or not), the embedding look-up and the norms do not."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    per_layer = 2 * config.dim * query + 2 * config.dim * key + 3 * config.dim * config.ffn_dim
    return config.layers * per_layer + config.vocab_size * config.dim


def training_flops_per_token(config: LlamaConfig, length: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of `length` tokens, attention counted as causal.

    `6 * matmul_parameters + 6 * layers * heads * head_dim * length`; no recomputation is counted.
    """
    return 6 * matmul_parameters(config) + 6 * config.layers * config.heads * config.head_dim * length


def cache_bytes_per_token(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of keys and values that one token occupies in the cache, all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim * itemsize
