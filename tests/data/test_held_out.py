"""`--held-out` as a share and as tokens: how much it holds out, and that it is the same in every
call.
"""

import json
import random

import pytest

from llama_jax.cli.prepare import make_parser
from llama_jax.data import held_out, parts, shards
from llama_jax.data.prepare import read_tokenizer_files
from llama_jax.data.records import is_held_out
from llama_jax.data.shards import Settings, Text, prepare_set
from llama_jax.data.token_set import TokenSet
from llama_jax.errors import InputError


@pytest.fixture(scope="session")
def text(tiny_directory):
    return Text(read_tokenizer_files(tiny_directory), None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Three files: short records, long records, and records that are mostly another field."""
    folder, source = tmp_path_factory.mktemp("sources"), random.Random(0)
    for name, count, words, other in (("a", 600, 5, 0), ("b", 200, 40, 0), ("c", 300, 8, 300)):
        texts = (
            " ".join(source.choices(["alpha", "beta", "gamma"], k=words)) for _ in range(count)
        )
        (folder / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"text": f"{name} {number} {text}", "x": "y" * other}) + "\n"
                for number, text in enumerate(texts)
            )
        )
    return folder


def prepare(sources, directory, text, on_progress=lambda *call: None, **settings):
    return prepare_set(
        [sources], directory, text, Settings(**{"shard_tokens": 5000, **settings}), on_progress
    )


def snapshot(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def held_out_texts(directory, sources):
    share = TokenSet.open(directory).manifest.held_out
    lines = [
        line for path in sorted(sources.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {
        text for text in (json.loads(line)["text"] for line in lines) if is_held_out(text, share)
    }


@pytest.mark.parametrize("wanted", [3000, 20_000])
def test_tokens_are_met_about_and_spread_over_all_files(tmp_path, sources, text, wanted):
    prepare(sources, tmp_path / "out", text, held_out=wanted)
    found = TokenSet.open(tmp_path / "out").held_out
    assert found.size == pytest.approx(wanted, rel=0.25)
    names = [text[0] for text in held_out_texts(tmp_path / "out", sources)]
    assert set(names) == set("abc")
    assert len(names) == found.documents


def test_a_sample_estimates_what_the_whole_holds(tmp_path, sources, text, monkeypatch):
    monkeypatch.setattr(held_out, "_SAMPLE_BYTES", 30_000)  # a tenth of the sources
    encoded = []
    encode = held_out.encode_record
    monkeypatch.setattr(
        held_out,
        "encode_record",
        lambda record, *rest: encoded.append(record) or encode(record, *rest),
    )
    manifest, _ = prepare(sources, tmp_path / "out", text, held_out=10_000)
    assert len(encoded) < 400
    assert 10_000 / manifest.held_out == pytest.approx(manifest.tokens, rel=0.1)


def test_a_limit_gives_the_same_for_any_workers_and_on_resume(tmp_path, sources, text, monkeypatch):
    monkeypatch.setattr(parts, "LEAST_BYTES", 2000)
    whole = prepare(sources, tmp_path / "1", text, held_out=20_000)
    prepare(sources, tmp_path / "2", text, held_out=20_000, workers=2)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")

    def stop(stage, done, total):
        if stage == "encode" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(sources, tmp_path / "3", text, stop, held_out=20_000)
    assert prepare(sources, tmp_path / "3", text, held_out=20_000).kept > 0
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")
    monkeypatch.setattr(shards, "held_out_share", None)  # finished: nothing to estimate
    assert prepare(sources, tmp_path / "3", text, held_out=20_000).manifest == whole.manifest
    monkeypatch.undo()
    with pytest.raises(InputError, match="other input"):
        prepare(sources, tmp_path / "3", text, held_out=10_000)


def test_fewer_tokens_hold_out_a_part_of_more(tmp_path, sources, text):
    prepare(sources, tmp_path / "few", text, held_out=3000)
    prepare(sources, tmp_path / "more", text, held_out=20_000)
    assert held_out_texts(tmp_path / "few", sources) < held_out_texts(tmp_path / "more", sources)


def test_the_default_is_the_smaller_of_a_share_and_tokens(tmp_path, sources, text, monkeypatch):
    share = prepare(sources, tmp_path / "share", text).manifest.held_out
    monkeypatch.setattr(held_out, "MOST_TOKENS", 300)
    tokens, _ = prepare(sources, tmp_path / "tokens", text)
    assert share == 0.01
    assert tokens.held_out == pytest.approx(300 / tokens.tokens, rel=0.1)
    assert tokens.held_out < 0.01


def test_no_tokens_and_too_many(tmp_path, sources, text):
    assert prepare(sources, tmp_path / "none", text, held_out=0).manifest.held_out_shards == ()
    with pytest.raises(
        InputError,
        match=r"--held-out: 1,000,000 tokens given, but the sources have about \d\d,\d{3}; give fewer",
    ):
        prepare(sources, tmp_path / "many", text, held_out=1_000_000)
    for wrong in (-0.1, 1, 5.0, 2000.5, float("nan"), float("inf")):
        with pytest.raises(
            InputError,
            match=r"--held-out: .* given; a share from 0 to below 1 such as 0\.01, or at least 1,000",
        ):
            prepare(sources, tmp_path / "wrong", text, held_out=wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_bad_record_is_named_by_the_reading_of_all(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "' + "fine " * 300 + '"}\nnot JSON\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not JSON"):
        prepare(path, tmp_path / "out", text, held_out=1000)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("0.01", 0.01),
        ("0", 0),
        ("1e-4", 1e-4),
        ("10M", 10_000_000),
        ("2k", 2000),
        ("5000", 5000),
        ("0.5M", 500_000),
    ],
)
def test_the_option_takes_shares_and_tokens(given, value):
    required = ["--input", "i", "--output", "o", "--tokenizer", "t"]
    assert make_parser("prepare").parse([*required, "--held-out", given]).held_out == value
    assert make_parser("prepare").parse(required).held_out is None


@pytest.mark.parametrize("given", ["1", "5", "999", "1%", "1.5", "nan", "inf", "much", "-1"])
def test_the_option_refuses_the_rest(given):
    with pytest.raises(
        InputError,
        match=rf"--held-out: '{given}' given; a share from 0 to below 1 such as 0\.01, or at least",
    ):
        make_parser("prepare").parse(
            ["--input", "i", "--output", "o", "--tokenizer", "t", "--held-out", given]
        )
