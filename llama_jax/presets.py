"""Every published text LLaMA as data, each number with its source.

Sources: LLaMA 1 - arXiv:2302.13971, table 2, and the `params.json` of the release (epsilon: 1e-6 up
  to 33B, 1e-5 for
65B); Llama 2 - arXiv:2307.09288 and `params.json`; Llama 3, 3.1 - arXiv:2407.21783, table 3, and
`params.json`; Llama 3.2, 3.3 - the `config.json` of the releases (3.2: head tied, RoPE factor 32,
where 3.1 and 3.3 have 8). SmolLM2 and TinyLlama have the same architecture and are small and open;
their numbers are those of their `config.json`.
"""

import dataclasses
import difflib

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling(
        "llama3", factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )


def _llama1(dim: int, layers: int, heads: int, ffn_dim: int, norm_eps: float) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_eps=norm_eps,
        rope_theta=1e4,
        rope_scaling=None,
        context_length=2048,
        tied_head=False,
    )


def _llama2(dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        context_length=4096,
        tied_head=False,
    )


def _llama3(
    dim: int, layers: int, heads: int, head_dim: int, ffn_dim: int, tied_head: bool = False
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        context_length=8192,
        tied_head=tied_head,
    )


def _long(config: LlamaConfig, factor: float) -> LlamaConfig:
    """The 128k-token successor of a Llama 3: the same shapes with stretched rotary frequencies."""
    return dataclasses.replace(config, rope_scaling=_llama3_scaling(factor), context_length=131072)


_LLAMA3_8B = _llama3(4096, 32, 32, 128, 14336)
_LLAMA3_70B = _llama3(8192, 80, 64, 128, 28672)

PRESETS: dict[str, LlamaConfig] = {
    "llama-7b": _llama1(4096, 32, 32, 11008, 1e-6),
    "llama-13b": _llama1(5120, 40, 40, 13824, 1e-6),
    "llama-33b": _llama1(6656, 60, 52, 17920, 1e-6),
    "llama-65b": _llama1(8192, 80, 64, 22016, 1e-5),
    "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": _long(_LLAMA3_8B, 8.0),
    "llama3.1-70b": _long(_LLAMA3_70B, 8.0),
    "llama3.1-405b": _long(_llama3(16384, 126, 128, 128, 53248), 8.0),
    "llama3.2-1b": _long(_llama3(2048, 16, 32, 64, 8192, tied_head=True), 32.0),
    "llama3.2-3b": _long(_llama3(3072, 28, 24, 128, 8192, tied_head=True), 32.0),
    "llama3.3-70b": _long(_LLAMA3_70B, 8.0),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        dim=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        norm_eps=1e-5,
        rope_theta=1e5,
        rope_scaling=None,
        context_length=8192,
        tied_head=True,
    ),
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        dim=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        head_dim=64,
        ffn_dim=5632,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        context_length=2048,
        tied_head=False,
    ),
}


def preset(name: str) -> LlamaConfig:
    """The architecture published under a name such as `llama3.2-1b`.

    Raises:
      InputError: for an unknown name, with the nearest known ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or sorted(PRESETS)
    raise InputError(f"preset {name!r} is unknown; the nearest are {', '.join(near)}")


def name_of(config: LlamaConfig) -> str | None:
    """The first preset with exactly this architecture, or `None`."""
    return next((name for name, known in PRESETS.items() if known == config), None)
