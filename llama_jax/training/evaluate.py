"""Held-out loss in nats/token and bits/byte of the text that was scored; of pairs of answers the
loss of the objective.
"""

import collections
import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.axes import Array, Parameters
from llama_jax.data.batches import permute, sequential_sequences, sequential_windows
from llama_jax.data.packing import Batch, Cut, Name, Packing, TooLong, pack
from llama_jax.data.token_set import TokenSet
from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError
from llama_jax.generation.checks import check_prompts
from llama_jax.generation.generate import Generator
from llama_jax.generation.session import NotFiniteError
from llama_jax.model.llama import Llama, model_for
from llama_jax.parallel.sharding import Rules, batch_spec
from llama_jax.text.byte_level import TokenBytes
from llama_jax.text.stops import stop_ids
from llama_jax.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from llama_jax.training.config import RunConfig
from llama_jax.training.data import require_same_tokenizer
from llama_jax.training.loss import Objective, batch_loss
from llama_jax.training.metrics import LineFile, drop_later
from llama_jax.training.step import placed_sequences
from llama_jax.weights.load import Pretrained

_TEXT_CHUNK = 1024  # tokens whose logits exist at one time
_EVALUATION = 1 << 61  # set in the seed that chooses sequences for evaluations, and in no other


class Evaluation(NamedTuple):
    """How well a text is predicted.

    Attributes:
      tokens: targets that were scored: of text every token of a document but its first.
      nats_per_token: mean of -log p; not a number where nothing was scored.
      bits_per_byte: the same, in bits/byte of the UTF-8 text of the targets that were scored:
        comparable between tokenizers.
      bytes: of that text.
    """

    tokens: int
    nats_per_token: float
    bits_per_byte: float
    bytes: int

    @property
    def loss(self) -> float:
        """What a display shows."""
        return self.nats_per_token

    def metrics(self) -> dict[str, float | int]:
        """By their names in the metrics file."""
        return {
            "held_out/loss": self.nats_per_token,
            "held_out/bits_per_byte": self.bits_per_byte,
            "held_out/tokens": self.tokens,
        }

    def line(self) -> str:
        """For the table at the end of a run."""
        return (
            f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte "
            f"({self.tokens} tokens)"
        )


class PairEvaluation(NamedTuple):
    """How well the model ranks held-out pairs of answers (DPO).

    Attributes:
      pairs: that were scored.
      loss: mean of the objective.
      more: its further means: `accuracy`, `margin`, `chosen`, `rejected`.
    """

    pairs: int
    loss: float
    more: Mapping[str, float]

    def metrics(self) -> dict[str, float | int]:
        """By their names in the metrics file."""
        more = {f"held_out/{name}": value for name, value in self.more.items()}
        return {"held_out/loss": self.loss, **more, "held_out/pairs": self.pairs}

    def line(self) -> str:
        """For the table at the end of a run."""
        accuracy, margin = self.more["accuracy"], self.more["margin"]
        return (
            f"loss {self.loss:.4f}, accuracy {accuracy:.1%}, margin {margin:.4f} "
            f"({self.pairs} pairs)"
        )


def make_evaluation(nats: float, tokens: float, size: float) -> Evaluation:
    """An evaluation from the summed loss, its targets and their bytes."""
    return Evaluation(
        round(tokens),
        nats / tokens if tokens else math.nan,
        nats / math.log(2) / size if size else math.nan,
        round(size),
    )


