"""LLaMA 1 to 3.3 in JAX and Flax: pretrain, fine-tune and generate, from a laptop to a TPU pod.

    import llama_jax
    model = llama_jax.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    print(llama_jax.generate(model, ["What is the capital of France?"], chat=True)[0].text)

The names below are loaded when they are first used, so importing the package is instant and changes
nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama_jax.accounting import (
        matmul_parameters,
        parameter_count,
        parameter_shapes,
        training_flops_per_token,
    )
    from llama_jax.config import LlamaConfig, RopeScaling
    from llama_jax.errors import CorruptError, InputError
    from llama_jax.generation.decode import Rollout, generate_tokens
    from llama_jax.generation.generate import Generator, Speculation
    from llama_jax.generation.harness import harness_model
    from llama_jax.generation.sampling import Sampling, make_sampling
    from llama_jax.generation.score import (
        Accuracy,
        Question,
        Score,
        evaluate_choices,
        read_questions,
        score,
        score_tokens,
    )
    from llama_jax.generation.text import Completion, Conversation, Piece, generate, stream
    from llama_jax.model.attention import attend
    from llama_jax.model.cache import init_cache
    from llama_jax.model.llama import Llama, embed, hidden_states, logits
    from llama_jax.model.options import ModelOptions
    from llama_jax.model.quantize import parameter_bytes, quantize
    from llama_jax.parallel.mesh import make_mesh
    from llama_jax.presets import PRESETS, preset
    from llama_jax.text.chat import ChatTemplate, Dialogue, encode_chat, encode_dialogue
    from llama_jax.text.formats import named_format
    from llama_jax.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer
    from llama_jax.training.evaluate import evaluate_text
    from llama_jax.training.loss import mean_loss
    from llama_jax.weights.assemble import stack, unstack
    from llama_jax.weights.hf_write import export_hugging_face, save_hugging_face
    from llama_jax.weights.load import Pretrained, load
    from llama_jax.weights.vocabulary import resize_vocabulary

_MODULES = {
    "accounting": (
        "matmul_parameters",
        "parameter_count",
        "parameter_shapes",
        "training_flops_per_token",
    ),
    "config": ("LlamaConfig", "RopeScaling"),
    "errors": ("CorruptError", "InputError"),
    "generation.decode": ("Rollout", "generate_tokens"),
    "generation.generate": ("Generator", "Speculation"),
    "generation.harness": ("harness_model",),
    "generation.sampling": ("Sampling", "make_sampling"),
    "generation.score": (
        "Accuracy",
        "Question",
        "Score",
        "evaluate_choices",
        "read_questions",
        "resize_vocabulary",
        "score",
        "score_tokens",
    ),
    "generation.text": ("Completion", "Conversation", "Piece", "generate", "stream"),
    "model.attention": ("attend",),
    "model.cache": ("init_cache",),
    "model.llama": ("Llama", "embed", "hidden_states", "logits"),
    "model.options": ("ModelOptions",),
    "model.quantize": ("parameter_bytes", "quantize"),
    "parallel.mesh": ("make_mesh",),
    "presets": ("PRESETS", "preset"),
    "text.chat": ("ChatTemplate", "Dialogue", "encode_chat", "encode_dialogue"),
    "text.formats": ("named_format",),
    "text.tokenizer": ("Tokenizer", "encode_prompt", "load_tokenizer"),
    "training.evaluate": ("evaluate_text",),
    "training.loss": ("mean_loss",),
    "weights.assemble": ("stack", "unstack"),
    "weights.hf_write": ("export_hugging_face", "save_hugging_face"),
    "weights.load": ("Pretrained", "load"),
    "weights.vocabulary": ("resize_vocabulary",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "PRESETS",
    "Accuracy",
    "ChatTemplate",
    "Completion",
    "Conversation",
    "CorruptError",
    "Dialogue",
    "Generator",
    "InputError",
    "Llama",
    "LlamaConfig",
    "ModelOptions",
    "Piece",
    "Pretrained",
    "Question",
    "Rollout",
    "RopeScaling",
    "Sampling",
    "Score",
    "Speculation",
    "Tokenizer",
    "attend",
    "embed",
    "encode_chat",
    "encode_dialogue",
    "encode_prompt",
    "evaluate_choices",
    "evaluate_text",
    "export_hugging_face",
    "generate",
    "generate_tokens",
    "harness_model",
    "hidden_states",
    "init_cache",
    "load",
    "load_tokenizer",
    "logits",
    "make_mesh",
    "make_sampling",
    "matmul_parameters",
    "mean_loss",
    "named_format",
    "parameter_bytes",
    "parameter_count",
    "parameter_shapes",
    "preset",
    "quantize",
    "read_questions",
    "resize_vocabulary",
    "save_hugging_face",
    "score",
    "score_tokens",
    "stack",
    "stream",
    "training_flops_per_token",
    "unstack",
]


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"llama_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
