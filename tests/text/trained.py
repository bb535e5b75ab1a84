"""Prose that every Python carries, and a byte-level tokenizer trained on it."""

import functools
import pydoc_data.topics

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PROSE = "\n".join(
    pydoc_data.topics.topics[name] for name in ("for", "import", "strings", "operator-summary")
)


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(PROSE.splitlines(keepends=True), trainer)
    return tokenizer.to_str()


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of the tokenizers library with ChatML's special tokens; a new copy of
    one that is trained once.
    """
    return tokenizers.Tokenizer.from_str(_trained())
