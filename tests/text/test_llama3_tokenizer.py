"""Llama 3's tokenizer.model against Meta's own code."""

import base64
import inspect
import json
import pathlib
import random
import tokenize
import unicodedata

import pytest

from llama_jax.errors import InputError
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.stops import stop_ids
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, encode_prompt, load_tokenizer

SENTENCES = [
    "The ferry leaves at half past seven, and we'll be on it.",
    "Zwölf große Äpfel rollen über die Straße.",
    "Où as-tu caché les clés de la voiture ?",
    "¿Cuántos años tiene el niño del abrigo rojo?",
    "O pão está na mesa, não no armário.",
    "Perché piove sempre quando c'è il sole?",
    "De kat zit graag in de kist.",
    "Den gamla bron över ån är stängd.",
    "Kızın şapkası ağacın altında kaldı.",
    "Złota żaba skacze przez łąkę.",
    "Příští vlak jede až v půl páté.",
    "A hűvös őszi szél fütyül a fák között.",
    "Ποιος άνοιξε το παράθυρο;",
    "Старый мост скрипит под снегом.",
    "Їжак несе яблуко додому.",
    "השעון על הקיר עצר אתמול.",
    "القطة تنام فوق السطح.",
    "باران از صبح می‌بارد.",
    "बच्चे नदी के किनारे खेल रहे हैं।",
    "নৌকাটা ধীরে চলে।",
    "மழை வரும் என்று சொன்னார்கள்.",
    "แมวนอนอยู่บนโต๊ะไม้เก่า",
    "Con mèo ngủ trên mái nhà cũ.",
    "고양이가 창가에서 잔다.",
    "猫が窓のそばで寝ています。",
    "那只猫在窗边睡着了。",
    "那隻貓在窗邊睡著了。",
    "კატა ფანჯარასთან ზის.",
    "Կատուն քնած է։",
    "ድመቷ ተኝታለች።",
]
SPECIAL_LOOKING = [
    "<|begin_of_text|>",
    "<|eot_id|>x",
    "a<|end_of_text|>",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|image|>",
    "<|reserved_special_token_7|>",
    "<|python_tag|>print(1)",
    "<| eot_id |>",
    "<s>[INST] hi [/INST]</s>",
]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈 flag", "🎉🎉🎉", "👍🏽!", "1️⃣2️⃣", "🇪🇺🇫🇷", "a🙂b🙂", "❤️\n❤"]


def spaces(rng: random.Random) -> str:
    return "".join(rng.choice(" \t\n\r\u00a0\u2003x") * rng.randrange(1, 9) for _ in range(4))


def number(rng: random.Random) -> str:
    return rng.choice(["{}", "-{}.5", "{:,}", "x{}y", " {} ", "№{}", "{}٣٤"]).format(
        rng.randrange(10 ** rng.randrange(1, 12))
    )


def random_unicode(rng: random.Random) -> str:
    planes = [
        range(0x20, 0x7F),
        range(0xA0, 0x800),
        range(0x800, 0xD800),
        range(0xE000, 0x10000),
        range(0x10000, 0x110000),
    ]
    return "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randrange(1, 25)))


@pytest.fixture(scope="module")
def material() -> list[str]:
    """More than 2,000 different texts."""
    rng = random.Random(3)
    code = [
        line
        for module in (tokenize, json.decoder, inspect)
        for line in inspect.getsource(module).splitlines(True)
    ]
    blocks = ["".join(code[start : start + 6]) for start in range(0, len(code), 6)]
    mixed = [" ".join(rng.sample(SENTENCES, 3)) for _ in range(100)]
    cut = [
        sentence[rng.randrange(9) : rng.randrange(9, 30)]
        for sentence in SENTENCES
        for _ in range(8)
    ]
    normal = [
        unicodedata.normalize(form, sentence) for sentence in SENTENCES for form in ("NFD", "NFKC")
    ]
    noise = [make(rng) for make in (spaces, number, random_unicode) for _ in range(300)]
    return sorted(
        {
            "",
            *SENTENCES,
            *SPECIAL_LOOKING,
            *EMOJI,
            *blocks,
            *code[:800],
            *mixed,
            *cut,
            *normal,
            *noise,
        }
    )


def test_ids_and_text_are_metas(llama3: Llama3Tokenizer, meta_llama3, material: list[str]):
    assert len(material) > 2000
    for text in material:
        ids = llama3.encode(text)
        assert ids == meta_llama3.encode(text, bos=False, eos=False), text
        assert llama3.decode(ids) == meta_llama3.decode(ids) == text


def test_streaming_gives_what_decoding_gives(llama3: Llama3Tokenizer, material: list[str]):
    rng = random.Random(4)
    noise = [[rng.randrange(llama3.vocab_size) for _ in range(8)] for _ in range(200)]
    for ids in [*map(llama3.encode, material[::5]), *noise]:
        decoder = StreamDecoder(llama3)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == llama3.decode(ids)


