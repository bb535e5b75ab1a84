"""What prepared data costs: opening it, looking a sequence up, the start of a training, and
preparing it.

    python benchmarks/data.py [--shards 1 1000 150000] [--tokenizer PATH]

Shards are sparse files of 100M tokens, so 150,000 of them (15T tokens) take inodes and no room.
Every measurement runs in a process of its own, under the usual limit of 1,024 open files. Processor
time stands beside wall-clock time, because other work on the machine shows only in the latter.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import re
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from report import heading

ROOT = pathlib.Path(__file__).parent.parent
TOKENS, DOCUMENTS = 100_000_000, 100_000  # of a shard
LENGTH, SEQUENCES = 4096, 2000
OPEN_FILES = 1024


def make_shards(directory: pathlib.Path, shards: int, tokenizer: pathlib.Path) -> None:
    """A prepared folder whose shards are holes: every token is 0."""
    from llama_jax.data.prepare import hash_tokenizer, read_tokenizer_files
    from llama_jax.data.token_file import TokenHeader, choose_dtype, pack_header
    from llama_jax.data.token_set import (
        MANIFEST_VERSION,
        TOKENIZER,
        CountsEntry,
        Manifest,
        ShardEntry,
        file_sha256,
    )
    from llama_jax.data.tokens import TokenCounts, write_counts
    from llama_jax.text.tokenizer import load_tokenizer

    (directory / TOKENIZER).mkdir(parents=True)
    for name, content in read_tokenizer_files(tokenizer).items():
        (directory / TOKENIZER / name).write_bytes(content)
    size, digest = (
        load_tokenizer(directory / TOKENIZER).vocab_size,
        hash_tokenizer(directory / TOKENIZER),
    )
    header = TokenHeader(
        "text", choose_dtype(size), TOKENS, DOCUMENTS, 4 * TOKENS, size, digest, "s", 0, 0, 0
    )
    entries = []
    for number in range(shards):
        path = directory / f"train-{number:05d}.tokens"
        with path.open("wb") as file:
            file.write(pack_header(header))
            file.truncate(header.file_bytes)
        entries.append(
            ShardEntry(
                path.name, DOCUMENTS, TOKENS, 4 * TOKENS, header.file_bytes, f"{number:064d}"
            )
        )
    counts = directory / "train_counts.json"
    write_counts(counts, TokenCounts(np.full(size, shards * TOKENS // size), size - 1), "benchmark")
    counted = CountsEntry(counts.name, counts.stat().st_size, file_sha256(counts))
    Manifest(
        version=MANIFEST_VERSION,
        kind="text",
        vocab_size=size,
        tokenizer_sha256=digest,
        template_sha256=None,
        held_out=0.0,
        shard_tokens=TOKENS,
        sources=(),
        dropped=0,
        bad_records=0,
        documents=shards * DOCUMENTS,
        tokens=shards * TOKENS,
        train=tuple(entries),
        held_out_shards=(),
        counts=(counted,),
    ).write(directory)


def clock() -> tuple[float, float]:
    """Now, in seconds of the wall and of this process's processors."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> list[float]:
    """Seconds of both kinds since a time."""
    return [now - then for now, then in zip(clock(), start)]


def measure_set(directory: str) -> dict:
    """Opening a folder and reading sequences at random places."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    from llama_jax.data.token_set import TokenSet
    from llama_jax.data.tokens import unigram_cross_entropy

    start = clock()
    train = TokenSet.open(pathlib.Path(directory)).train
    found: dict = {"open": since(start)}
    start = clock()
    unigram_cross_entropy([train], [train])
    found["unigram"] = since(start)
    source = random.Random(0)
    places = [source.randrange(train.size - LENGTH) for _ in range(SEQUENCES)]
    for name in ("first", "again"):
        start = clock()
        for place in places:
            train.read(place, place + LENGTH + 1)
        found[name] = [seconds / SEQUENCES for seconds in since(start)]
    inside = [
        place % (TOKENS - LENGTH) for place in places
    ]  # of one shard: what a look-up costs beside opening files
    start = clock()
    for place in inside:
        train.read(place, place + LENGTH + 1)
    found["one shard"] = [seconds / SEQUENCES for seconds in since(start)]
    start = clock()
    for place in places:
        train.locate(place)
    found["locate"] = [seconds / SEQUENCES for seconds in since(start)]
    found["descriptors"] = len(os.listdir("/proc/self/fd")) - 1
    return found


def measure_start(directory: str) -> dict:
    """`train.py` on a folder: from the start of the process to the line of its first step; the
    faster of two runs, the first of which may compile.
    """
    vocabulary = json.loads((pathlib.Path(directory) / "manifest.json").read_bytes())["vocab_size"]
    return {"start": min(_start(directory, vocabulary) for _ in range(2))}


def _start(directory: str, vocabulary: int) -> list[float]:
    with tempfile.TemporaryDirectory() as run:
        given = {
            "data.sources": json.dumps([{"path": directory}]),
            "data.length": 64,
            "data.batch_size": 2,
            "run.dir": f"{run}/run",
            "run.steps": 2,
            "run.log_every": 1,
            "model.vocab_size": vocabulary,
        }
        options = (f"--{name}={value}" for name, value in given.items())
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "train.py"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if re.match(r" *1/2 ", line):
                    break
            wall = time.perf_counter() - start
            process.stdout.read()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode or not re.match(r" *1/2 ", lines[-1]):
            raise SystemExit("".join(lines))
        return [wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]


def write_lines(path: pathlib.Path, nbytes: int) -> None:
    """JSON lines with the sources of Python's standard library."""
    from llama_jax.data.records import standard_library

    with path.open("w") as file:
        for document in itertools.cycle(standard_library()):
            file.write(json.dumps({"text": document.text}) + "\n")
            if file.tell() > nbytes:
                break


