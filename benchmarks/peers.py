"""The sides of the decoding benchmark: functions that make a function (prompts, new tokens) ->
None, greedy, no stop token.

Each takes the path of a model and a dtype. Prompts are an array `[rows, length]` of token ids.
"""

import ctypes
import os
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))


def llama_jax(path: pathlib.Path, dtype: str):
    from llama_jax import load
    from llama_jax.generation.generate import Generator

    model = load(path, dtype)
    generator = Generator(model.params, model.config, dtype=dtype)
    return lambda prompts, new: generator.generate(prompts.tolist(), new)


def transformers(path: pathlib.Path, dtype: str):
    import torch
    from support import transformers_model

    from llama_jax import load

    model = load(path)
    peer = transformers_model(model.config, model.params).to(getattr(torch, dtype))

    def run(prompts, new):
        ids = torch.from_numpy(prompts)
        exactly = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            peer.generate(ids, attention_mask=torch.ones_like(ids), **exactly)

    return run


def write_gguf(path: pathlib.Path, target: pathlib.Path, dtype: str) -> pathlib.Path:
    """The same model as a GGUF file of a dtype, by our own writer."""
    from llama_jax.text.export import gguf_metadata
    from llama_jax.weights.gguf_write import write_gguf
    from llama_jax.weights.open import open_model

    opened = open_model(path)
    write_gguf(opened.source, target, dtype, gguf_metadata(opened.tokenizer), None, path.stem)
    return target


def llama_cpp(path: pathlib.Path, dtype: str):
    """llama.cpp on a file of `dtype` that `write_gguf` left beside `path`; its cache is float16, as
    it comes.
    """
    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(silent, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"error: llama.cpp does not open {path} ({dtype})")
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    contexts: dict[tuple[int, int], object] = {}

    def context(rows, slots):
        """A context for so many sequences, kept between calls."""
        if (rows, slots) not in contexts:
            settings = cpp.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = rows * slots, rows
            settings.n_batch = max(2048, rows * slots)
            settings.n_threads = settings.n_threads_batch = os.cpu_count()
            contexts[rows, slots] = cpp.llama_init_from_model(model, settings)
        return contexts[rows, slots]

    def feed(place, tokens, position):
        """Runs `[rows, length]` tokens from a position on; the most probable next token of each
        row.
        """
        rows, length = tokens.shape
        batch = cpp.llama_batch_init(rows * length, 0, 1)
        batch.n_tokens = rows * length
        for i, (row, at) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i] = int(tokens[row, at]), position + at
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, at == length - 1
        failed = cpp.llama_decode(place, batch)
        cpp.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"error: llama_decode gave {failed}")
        ends = [row * length + length - 1 for row in range(rows)]
        logits = [
            np.ctypeslib.as_array(cpp.llama_get_logits_ith(place, end), (vocabulary,))
            for end in ends
        ]
        return np.asarray([[row.argmax()] for row in logits])

    def run(prompts, new, keep=(silent,)):
        rows, length = prompts.shape
        place = context(rows, -(-(length + new) // 256) * 256)
        cpp.llama_memory_clear(cpp.llama_get_memory(place), True)
        tokens = feed(place, prompts, 0)
        for position in range(length, length + new - 1):
            tokens = feed(place, tokens, position)

    return run
