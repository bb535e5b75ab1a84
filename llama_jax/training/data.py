"""The data of a run: corpora that are mixed, each with its held-out part; their batches."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.batches import Batches, Source, Steps
from llama_jax.data.held_out import Split, split_documents
from llama_jax.data.packing import Counts, Cut, pack, packing_of
from llama_jax.data.prepare import PreparedData, hash_tokenizer, prepare
from llama_jax.data.records import read_corpus, standard_library
from llama_jax.data.sources import left_out
from llama_jax.data.token_set import Manifest, TokenSet, manifest_sha256
from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import DataConfig

Say = Callable[[str], None]


class Corpus(NamedTuple):
    """One data set of a run.

    Attributes:
      name: for metrics and messages.
      weight: its share of the sequences, beside the weights of the others.
      train: tokens to train on.
      held_out: tokens to evaluate on; `None` if nothing was held out.
    """

    name: str
    weight: float
    train: Tokens
    held_out: Tokens | None


class RunData(NamedTuple):
    """All data of a run.

    Attributes:
      corpora: at least one.
      tokenizer_path: the tokenizer that made them, file or folder.
      tokenizer_sha256: of its files.
    """

    corpora: tuple[Corpus, ...]
    tokenizer_path: Path
    tokenizer_sha256: str

    @property
    def train(self) -> list[Tokens]:
        """What is trained on."""
        return [corpus.train for corpus in self.corpora]

    @property
    def held_out(self) -> dict[str, Tokens]:
        """What is evaluated on, by corpus."""
        return {
            corpus.name: corpus.held_out for corpus in self.corpora if corpus.held_out is not None
        }


def split_corpus(config: TrainConfig) -> Split | None:
    """The text of a run, its two sides; `None` where the run has prepared data."""
    return None if config.data.sources else _split_text(config.data)


def _split_text(data: DataConfig) -> Split:
    return split_documents(
        lambda: read_corpus(data.paths) if data.paths else standard_library(),
        data.held_out_fraction,
    )


def open_data(
    config: TrainConfig, split: Split | None = None, say: Say = lambda line: None
) -> RunData:
    """The data of a run: prepared folders, or text that is encoded below the run's directory once.

    Args:
      config: of the run.
      split: of `split_corpus`, where it was made already.
      say: told of work that takes long.

    Raises:
      InputError: for data of different tokenizers, or with tokens that the model does not have.
    """
    data = config.data
    opened = (
        _open_sources(data) if data.sources else _open_text(config, split or _split_text(data), say)
    )
    _require_vocabulary(opened, config.model.vocab_size)
    return opened


def make_batches(opened: RunData, data: DataConfig) -> Batches:
    """The batches of a run.

    Raises:
      InputError: if there is too little data for one, or batches would have nothing to learn from.
    """
    packed = [
        pack(corpus.train, data.length, data.packing, data.too_long) for corpus in opened.corpora
    ]
    for packing in packed:
        if packing.tokens.kind != "text" and not packing.count:
            raise InputError(
                f"{packing.tokens.name}: no example with an answer fits into data.length "
                f"{data.length} "
                f"({packing.counts.too_long:,} of {packing.counts.documents:,} are "
                "longer); raise it, or see data.too_long"
            )
    sources = tuple(
        Source(packing, corpus.weight) for packing, corpus in zip(packed, opened.corpora)
    )
    batches = Batches(sources, Steps(data.batch_size, data.batch_ramp, data.skip_steps), data.seed)
    _require_targets(batches, data)
    return batches


def _require_targets(batches: Batches, data: DataConfig) -> None:
    """Refuses conversations cut so that batches are to be expected in which there is nothing to
    learn.
    """
    cut = [source.packing for source in batches.sources if isinstance(source.packing, Cut)]
    empty = sum(packing.without_targets() for packing in cut)
    sequences = sum(source.packing.count for source in batches.sources)
    fewest = min([data.batch_size, *(size for _, size in data.batch_ramp)])
    if sequences / fewest * (empty / sequences) ** fewest >= 1:
        raise InputError(
            f"data.packing cut: {empty:,} of {sequences:,} sequences of {data.length} "
            "tokens hold no answer, so batches of "
            f"{fewest} would have nothing to learn from; set it to fit, raise "
            "data.length, or take larger batches"
        )


def packing_lines(batches: Batches) -> list[str]:
    """How documents became sequences: counts of dropped and cut documents, one line for each
    data set.
    """
    lines = []
    for packing, _ in batches.sources:
        counts, name = packing.counts, packing.tokens.name
        if packing.tokens.kind == "chat" and isinstance(packing, Cut):
            lines.append(
                f"{name}: conversations are cut into sequences, so most begin in the "
                "middle of one; data.packing fit"
            )
        if counts.too_long:
            cut = counts.too_long - counts.masked - counts.dropped if packing.unit == 1 else 0
            parts = [f"{counts.dropped:,} dropped"] * (counts.dropped > 0) + [f"{cut:,} cut"] * (
                cut > 0
            )
            parts += [f"{counts.masked:,} left out without an answer"] * (counts.masked > 0)
            lines.append(
                f"{name}: {counts.too_long:,} of {counts.documents:,} examples have more "
                "than data.length "
                f"{packing.length} tokens: {', '.join(parts) or 'cut'} (data.too_long)"
            )
    return lines


def packing_figures(batches: Batches) -> dict[str, int]:
    """The same over all data sets whose documents are whole, for the metrics; nothing where there
    are none.
    """
    counts = [packing.counts for packing, _ in batches.sources if not isinstance(packing, Cut)]
    return (
        {name: sum(getattr(part, name) for part in counts) for name in Counts._fields}
        if counts
        else {}
    )


def packing_identity(data: DataConfig) -> dict[str, str]:
    """How a run packs its data, for its checkpoints.

    Cutting whole documents at their end, as all runs once did, is not told.
    """
    kinds = {Manifest.read(Path(source.path)).kind for source in data.sources} or {"text"}
    packings = sorted({packing_of(kind, data.packing) for kind in kinds})
    told = {"packing": " and ".join(packings)}
    whole = packings != ["cut"] or "pairs" in kinds
    ends = data.too_long == "cut_end" or (data.too_long == "auto" and kinds == {"text"})
    return told if ends or not whole else told | {"too_long": data.too_long}


def require_same_tokenizer(prepared: TokenSet, tokenizer: Tokenizer | None, model: str) -> None:
    """Refuses data made with tokens that mean something else to a model.

    Args:
      prepared: the data.
      tokenizer: of the model; without one there is nothing to compare.
      model: the same in words, and where it is.

    Raises:
      InputError: naming the first token that differs.
    """
    if tokenizer is None:
        return
    theirs, ours = (
        load_tokenizer(prepared.tokenizer_path).token_bytes.pieces,
        tokenizer.token_bytes.pieces,
    )
    differing = next((token for token, (a, b) in enumerate(zip(theirs, ours)) if a != b), None)
    if differing is not None:
        raise InputError(
            f"in {prepared.directory} token {differing} is {theirs[differing]!r:.40}, in "
            f"{model} it is "
            f"{ours[differing]!r:.40}; prepare the data with the tokenizer of this model"
        )


def sources_identity(data: DataConfig) -> list[str]:
    """What prepared folders a run reads, in their order, by the hashes of their manifests."""
    return [
        f"{name} {manifest_sha256(Path(source.path))[:16]} x {source.weight}"
        for name, source in zip(_names(data), data.sources)
    ]


def _names(data: DataConfig) -> list[str]:
    names = [source.name or Path(source.path).absolute().name for source in data.sources]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"data.sources: two are called {twice[0]!r}; give each a name of its own")
    return names


def _open_sources(data: DataConfig) -> RunData:
    sets = [TokenSet.open(Path(source.path)) for source in data.sources]
    for opened in sets:
        if opened.manifest.tokenizer_sha256 != sets[0].manifest.tokenizer_sha256:
            raise InputError(
                f"data.sources: {opened.directory} is not of the tokenizer of "
                f"{sets[0].directory}; prepare both with one"
            )
    corpora = (
        Corpus(name, source.weight, opened.train, opened.held_out)
        for name, source, opened in zip(_names(data), data.sources, sets)
    )
    digest = hash_tokenizer(sets[0].tokenizer_path)
    if digest != sets[0].manifest.tokenizer_sha256:
        raise InputError(
            f"{sets[0].tokenizer_path}: not the tokenizer of the manifest; prepare the data again"
        )
    return RunData(tuple(corpora), sets[0].tokenizer_path, digest)


def _open_text(config: TrainConfig, split: Split, say: Say) -> RunData:
    reported: list[str] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        """Says once that a stage has begun."""
        if stage not in reported:
            reported.append(stage)
            say(
                {"vocabulary": "training the tokenizer ...", "encode": "encoding the text ..."}[
                    stage
                ]
            )

    data = config.data
    missing = left_out(data.paths)
    if missing is not None:
        say(f"data.paths: {missing}")
    made: PreparedData = prepare(
        Path(config.run.dir) / "data",
        split,
        vocab_size=data.vocab_size,
        seed=data.seed,
        tokenizer_path=Path(data.tokenizer) if data.tokenizer else None,
        on_progress=on_progress,
    )
    corpus = Corpus("text", 1.0, made.train, made.held_out)
    return RunData((corpus,), made.tokenizer_path, made.train.header.tokenizer_sha256)


def _require_vocabulary(opened: RunData, vocab_size: int) -> None:
    """Refuses tokens that the model does not have; looks for them only where the tokenizer is
    larger than the model.
    """
    for tokens in (*opened.train, *opened.held_out.values()):
        if tokens.vocab_size > vocab_size and (largest := tokens.counts().largest) >= vocab_size:
            raise InputError(
                f"{tokens.name}: token {largest}, but model.vocab_size is {vocab_size}; "
                "take the tokenizer of this model, or a "
                f"vocabulary of {tokens.vocab_size}"
            )