def measure_prepare(source: str, tokenizer: str, workers: str) -> dict:
    """Tokens a second of `prepare`, and processor seconds of its first process and of its
    workers.
    """
    from llama_jax.cli.prepare import read_text
    from llama_jax.data.shards import Settings, prepare_set

    text = read_text(tokenizer, "auto")
    with tempfile.TemporaryDirectory() as directory:
        settings, start = Settings(shard_tokens=1_000_000, workers=int(workers)), clock()
        manifest, _ = prepare_set(
            [source], pathlib.Path(directory) / "out", text, settings, lambda *call: None
        )
        wall, parent = since(start)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "tokens": manifest.tokens,
        "wall": wall,
        "parent": parent,
        "workers": children.ru_utime + children.ru_stime,
    }


def measure_tokenizer(source: str, tokenizer: str) -> dict:
    """Tokens of the tokenizer alone, one text after another, and their seconds."""
    from llama_jax.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(pathlib.Path(tokenizer))
    texts = [json.loads(line)["text"] for line in pathlib.Path(source).read_text().splitlines()]
    start = clock()
    tokens = sum(len(loaded.encode(text)) for text in texts)
    wall, processor = since(start)
    return {"tokens": tokens, "wall": wall, "processor": processor}


def child(name: str, *arguments: object) -> dict:
    """What a measurement in a process of its own finds."""
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def pair(seconds: list[float], unit: float = 1.0, form: str = ".2f") -> str:
    """Wall-clock and processor time."""
    return f"{seconds[0] / unit:{form}} ({seconds[1] / unit:{form}})"


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 1000, 150_000])
    parser.add_argument(
        "--tokenizer", help="file or folder; without one a vocabulary of 8,192 is trained"
    )
    parser.add_argument("--megabytes", type=float, default=8, help="of text to prepare")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, *arguments = options.measure
        print(json.dumps(globals()[f"measure_{name}"](*arguments)))
        return
    print(heading("numpy", "tokenizers"))
    print(f"load      {os.getloadavg()[0]:.2f} (average of the last minute, at the start)")
    print(
        f"settings  ulimit -n {OPEN_FILES}; wall-clock time, in parentheses that of the "
        "processor; one run each\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_lines(folder / "text.jsonl", int(options.megabytes * 1e6))
        tokenizer = (
            pathlib.Path(options.tokenizer)
            if options.tokenizer
            else trained(folder / "tokenizer.model")
        )
        print(
            f"sparse shards of {TOKENS:,} tokens; sequences of {LENGTH:,} tokens at "
            f"{SEQUENCES:,} random places"
        )
        print(
            "| shards | tokens | open, s | unigram entropy, s | descriptors | locate, us "
            "| read, us | read, one shard, us |"
        )
        print("|---|---|---|---|---|---|---|---|")
        starts = []
        for shards in options.shards:
            make_shards(folder / f"{shards}", shards, tokenizer)
            found = child("set", folder / f"{shards}")
            starts.append(
                f"| {shards:,} | "
                f"{pair(child('start', folder / f'{shards}')['start'], form='.1f')} |"
            )
            print(
                f"| {shards:,} | {shards * TOKENS:.3g} | {pair(found['open'])} | "
                f"{pair(found['unigram'])} | "
                f"{found['descriptors']} | {pair(found['locate'], 1e-6, '.1f')} | "
                f"{pair(found['again'], 1e-6, '.0f')} | "
                f"{pair(found['one shard'], 1e-6, '.0f')} |",
                flush=True,
            )
        print(
            "\ntrain.py on these shards (configs/debug.yaml), to the line of its first step; in "
            "parentheses the processor time of the whole process, two steps"
        )
        print("| shards | seconds |\n|---|---|\n" + "\n".join(starts), flush=True)
        raw = child("tokenizer", folder / "text.jsonl", tokenizer)
        print(f"\nprepare, JSON lines of {options.megabytes:g} MB, tokenizer {tokenizer.name}")
        print(
            "| | tokens/s | processor s, parent | processor s, workers | parent / "
            "workers |\n|---|---|---|---|---|"
        )
        print(
            f"| tokenizer alone, one process | {raw['tokens'] / raw['wall']:,.0f} | "
            f"{raw['processor']:.2f} | | |",
            flush=True,
        )
        for workers in options.workers:
            found = child("prepare", folder / "text.jsonl", tokenizer, workers)
            ratio = f"1/{found['workers'] / found['parent']:.1f}" if workers > 1 else ""
            print(
                f"| prepare, workers {workers} | {found['tokens'] / found['wall']:,.0f} "
                f"| {found['parent']:.2f} | "
                f"{found['workers']:.2f} | {ratio} |",
                flush=True,
            )
    print(f"\nload      {os.getloadavg()[0]:.2f} (at the end, this benchmark included)")


def trained(path: pathlib.Path) -> pathlib.Path:
    """A tokenizer of 8,192 pieces, trained on a part of the standard library."""
    from llama_jax.data.prepare import train_vocabulary
    from llama_jax.data.records import standard_library

    train_vocabulary(itertools.islice(standard_library(), 60), 8192, path, 0)
    return path


if __name__ == "__main__":
    main()
