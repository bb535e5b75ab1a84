"""Models on disk and their oracles: a tiny Hugging Face directory, and transformers' model of a
GGUF file.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import tokenizers
from support import TINY, random_parameters, torch_name, transformers_config
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_jax.config import LlamaConfig
from llama_jax.weights.assemble import unstack

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The cat sat on the mat. The dog sat on the log, and the cat saw the dog sit. A quick "
    "brown fox jumps over.\n"
)
TINY_CONTEXT = 1 << 16


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer with the special tokens of ChatML: any text can be written, broken
    characters too.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def _tensors(params) -> dict[str, np.ndarray]:
    """A parameter tree under transformers' names, `[out, in]`."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(unstack(jax.device_get(params)))[0]:
        names = tuple(part.key for part in path)
        array = np.asarray(leaf)
        tensors[torch_name(names)] = np.ascontiguousarray(
            array.T if array.ndim == 2 and names[0] != "embedding" else array
        )
    return tensors


def write_tiny(directory: pathlib.Path) -> None:
    """Fills a directory with a tiny LLaMA of random weights, a tokenizer and a chat template, laid
    out as by transformers 5.
    """
    from safetensors.numpy import save_file

    tokenizer = tiny_tokenizer()
    config = dataclasses.replace(
        TINY, vocab_size=tokenizer.get_vocab_size(), context_length=TINY_CONTEXT
    )
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "eos_token_id": 0,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "architectures": ["LlamaForCausalLM"],
    }
    (directory / "config.json").write_text(json.dumps(values))
    save_file(_tensors(random_parameters(config, seed=5)), directory / "model.safetensors")
    tokenizer.save(str(directory / "tokenizer.json"))
    declared = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(declared))


_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _transformers_name(name: str) -> str:
    *layer, kind, suffix = name.split(".")
    return ".".join(
        ["model.layers", layer[1], _GGUF_NAMES[kind], suffix]
        if layer
        else [_GGUF_NAMES[kind], suffix]
    )


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from the order of llama.cpp (the two of a rotated pair side by side) to
    halves.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


def gguf_transformers_model(path: pathlib.Path, config: LlamaConfig):
    """transformers' model of a GGUF file, float32: llama_jax has a hand in its numbers of layers
    and heads only.
    """
    import gguf
    import torch
    import transformers

    torch.set_num_threads(1)  # two busy threads on a shared core wait for each other
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.name.split(".")[-2]
        array = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        array = _halves(array, heads[kind]) if kind in heads else array
        state[_transformers_name(tensor.name)] = torch.from_numpy(array)
    model = transformers.LlamaForCausalLM(transformers_config(config))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    return model.to(torch.float32).eval()
