"""`data verify` checks prepared data, and hashes the batch that a step of a run reads; `data show`
prints documents as a model sees them.
"""

import pathlib
import sys
from typing import TYPE_CHECKING

from llama_jax.cli.main import DAMAGED
from llama_jax.cli.options import OptionParser
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_RUN_CONFIG = "config.yaml"


def make_parser(prog: str) -> OptionParser:
    """The options of `data verify`."""
    parser = OptionParser(
        prog, "Check prepared data, byte by byte; or print the hash of the batch of a step."
    )
    parser.add_argument(
        "directory",
        nargs="?",
        metavar="DIR",
        help="folder that prepare wrote; with --step: of a run",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of a run, as train takes it; with --step"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="print the fingerprint of the global batch of this step, from 0",
    )
    return parser


def make_show_parser(prog: str) -> OptionParser:
    """The options of `data show`."""
    parser = OptionParser(
        prog, "Print documents of prepared data; tokens that are learned from stand in [[ ]]."
    )
    parser.add_argument("directory", metavar="DIR", help="folder that prepare wrote")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first document, from 0"
    )
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many to print")
    return parser


def main(arguments: list[str], prog: str = "data verify") -> int:
    """Runs `data verify` and returns its exit status: 5 where something is damaged."""
    if arguments[:1] == ["show"]:
        options = make_show_parser(prog.replace("verify", "show")).parse(arguments[1:])
        return _show_documents(pathlib.Path(options.directory), options.first, options.documents)
    if arguments[:1] not in (["verify"], ["--help"], ["-h"]):
        raise InputError(
            f"data {' '.join(arguments[:1])!r}: unknown; data verify DIR or data show DIR expected"
        )
    options = make_parser(prog).parse(arguments[1:] if arguments[0] == "verify" else arguments)
    if (options.directory is None) == (options.config is None):
        raise InputError("data verify: a folder, or --config FILE with --step N expected")
    if options.step is None:
        if options.directory is None:
            raise InputError(
                "data verify: --config given without --step N; the step of a batch expected"
            )
        return _verify(pathlib.Path(options.directory))
    return _show_batch(
        options.config or str(pathlib.Path(options.directory) / _RUN_CONFIG), options.step
    )


def _verify(directory: pathlib.Path) -> int:
    from llama_jax.data.token_set import Manifest, damage

    found = damage(directory)
    for line in found:
        print(f"damaged: {line}", file=sys.stderr)
    if found:
        return DAMAGED
    manifest = Manifest.read(directory)
    print(
        f"{directory}: whole; {manifest.documents:,} documents, {manifest.tokens:,} "
        f"tokens in {len(manifest.shards)} shards"
    )
    return 0


def _show_batch(config_file: str, step: int) -> int:
    from llama_jax.cli.arguments import parse_train
    from llama_jax.cli.train import architecture
    from llama_jax.data.packing import fingerprint

    if step < 0:
        raise InputError(f"--step: {step} given, 0 or more expected")
    config = parse_train(["--config", config_file], pathlib.Path(config_file), architecture)
    from llama_jax.training.data import make_batches, open_data

    batches = make_batches(open_data(config), config.data)
    batch = batches.batch(step)
    rows, length = batch.tokens.shape
    print(
        f"step {step}: data step {batches.steps.data_step(step)}, {rows} rows of {length} tokens, "
        f"{int(batch.weights.sum())} targets; sha256 {fingerprint(batch)}"
    )
    return 0


def _show_documents(directory: pathlib.Path, first: int, count: int) -> int:
    """Prints documents of the training part with their masks."""
    from llama_jax.data.token_set import TokenSet
    from llama_jax.text.tokenizer import load_tokenizer

    opened = TokenSet.open(directory)
    part = opened.train
    if not (0 <= first < part.documents and count > 0):
        raise InputError(
            f"--first {first}, --documents {count} given; documents from 0 to "
            f"{part.documents - 1}, at least one, expected"
        )
    tokenizer = load_tokenizer(opened.tokenizer_path)
    special = {number: text for text, number in tokenizer.special_tokens.items()}
    for number, document in enumerate(part.documents_from(first, count), first):
        learned = document.learned.tolist()
        print(f"document {number}: {len(learned)} tokens, {sum(learned)} learned from")
        print(_marked(document.ids.tolist(), learned, tokenizer, special))
    return 0


def _marked(
    ids: list[int], learned: list[bool], tokenizer: "Tokenizer", special: dict[int, str]
) -> str:
    """The text of tokens, with those that are learned from in [[ ]]."""
    parts, inside = [], False
    pieces = tokenizer.token_bytes.walk(ids)
    for number, flag, piece in zip(ids, learned, pieces):
        if flag != inside:
            parts.append(b"[[" if flag else b"]]")
            inside = flag
        parts.append(special[number].encode() if number in special else piece)
    return b"".join([*parts, b"]]" * inside]).decode("utf-8", "replace")