def test_random_ids_read_as_meta_reads_them(llama3: Llama3Tokenizer, meta_llama3):
    rng = random.Random(5)
    for _ in range(300):
        ids = [rng.randrange(128_000) for _ in range(8)]
        assert llama3.decode(ids) == meta_llama3.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000,
        "ab" * 12_500 + "c",
        "=" * 25_001,
        " " * 25_000,
        " " * 60_001 + "x",
        "\n" * 50_000 + " \n" * 30_000,
        "x " * 3 + "word" * 20_000 + " tail",
        ("0123456789" * 3000 + "\t") * 2,
        "\x1c\x85\u2028" * 9_000,
        "long cat. " * 45_000,
    ],
    ids=lambda text: f"{text[:3]!r}-{len(text)}",
)
def test_overlong_runs_are_cut_where_meta_cuts_them(
    llama3: Llama3Tokenizer, meta_llama3, text: str
):
    ids = llama3.encode(text)
    assert ids == meta_llama3.encode(text, bos=False, eos=False)
    assert llama3.decode(ids) == text


def test_runs_at_every_distance_from_the_cuts(llama3: Llama3Tokenizer, meta_llama3):
    rng = random.Random(6)
    for length in (24_999, 25_000, 25_001, 49_999, 50_001):
        for kind in "a \n":
            before = "x y" * rng.randrange(9_000)
            text = (
                before
                + (" " if kind == "a" else "b")
                + kind * length
                + rng.choice([" b", "b ", ""]) * rng.randrange(9_000)
            )
            assert llama3.encode(text) == meta_llama3.encode(text, bos=False, eos=False)


def test_special_tokens_are_metas(llama3: Llama3Tokenizer, meta_llama3):
    assert llama3.special_tokens == meta_llama3.special_tokens
    assert llama3.vocab_size == meta_llama3.n_words == 128_256
    assert (
        (llama3.begin_id, llama3.end_id)
        == (meta_llama3.bos_id, meta_llama3.eos_id)
        == (128_000, 128_001)
    )
    assert set(stop_ids(llama3)) == set(meta_llama3.stop_tokens)
    assert encode_prompt(llama3, "hi") == meta_llama3.encode("hi", bos=True, eos=False)


def test_special_tokens_in_text_stay_text_and_their_ids_have_none(llama3: Llama3Tokenizer):
    for token, number in llama3.special_tokens.items():
        ids = llama3.encode(token)
        assert max(ids) < 128_000
        assert llama3.decode([number, *ids, number]) == token
    assert llama3.encode_after_special("\n\nhi") == llama3.encode("\n\nhi")


def test_half_a_character_is_refused(llama3: Llama3Tokenizer):
    with pytest.raises(InputError, match=r"U\+D83D at position 1, half of a surrogate pair"):
        llama3.encode("a\ud83d")


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTES = [line(bytes([byte]), byte) for byte in range(256)]


def write(directory: pathlib.Path, lines: list[bytes]) -> pathlib.Path:
    path = directory / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    return path


def test_special_tokens_follow_any_number_of_ranks(tmp_path: pathlib.Path):
    tokenizer = load_tokenizer(
        write(tmp_path, [*BYTES, line(b"ab", 256), b"\n", line(b"abc", 257).rstrip()])
    )
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.special_tokens["<|eot_id|>"]) == (
        514,
        258,
        267,
    )
    assert tokenizer.encode("abc xab") == [257, ord(" "), ord("x"), 256]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*BYTES, line(b"ab", 257)], "line 257: rank 257 given, 256 expected"),
        ([*BYTES, line(b"ab", 255)], "line 257: rank 255 given, 256 expected"),
        (
            [*BYTES, line(b"a", 256)],
            "line 257: token b'a' stands there twice, with ranks 97 and 256",
        ),
        ([*BYTES, b"YWI 256\n"], "line 257: b'YWI' is not base64"),
        (
            [*BYTES, b"YWI=\n"],
            "line 257: b'YWI=.*' given, a token in base64, a space and its rank expected",
        ),
        ([*BYTES, b"YWI= -1\n"], "line 257: .*a space and its rank expected"),
        ([*BYTES, b"YWI= 99999999999999999999\n"], "line 257: .*a space and its rank expected"),
        ([*BYTES, b"Y W I = 256\n"], "line 257: .*a space and its rank expected"),
        (
            [*BYTES, line(b"x" * 2000, 256)],
            "line 257: a token of 2000 bytes given, 1 to 1024 expected",
        ),
        (BYTES[:200], "byte 0xC8 has no rank"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: pathlib.Path, lines: list[bytes], message: str):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write(tmp_path, lines))


def test_llama4s_ranks_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llama_jax.text.llama3._LLAMA4_RANKS", 257)  # not 200,000, to be quick
    with pytest.raises(InputError, match="257 ranks given, as Llama 4 has them; Llama 3's file"):
        load_tokenizer(write(tmp_path, [*BYTES, line(b"ab", 256)]))


def test_a_file_that_is_too_large_is_not_read(tmp_path: pathlib.Path):
    path = write(tmp_path, BYTES)
    with path.open("ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match="1099511627776 bytes given, at most 33554432 expected"):
        load_tokenizer(path)


def test_stale_copies_are_not_answered_from(tmp_path: pathlib.Path):
    """tiktoken's own loader would give the ranks of the first file for the second."""
    first = load_tokenizer(write(tmp_path, [*BYTES, line(b"ab", 256)]))
    second = load_tokenizer(write(tmp_path, [*BYTES, line(b"bc", 256)]))
    assert (first.encode("abc"), second.encode("abc")) == ([256, ord("c")], [ord("a"), 256])