def together(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of several texts as one: every token counts alike."""
    nats = math.fsum(part.nats_per_token * part.tokens for part in parts if part.tokens)
    return make_evaluation(
        nats, sum(part.tokens for part in parts), sum(part.bytes for part in parts)
    )


class ByteCounts(NamedTuple):
    """UTF-8 bytes of every token, int32 `[V]`; 0 for special tokens.

    Attributes:
      inside: inside of a text.
      opening: where a text begins.
    """

    inside: np.ndarray
    opening: np.ndarray


def byte_counts(token_bytes: TokenBytes) -> ByteCounts:
    """The bytes of every token of a tokenizer."""
    inside = np.array([len(piece) for piece in token_bytes.pieces], np.int32)
    opening = inside.copy()
    for token, piece in token_bytes.opening.items():
        opening[token] = len(piece)
    return ByteCounts(inside, opening)


def scored_bytes(batch: Batch, sizes: ByteCounts) -> Array:
    """Bytes of the targets of a batch `[B, T]`, each times its weight, summed."""
    inside, opening = map(jnp.asarray, sizes)
    first = jnp.ones_like(batch.documents[:, :1], bool)
    begins = jnp.concatenate([first, batch.documents[:, 1:] != batch.documents[:, :-1]], axis=1)
    # A text begins after the begin token of its document, which has no bytes.
    opens = begins & (inside[batch.tokens] == 0)
    return jnp.sum(batch.weights * jnp.where(opens, opening[batch.targets], inside[batch.targets]))


Sums = dict[str, Array]  # over a batch, by name
Evaluator = Callable[[Parameters, Batch], Sums]


def batch_evaluator(model: Llama, loss_chunk: int, sizes: ByteCounts) -> Evaluator:
    """A compiled function from parameters and a batch `[B, T]` to its `nats`, the `tokens` that are
    targets, their `bytes`.
    """

    def sums(params: Parameters, batch: Batch) -> Sums:
        """Over a batch."""
        nats = batch_loss(model, params, batch, loss_chunk)
        return {"nats": nats, "tokens": jnp.sum(batch.weights), "bytes": scored_bytes(batch, sizes)}

    return jax.jit(sums)


def pair_evaluator(model: Llama, loss_chunk: int, objective: Objective) -> Evaluator:
    """A compiled function from parameters and a batch `[B, T]` of pairs to the sums of an
    objective, and the `pairs`.
    """

    def sums(params: Parameters, batch: Batch) -> Sums:
        """Over a batch."""
        loss, more = objective.loss(model, params, batch, loss_chunk)
        return {"loss": loss, "pairs": objective.targets(batch), **more}

    return jax.jit(sums)


class HeldOut(NamedTuple):
    """What an evaluation reads of one data set: the same sequences each time.

    Attributes:
      packing: the sequences.
      numbers: of those that are read, ascending.
      end: a number beyond the last sequence: padding.
    """

    packing: Packing
    numbers: range | np.ndarray
    end: int


def choose_held_out(
    tokens: Mapping[str, Tokens],
    length: int,
    packing: Name,
    most: int,
    seed: int,
    too_long: TooLong = "auto",
) -> dict[str, HeldOut]:
    """The sequences that every evaluation of a run reads, of each data set by its name.

    Args:
      tokens: the held-out part of each data set.
      length: `T`, tokens of a sequence.
      packing: how text is put into sequences.
      most: tokens of all sequences together, padding included; each data set has its share of them
        by its number of sequences, at least one (of pairs: one pair); 0 for all that is held out.
      seed: chooses the sequences.
      too_long: what happens to examples of more than `length` tokens.

    Raises:
      InputError: for a data set of which no example can be scored.
    """
    packings = {name: pack(part, length, packing, too_long) for name, part in tokens.items()}
    counts = {name: _sequences(packed) for name, packed in packings.items()}
    for name, packed in packings.items():
        if not counts[name] or (
            isinstance(packed, Cut) and 0 < packed.count == packed.without_targets()
        ):
            raise InputError(
                f"{packed.tokens.name}: nothing that is held out can be scored within "
                f"data.length {length} "
                f"({packed.counts.too_long:,} of {packed.counts.documents:,} examples "
                "are longer); raise it, or data.too_long"
            )
    wanted, total = most / length, sum(counts.values())
    chosen: dict[str, HeldOut] = {}
    for name, packed in packings.items():
        units, unit = counts[name] // packed.unit, packed.unit
        few = max(1, round(wanted * counts[name] / max(1, total) / unit))
        numbers: range | np.ndarray = range(counts[name])
        if most and few < units:
            order = np.sort(permute(np.arange(few, dtype=np.int64), units, seed | _EVALUATION, 0))
            numbers = (order[:, None] * unit + np.arange(unit)).ravel()
        chosen[name] = HeldOut(packed, numbers, counts[name])
    return chosen


def _sequences(packing: Packing) -> int:
    """How many there are; of text that is cut, with the last one, which may not be full."""
    return (
        -(-(packing.tokens.size - 1) // packing.length)
        if isinstance(packing, Cut)
        else packing.count
    )


def evaluate(
    run: Evaluator,
    params: Parameters,
    held_out: HeldOut,
    batch_size: int,
    mesh: Mesh,
    rules: Rules,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The sums of an evaluator over the sequences of a data set.

    Args:
      run: a compiled evaluator.
      params: passed to it.
      held_out: the sequences; each process reads those of its own devices.
      batch_size: sequences at a time; the last batch is filled up with padding.
      mesh: the devices.
      rules: of the model, which say how they share a batch.
      alive: called after every batch.
    """
    sharding, totals = (
        NamedSharding(mesh, batch_spec(rules)),
        collections.defaultdict[str, float](float),
    )
    packing, numbers = held_out.packing, held_out.numbers
    before: Sums = {}

    def add(sums: Sums) -> None:
        """Waits for a batch: the host must not run ahead and fill the device."""
        for name, value in jax.device_get(sums).items():
            totals[name] += float(value)
        alive()

    for first in range(0, len(numbers), batch_size):
        padded = np.full(batch_size, held_out.end, np.int64)
        some = numbers[first : first + batch_size]
        padded[: len(some)] = some
        sums = run(params, placed_sequences(packing.sequences, padded, packing.length, sharding))
        add(before)
        before = sums
    add(before)
    return dict(totals)


def text_evaluation(sums: Mapping[str, float]) -> Evaluation:
    """The evaluation of a text from its sums."""
    return make_evaluation(sums.get("nats", 0.0), sums.get("tokens", 0.0), sums.get("bytes", 0.0))


def pair_evaluation(parts: Sequence[Mapping[str, float]]) -> PairEvaluation:
    """The evaluation of pairs from the sums over data sets."""
    totals = _added(parts)
    pairs = totals.pop("pairs", 0.0)
    means = {name: value / pairs if pairs else math.nan for name, value in totals.items()}
    return PairEvaluation(round(pairs), means.pop("loss", math.nan), means)


def _added(parts: Iterable[Mapping[str, SupportsFloat]]) -> dict[str, float]:
    """Sums of sums, name by name."""
    totals = collections.defaultdict[str, float](float)
    for part in parts:
        for name, value in part.items():
            totals[name] += float(value)
    return totals


def _in_order(tokens: Tokens, length: int, batch_size: int, packing: Name) -> Iterator[Batch]:
    """All tokens once, in batches of sequences of `length`."""
    if packing == "fit" or tokens.kind == "pairs":
        return sequential_sequences(pack(tokens, length, packing, "cut_end"), batch_size)
    return sequential_windows(tokens, length, batch_size)


def evaluate_prepared(
    model: Pretrained, data: TokenSet, length: int | None = None, **options: Any
) -> Evaluation:
    """Loss of a model on the held-out part of prepared data: text in windows, conversations whole,
    of pairs the chosen answers.

    Args:
      model: from `llama_jax.load`.
      data: prepared with the tokenizer of this model.
      length: tokens of a sequence; the model's context by default. What is longer is cut.
      **options: `dtype`, `attention`, `rules` of `ModelOptions`.

    Raises:
      InputError: if nothing was held out, or nothing of it can be scored; for a length out of
        range, and tokens of another tokenizer.
    """
    tokens, context = data.held_out, model.config.context_length
    if tokens is None:
        raise InputError(f"{data.directory}: nothing was held out; prepare it with --held-out 0.01")
    require_same_tokenizer(data, model.tokenizer, "the model")
    if (
        tokens.vocab_size > model.config.vocab_size
        and (largest := tokens.counts().largest) >= model.config.vocab_size
    ):
        raise InputError(
            f"{tokens.name}: token {largest}; the vocabulary of the model goes to "
            f"{model.config.vocab_size - 1}"
        )
    length = min(context, max(1, tokens.size - 1)) if length is None else length
    if not 1 <= length <= context:
        raise InputError(
            f"sequences of {length} tokens asked for; 1 to {context}, the model's context, expected"
        )
    sequences = _in_order(tokens, length, 1, "cut" if tokens.kind == "text" else "fit")
    scored = itertools.islice(sequences, 0, None, 2 if tokens.kind == "pairs" else 1)
    result = _summed(model, load_tokenizer(data.tokenizer_path), scored, options)
    if not result.tokens:
        raise InputError(
            f"{tokens.name}: no answer begins within {length} tokens, so nothing can be "
            "scored; raise --length"
        )
    return result


def _summed(
    model: Pretrained, tokenizer: Tokenizer, batches: Iterable[Batch], options: Mapping[str, Any]
) -> Evaluation:
    """The evaluation of a model on batches."""
    run = batch_evaluator(
        model_for(model.params, model.config, **options),
        _TEXT_CHUNK,
        byte_counts(tokenizer.token_bytes),
    )
    return text_evaluation(_added(run(model.params, batch) for batch in batches))


def evaluate_text(
    model: Pretrained, text: str | Sequence[str], length: int | None = None, **options: Any
) -> Evaluation:
    """Loss of a model on a text, or several, in windows of `length` tokens that each begin without
    a past.

    Every token is predicted once, but for the first of a text where the model's tokenizer puts no
    begin token before it.

    Args:
      model: from `llama_jax.load`.
      text: any text, or texts of which each has windows of its own.
      length: tokens of a window; the model's context by default.
      **options: `dtype`, `attention`, `rules` of `ModelOptions`.

    Raises:
      InputError: for a text of fewer than two tokens, a length out of range, a model without
        tokenizer, and a tokenizer with tokens that the model does not have.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.origin} has no tokenizer: a directory with its tokenizer.json or "
            "tokenizer.model beside the weights, or a GGUF file with one inside, expected"
        )
    texts = [text] if isinstance(text, str) else list(text)
    sequences = [np.asarray(encode_prompt(model.tokenizer, one), np.int32) for one in texts]
    longest, context = max(map(len, sequences), default=0), model.config.context_length
    length = context if length is None else length
    if longest < 2 or not 1 <= length <= context:
        raise InputError(
            f"a text of {longest} tokens in windows of {length}: at least 2 tokens, "
            f"windows of 1 to {context} (the model's "
            "context) expected"
        )
    length = min(length, longest - 1)
    vocabulary, largest = (
        model.config.vocab_size,
        max(int(ids.max()) for ids in sequences if len(ids)),
    )
    if largest >= vocabulary:
        raise InputError(
            f"the text holds token {largest}; the vocabulary goes from 0 to {vocabulary - 1}"
        )
    windows = (window for ids in sequences for window in _text_windows(ids, length))
    return _summed(model, model.tokenizer, windows, options)


def _text_windows(ids: np.ndarray, length: int) -> Iterator[Batch]:
    """One sequence at a time; the last one filled up with targets of weight 0."""
    for first in range(0, len(ids) - 1, length):
        window = ids[first : first + length + 1]
        padded = np.zeros(length + 1, np.int32)
        padded[: len(window)] = window
        weights = (np.arange(length) < len(window) - 1).astype(np.float32)
        yield Batch(
            padded[None, :-1], padded[None, 1:], weights[None], np.ones((1, length), np.int32)
        )


# --- samples ---
#
# What the model in training says: some prompts continued at every evaluation.


RUN_SAMPLES = "samples.jsonl"  # in the directory of a run
_SHOWN = 160  # characters of a line on the display


class Samples:
    """The prompts of a run (`run.sample_prompts`), continued by the most probable tokens, all of
    them together.

    Args:
      run: which prompts, how many tokens, and where to keep the texts.
      model: the module that is trained.
      mesh: the devices that it is trained on.
      tokenizer_path: the tokenizer of the run.
      say: takes one line of text.

    Raises:
      InputError: for prompts that the model cannot take, and for prompts on several hosts.
    """

    def __init__(
        self,
        run: RunConfig,
        model: Llama,
        mesh: Mesh,
        tokenizer_path: Path,
        say: Callable[[str], None],
    ) -> None:
        self._prompts, self._new_tokens = run.sample_prompts, run.sample_tokens
        self._path = Path(run.dir) / RUN_SAMPLES
        self._model, self._mesh, self._say = model, mesh, say
        if not self._prompts:
            return
        if jax.process_count() > 1:
            raise InputError(
                f"run.sample_prompts: given on {jax.process_count()} hosts, one "
                "expected; leave them out"
            )
        self._tokenizer = load_tokenizer(tokenizer_path)
        try:
            self._ids = check_prompts(
                [encode_prompt(self._tokenizer, prompt) for prompt in self._prompts], model.config
            )
        except InputError as error:
            raise InputError(f"run.sample_prompts: {error}") from None

    def begin(self, step: int) -> None:
        """Drops what an interrupted run left of steps after this one, from which training goes
        on.
        """
        if self._prompts:
            self._file(functools.partial(drop_later, self._path, step)).close()

    def take(self, step: int, params: Parameters) -> None:
        """Continues all prompts; shows and keeps the texts.

        Args:
          step: updates done.
          params: current parameters, in the form of the module, on the mesh.
        """
        if not self._prompts:
            return
        options = (
            self._model.options
        )  # the programs are compiled at the first call, and found again at the later ones
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # a few tokens on the mesh of a training, whatever it gathers
            generator = Generator(
                params, self._model.config, self._mesh, dtype=options.dtype, rules=options.rules
            )
        try:
            sequences = generator.generate(
                self._ids, self._new_tokens, stop_ids=stop_ids(self._tokenizer)
            )
        except NotFiniteError as error:  # the guard of the run decides what becomes of it
            self._say(f"sample    {error}")
            return
        file = self._file()
        for prompt, sequence in zip(self._prompts, sequences):
            # The model may have more entries than the tokenizer has tokens; those have no text.
            text = self._tokenizer.decode(
                [token for token in sequence.token_ids if token < self._tokenizer.vocab_size]
            )
            self._say(shown(prompt, text))
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}))
        file.close()

    def _file(self, prepare: Callable[[], None] = lambda: None) -> LineFile:
        return LineFile(self._path, "samples", self._say, prepare)


def shown(prompt: str, text: str) -> str:
    """A prompt and its text in one line of bounded length, whatever characters they hold."""
    line = f"sample    {prompt!r} {text!r}"
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."
