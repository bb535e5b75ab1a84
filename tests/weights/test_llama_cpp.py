"""Exports as llama.cpp runs them: the same greedy text. Its package is built from source, so it is
no test requirement.
"""

import ctypes
import pathlib

import jax
import pytest

from llama_jax.cli.convert import main as convert
from llama_jax.generation.generate import Generator
from llama_jax.weights.load import load

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is built from source: pip install llama-cpp-python"
)

PROMPTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea,",
]
NEW = 32


@pytest.fixture(scope="module", autouse=True)
def silent():
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def written_by_llama_cpp(path: pathlib.Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
    answers = []
    for prompt in prompts:
        model.reset()
        tokens = model.generate(prompt, temp=0.0)
        answers.append([next(tokens) for _ in range(new)])
    return answers


def exported(source, target: pathlib.Path, dtype: str) -> pathlib.Path:
    assert convert([str(source), str(target), "--format", "gguf", "--dtype", dtype]) == 0
    return target


@pytest.mark.smollm2
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_greedy_text_of_a_real_model_is_the_same(smollm2_model, smollm2_gguf, tmp_path, dtype):
    path = exported(smollm2_gguf, tmp_path / "m.gguf", dtype)
    prompts = [smollm2_model.tokenizer.encode(prompt) for prompt in PROMPTS]
    rounded = jax.tree.map(
        lambda x: x.astype(dtype).astype("float32") if x.ndim == 2 else x, smollm2_model.params
    )
    expected = Generator(rounded, smollm2_model.config).generate(prompts, NEW)
    assert written_by_llama_cpp(path, prompts, NEW) == [row.token_ids for row in expected]


def test_a_model_of_ours_and_its_tokenizer(tiny_directory, tmp_path):
    """Random weights and a tokenizer that no one else has: ids of texts too are the same."""
    path = exported(tiny_directory, tmp_path / "m.gguf", "float32")
    model = load(tiny_directory)
    theirs = llama_cpp.Llama(str(path), n_ctx=256, vocab_only=True, verbose=False)
    texts = [text.encode() for text in ("The cat sat.", "  two  spaces\n", "naïve 你好 🎉")]
    prompts = [theirs.tokenize(text, add_bos=False, special=False) for text in texts]
    assert prompts == [model.tokenizer.encode(text.decode()) for text in texts]
    expected = Generator(model.params, model.config).generate(prompts, NEW)
    assert written_by_llama_cpp(path, prompts, NEW) == [row.token_ids for row in expected]
