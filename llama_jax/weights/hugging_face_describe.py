"""What a Hugging Face directory says about a model beside its weights: configuration, generation, model card.

`config.json` is written for transformers 4 and 5 alike: version 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`,
version 5 `rope_parameters` and `dtype`. Both spellings are there and say the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax import __version__
from llama_jax.accounting import parameter_count
from llama_jax.config import LlamaConfig

# transformers' only use of it is to draw new weights; this is the standard deviation that it takes for a LLaMA.
_INITIALIZER_RANGE = 0.02


class TokenIds(NamedTuple):
    """Special tokens as a model's files name them.

    Attributes:
      begin: begins a text, or `None`.
      stops: each of them ends an answer.
      pad: fills rows of a batch, or `None`.
    """

    begin: int | None
    stops: tuple[int, ...]
    pad: int | None


def config_values(config: LlamaConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
    """The values of `config.json`.

    Args:
      config: the architecture.
      dtype: name of the dtype that (most of) the weights have.
      tokens: special tokens; several stops become a list.
    """
    scaling = _rope_scaling(config)
    rope = {"rope_theta": float(config.rope_theta), **(scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.begin,
        "dtype": dtype,
        "eos_token_id": _one_or_several(tokens.stops),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": _INITIALIZER_RANGE,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": tokens.pad,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def generation_values(tokens: TokenIds, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `generation_config.json`: every token that ends an answer.

    Args:
      tokens: special tokens.
      declared: what the model's files said before, such as a temperature; kept.
    """
    ids = {"bos_token_id": tokens.begin, "eos_token_id": _one_or_several(tokens.stops), "pad_token_id": tokens.pad}
    return {**declared, **{name: value for name, value in ids.items() if value is not None}}


def model_card(name: str, origin: str, config: LlamaConfig, dtype: str, chat: bool) -> str:
    """The text of `README.md`, with the front matter that hubs read.

    Args:
      name: of the model.
      origin: one line that says what it was made from.
      config: the architecture.
      dtype: name of the dtype of the weights.
      chat: whether it has a chat template.
    """
    rows = "\n".join(f"| {key} | {value} |" for key, value in _facts(config, dtype, chat).items())
    return _CARD.format(name=_one_line(name), origin=_one_line(origin), version=__version__, rows=rows)


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
---

# {name}

A language model of the LLaMA architecture, made from {origin} and written by llama_jax {version}.
The terms of the weights it was made from apply to it.

| | |
|---|---|
{rows}

With transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", dtype="auto")
```

With llama_jax:

```python
import llama_jax

model = llama_jax.load("path/to/this/directory")
print(llama_jax.generate(model, ["Once upon a time"])[0].text)
```
"""


def _facts(config: LlamaConfig, dtype: str, chat: bool) -> dict[str, object]:
    """Rows of the card's table."""
    return {
        "parameters": f"{parameter_count(config):,}",
        "dtype": dtype,
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "layers, width": f"{config.layers}, {config.dim}",
        "query heads, key/value heads, head width": f"{config.heads}, {config.kv_heads}, {config.head_dim}",
        "feed-forward width": config.ffn_dim,
        "output head": "the embedding table (tied)" if config.tied_head else "of its own",
        "rotary embedding": _rope_text(config),
        "chat template": "yes" if chat else "none",
    }


def _rope_scaling(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values = {"factor": float(scaling.factor), "low_freq_factor": scaling.low_freq_factor,
              "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_context,
              "rope_type": scaling.rope_type}  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def _rope_text(config: LlamaConfig) -> str:
    scaling = config.rope_scaling
    if scaling is None:
        return f"base {config.rope_theta:g}"
    origin = f" from {scaling.original_context:,} tokens" if scaling.original_context else ""
    return f"base {config.rope_theta:g}, {scaling.rope_type} scaling by {scaling.factor:g}{origin}"


def _one_or_several(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _one_line(text: str) -> str:
    return " ".join(text.split())
