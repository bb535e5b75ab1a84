"""Parameters, FLOPs and bytes of a LLaMA in closed form: one place for reports, metrics and
plans.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.config import LlamaConfig

Shapes = dict  # nested dict of shape tuples, the form of a parameter tree

REPORTING_THRESHOLD = 1e26  # FLOPs of a training, in the US executive order 14110 of 2023
# The matrices of a layer by name, in the order of use: what an adapter may stand over.
LAYER_MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def parameter_shapes(config: LlamaConfig) -> Shapes:
    """Shapes of the canonical parameter tree: 2-D weights, contraction first, layers stacked on a
    leading axis `L`.

    The model declares the same tree (a test holds the two together); readers of other formats check
    against this one.
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
            "feed_forward": {
                "gate": (length, dim, ffn),
                "up": (length, dim, ffn),
                "down": (length, ffn, dim),
            },
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
    """Parameters that multiply activations: the head counts (tied or not), the embedding lookup
    and the norms do not.
    """
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    per_layer = 2 * config.dim * query + 2 * config.dim * key + 3 * config.dim * config.ffn_dim
    return config.layers * per_layer + config.vocab_size * config.dim


def layer_matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the matrices of one layer, by name."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    dim, ffn = config.dim, config.ffn_dim
    sides = {
        "wq": (dim, query),
        "wk": (dim, key),
        "wv": (dim, key),
        "wo": (query, dim),
        "gate": (dim, ffn),
        "up": (dim, ffn),
        "down": (ffn, dim),
    }
    return {name: sides[name] for name in LAYER_MATRICES}


def training_flops_per_token(
    config: LlamaConfig,
    length: int,
    rank: int = 0,
    targets: Sequence[str] = LAYER_MATRICES,
    reference: bool = False,
) -> int:
    """FLOPs of forward and backward for one token of a sequence of `length` tokens, attention
    counted as causal.

    `6 * matmul_parameters + 6 * layers * heads * head_dim * length`; no recomputation is counted.
    Under adapters no gradient of a frozen matrix is formed: 4 instead of the first 6, and 6 for
    every parameter of the adapters.

    Args:
      config: the architecture.
      length: tokens of a sequence.
      rank: of adapters (LoRA); 0 for whole training.
      targets: matrices of a layer that have adapters.
      reference: whether the model without adapters is run forward beside it, as DPO does.
    """
    attention = config.layers * config.heads * config.head_dim * length
    if not rank:
        return 6 * matmul_parameters(config) + 6 * attention
    sides = layer_matrices(config)
    factors = config.layers * rank * sum(sum(sides[name]) for name in targets)
    passes = 4 + 2 * reference
    return passes * matmul_parameters(config) + (passes + 2) * attention + 6 * factors


def cache_bytes_per_token(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of keys and values that one token occupies in the cache, all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim * itemsize


class TrainingCompute(NamedTuple):
    """What a training costs, by the two usual formulas.

    Attributes:
      parameters: `N`, embedding and head included.
      tokens: `D`.
      six_n_d: `6 * N * D` FLOPs.
      causal: FLOPs by `training_flops_per_token`, all tokens; `None` where the architecture is not
        known.
      tokens_per_parameter: `D / N`; about 20 is best for a given amount of compute (Chinchilla,
        arXiv:2203.15556).
      threshold_share: `6 * N * D` as a share of 1e26, above which the US order of 2023 asked for a
        report.
    """

    parameters: int
    tokens: int
    six_n_d: float
    causal: float | None
    tokens_per_parameter: float
    threshold_share: float


def training_compute(
    parameters: int, tokens: int, config: LlamaConfig | None = None, length: int = 0
) -> TrainingCompute:
    """The compute of training a model on a number of tokens.

    Args:
      parameters: of the model, all of them.
      tokens: trained on.
      config: the architecture, where it is known, for the formula that counts attention.
      length: tokens of a sequence, for the same.
    """
    six_n_d = 6.0 * parameters * tokens
    causal = None if config is None else float(training_flops_per_token(config, length)) * tokens
    return TrainingCompute(
        parameters, tokens, six_n_d, causal, tokens / parameters, six_n_d / REPORTING_THRESHOLD
    )


def delivered_flops(hours: float, flops_per_second: float) -> float:
    """FLOPs that accelerators have done in a number of accelerator-hours."""
    return hours * 3600 * flops_per_second
