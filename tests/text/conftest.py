"""Small tokenizers of every kind, trained on the spot, and texts that trip tokenizers."""

import importlib.util
import io
import os
import pathlib
import random

import pytest
import sentencepiece
from trained import PROSE, byte_level

from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.export import hugging_face_files
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.llama3 import Llama3Tokenizer, load_llama3
from llama_jax.text.sentencepiece import SentencePieceTokenizer, load_sentence_piece
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.weights.gguf_read import GgufFile

TRICKY = [
    "",
    " ",
    "  ",
    "\n",
    "\t\tx",
    " leading",
    "trailing ",
    "a  b   c",
    "\r\n\r\n",
    "\u00a0x\u3000y",
    "def f(x):\n    return x**2  # 12345\n",
    "2024-01-31 12:00:07.123",
    "in 1999, 7 of 10",
    "x=0b1010, 1e-5",
    "你好，世界！",
    "日本語のテキスト 123",
    "नमस्ते",
    "👩‍👩‍👧‍👦 🎉🏽",
    "e\u0301 é ﬁ Ⅷ ½",
    "русский ТЕКСТ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "▁under",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<|endoftext|> x",
    "<|eot_id|>",
    "I'LL we're they'Ve 's",
    "don't!!!???",
    "a\u200bb",
    "\x00\x01\x7f",
    "���",
    "𝒜𝓑",
    "ＡＢＣ１２３",
    "...\n\n\n...",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """More than 200 texts: tricky ones, slices of prose, random characters."""
    rng = random.Random(0)
    slices = [
        PROSE[start : start + rng.randrange(1, 120)]
        for start in (rng.randrange(len(PROSE)) for _ in range(150))
    ]
    alphabet = "ab Z  09\n\t.,'s-_<|>é你🎉\u0301▁"
    noise = ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(100)]
    return TRICKY + slices + noise


@pytest.fixture(scope="session")
def sentence_piece_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A byte-pair SentencePiece model with byte fallback and one more control symbol, in the manner
    of LLaMA 1 and 2.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentence_piece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: pathlib.Path) -> dict[str, object]:
    """The tokenizer's part of the real file's metadata; that the gguf package reads the same is
    tested with the weights.
    """
    return {
        key: value
        for key, value in GgufFile.open(smollm2_gguf).metadata.items()
        if key.startswith("tokenizer.")
    }


@pytest.fixture(scope="session")
def llama3_path() -> pathlib.Path:
    """Llama 3's tokenizer.model, which Meta's package llama-models carries."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        if os.environ.get("CI"):
            pytest.fail("llama-models is not installed; `make test` installs it")
        pytest.skip("pip install --no-deps llama-models")
    return pathlib.Path(spec.origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(llama3_path: pathlib.Path) -> Llama3Tokenizer:
    return load_llama3(llama3_path)


@pytest.fixture(scope="session")
def llama3_files(llama3: Llama3Tokenizer) -> dict[str, bytes]:
    """Its files for Hugging Face, without a template: most of the seconds of several tests."""
    return hugging_face_files(llama3)


@pytest.fixture(scope="session")
def llama3_read(
    llama3_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """What our reader makes of them."""
    directory = tmp_path_factory.mktemp("llama3")
    for name, content in llama3_files.items():
        (directory / name).write_bytes(content)
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def meta_llama3(llama3_path: pathlib.Path):
    """Meta's own tokenizer of the same file."""
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer(llama3_path)


@pytest.fixture(scope="session")
def sentence_piece(sentence_piece_path: pathlib.Path) -> SentencePieceTokenizer:
    return load_sentence_piece(sentence_piece_path)


@pytest.fixture(scope="session")
def byte_pair() -> BytePairTokenizer:
    return BytePairTokenizer(byte_level(), begin_id=None, end_id=2, adds_begin=False)


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, object]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata)


@pytest.fixture(params=["sentence_piece", "byte_pair", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One tokenizer of each kind."""
    return request.getfixturevalue(request.param)
