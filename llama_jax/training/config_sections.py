"""The section `data` of a run's config."""

import dataclasses
import math
import re
from typing import Literal

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.data.batches import Steps
from llama_jax.errors import InputError

# --- config distributed ---
#
# The section `distributed` of a run's config: its processes, one a host.


_MODES = ("auto", "on", "off")
_LARGEST = 10**6


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Which processes train together; all are given the same config but for `process`.

    Attributes:
      mode: `off`: this process alone; `on`: with others; `auto`: with others where `coordinator` is
        given, or where the environment says so (JAX_COORDINATOR_ADDRESS, Slurm, Open MPI, a TPU
        pod).
      coordinator: `HOST:PORT` of process 0, reached by all and listened at by it alone; null to
        take the environment's.
      processes: how many there are; null to take the environment's.
      process: number of this one, from 0; null to take the environment's.
      startup_seconds: how long to wait for the others at the start, and for process 0 while it
        prepares the data.
      heartbeat_seconds: a process that is silent for this time is presumed dead, and the
        others end.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    startup_seconds: int = 1800
    heartbeat_seconds: int = 100

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InputError(
                f"distributed.mode: {self.mode!r} given, {' or '.join(_MODES)} expected"
            )
        for name, low in (
            ("processes", 1),
            ("process", 0),
            ("startup_seconds", 1),
            ("heartbeat_seconds", 1),
        ):
            value = getattr(self, name)
            whole = (
                isinstance(value, int) and not isinstance(value, bool) and low <= value <= _LARGEST
            )
            if not (whole or (value is None and name.startswith("process"))):
                raise InputError(
                    f"distributed.{name}: {value!r} given, a whole number from {low} to "
                    f"{_LARGEST} expected"
                )
        if self.coordinator is not None and not isinstance(self.coordinator, str):
            raise InputError(
                f"distributed.coordinator: {self.coordinator!r} given, HOST:PORT or null expected"
            )
        if (
            self.process is not None
            and self.processes is not None
            and self.process >= self.processes
        ):
            raise InputError(
                f"distributed.process: {self.process} given, below distributed.processes "
                f"({self.processes}) expected"
            )


# --- config checks ---
#
# What is checked of every key of a run's config: its kind and its range.


# Inclusive ranges, by section and key. Upper ends of counts are far above any use and keep typing
# errors out of loops.
_RANGES: dict[str, tuple[float, float]] = {
    "run.steps": (1, 10**9),
    "run.seed": (0, 2**32 - 1),
    "run.log_every": (1, 10**9),
    "run.eval_every": (0, 10**9),
    "run.eval_tokens": (0, 10**15),
    "run.checkpoint_every": (1, 10**9),
    "run.keep_checkpoints": (1, 10**6),
    "run.sample_tokens": (1, 10**6),
    "run.hang_seconds": (0, 10**6),
    "compute.loss_chunk": (1, 10**9),
    "data.vocab_size": (1, 1 << 22),
    "data.held_out_fraction": (0, 0.5),
    "data.length": (1, 1 << 27),
    "data.batch_size": (1, 10**9),
    "data.accumulation": (1, 10**6),
    "data.seed": (0, 2**32 - 1),
    "data.sources.weight": (1e-9, 1e9),
    "optimizer.learning_rate": (0, 10),
    "optimizer.warmup_steps": (0, 10**9),
    "optimizer.schedule_steps": (0, 10**9),
    "optimizer.decay_from": (0, 10**9),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.final_fraction": (0, 1),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.eps": (0, 1),
    "optimizer.weight_decay": (0, 10),
    "optimizer.clip_norm": (1e-9, 1e9),
    "optimizer.z_loss": (0, 1),
    "adapter.rank": (0, 1 << 14),
    "adapter.alpha": (1e-6, 1e6),
    "adapter.dropout": (0, 0.99),
    "adapter.new_tokens": (0, 1 << 17),
    "preference.beta": (0, 100),
    "guard.spike_sigma": (1, 1000),
    "guard.patience": (1, 200),
    "guard.rewinds": (0, 1000),
    "guard.check_replicas": (0, 10**9),
}


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Refuses a value, naming the expected one."""
    if not condition:
        raise InputError(f"{key}: {value!r} given, {expected} expected")


def _require_in_range(key: str, value: object, whole: bool) -> None:
    low, high = _RANGES[key]
    kinds = int if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    expected = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
    require(number and low <= value <= high, key, value, expected)  # type: ignore[operator]


def _require_kind(key: str, value: object, kind: type) -> None:
    expected = {bool: "true or false", str: "a text that is not empty"}[kind]
    require(isinstance(value, kind) and value != "", key, value, expected)


def check_fields(section: str, config: object) -> None:
    """Checks every field by its declared type: numbers by `_RANGES`, texts and switches by kind."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        key, value = f"{section}.{field.name}", getattr(config, field.name)
        if key in _RANGES:
            _require_in_range(key, value, whole=field.type is int)
        elif field.type in (bool, str):
            _require_kind(key, value, field.type)


# --- wall time ---
#
# The wall time that a run may take, as people write it.


_TIME = re.compile(r"(\d{1,4}):([0-5]\d):([0-5]\d)|(\d{1,8})")


def wall_seconds(given: str | int | None) -> float:
    """Seconds of a time such as `03:50:00` or `13800`; infinite for `None`, 0 for anything but a
    time.
    """
    if given is None:
        return math.inf
    found = None if isinstance(given, bool) else _TIME.fullmatch(str(given))
    if found is None:
        return 0
    hours, minutes, seconds, alone = found.groups()
    return int(alone) if alone else int(hours) * 3600 + int(minutes) * 60 + int(seconds)


# --- config data ---


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A folder that `prepare` wrote, as a part of the training data.

    Attributes:
      path: the folder.
      weight: its share of the sequences, beside the weights of the others.
      name: in metrics (`held_out/NAME/loss`); null for the folder's own.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    path: str
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        check_fields("data.sources", self)
        named = self.name is None or (
            isinstance(self.name, str) and self.name != "" and "/" not in self.name
        )
        require(named, "data.sources.name", self.name, "a name without / or null")


Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is trained on and how it is cut into batches.

    Attributes:
      paths: text files and folders of them; empty for the standard library of the running Python.
      sources: folders that `prepare` wrote, instead of `paths`: `[{path, weight, name}, ...]`,
        mixed sequence by sequence; their tokenizer is that of the run.
      vocab_size: of the tokenizer to train when `tokenizer` is not given; at most
        `model.vocab_size`.
      tokenizer: path of an existing tokenizer file; null to train one on the text.
      held_out_fraction: share of the documents kept out of training, for evaluation; of a single
        file, its end; 0 for none.
      length: `T`, tokens of a sequence.
      batch_size: sequences of one optimizer update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in; divides `batch_size`.
      packing: `cut`: documents one after another, cut into sequences; `fit`: whole documents side
        by side, by best fit; `auto`: `fit` for conversations, `cut` for text. (Pairs of answers
        always have a sequence each.)
      too_long: what happens to a whole document (`fit`, pairs) of more than `length` tokens: `drop`
        it, `cut_front` (a conversation loses the beginning of its prompt), `cut_end` (it loses
        answers), or `refuse` to begin; `auto`: `drop` for conversations and pairs, `cut_end` for
        text. Counted and printed at the start.
      batch_ramp: later sizes of a batch, `[[step, sequences], ...]`: from that step on this many
        sequences, in more micro-batches of the same size; skipped steps count.
      skip_steps: data that is never used, `[[first, last], ...]`: what these steps would have read
        is left out, and the steps from `first` on read what follows.
      seed: of the order of the data.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    paths: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    vocab_size: int = 4096
    tokenizer: str | None = None
    held_out_fraction: float = 0.02
    length: int = 256
    batch_size: int = 8
    accumulation: int = 1
    packing: Literal["auto", "cut", "fit"] = "auto"
    too_long: Literal["auto", "drop", "cut_front", "cut_end", "refuse"] = "auto"
    batch_ramp: Pairs = ()
    skip_steps: Pairs = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields("data", self)
        texts = isinstance(self.paths, tuple) and all(
            isinstance(path, str) and path for path in self.paths
        )
        require(texts, "data.paths", self.paths, "a list of paths such as [text, notes.md]")
        named = self.tokenizer is None or (isinstance(self.tokenizer, str) and self.tokenizer != "")
        require(named, "data.tokenizer", self.tokenizer, "a path or null")
        require(
            self.batch_size % self.accumulation == 0,
            "data.accumulation",
            self.accumulation,
            f"a divisor of data.batch_size ({self.batch_size})",
        )
        require(
            not (self.sources and self.paths),
            "data.paths",
            self.paths,
            "no text beside data.sources",
        )
        require(
            not (self.sources and self.tokenizer),
            "data.tokenizer",
            self.tokenizer,
            "none beside data.sources (they have one)",
        )
        require(
            self.packing in ("auto", "cut", "fit"), "data.packing", self.packing, "auto, cut or fit"
        )
        choices = ("auto", "drop", "cut_front", "cut_end", "refuse")
        require(self.too_long in choices, "data.too_long", self.too_long, ", ".join(choices))
        Steps(self.batch_size, self.batch_ramp, self.skip_steps)
        odd = [sequences for _, sequences in self.batch_ramp if sequences % micro_batch_size(self)]
        require(
            not odd,
            "data.batch_ramp",
            odd,
            f"multiples of a micro-batch's {micro_batch_size(self)} sequences",
        )


def micro_batch_size(data: DataConfig) -> int:
    """Rows of a micro-batch."""
    return data.batch_size // data.accumulation


# --- config method ---
#
# The sections of a run's config that say how it learns: optimizer, adapters, preferences, the guard
# against bad steps.


_BASES = ("auto", "float32", "bfloat16", "int8", "int4")
_FLOATS = ("float32", "bfloat16")
_OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
_SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate and additions to the loss.

    Attributes:
      name: `adamw`; `adafactor` (almost no state; the learning rate is relative to the size of a
        matrix's entries); `lion` (one moment; published with a third to a tenth of AdamW's learning
        rate and as much more decay); `muon` (one moment, made orthogonal, for the matrices of the
        layers, AdamW for the rest; learning rate and decay as for AdamW).
      learning_rate: peak, reached at the end of the warm-up.
      schedule: after the warm-up: `cosine`, `linear`, `wsd` (at the peak until the decay) or
        `constant`.
      warmup_steps: updates in which the learning rate rises to its peak.
      schedule_steps: updates that the schedule is laid out for, where that is not the run: 0 for
        `run.steps`.
      decay_from: updates after which the decay begins, from `learning_rate`, so that a finished run
        that is trained on decays anew; 0 for the end of the warm-up, or what `decay_fraction` says.
      decay_fraction: share of the schedule that the decay of `wsd` takes.
      final_fraction: learning rate of the last update, as a fraction of the peak.
      beta1: decay of the mean of the gradient; with `lion`, weight of the mean in an update.
      beta2: decay of the mean of its square; with `lion`, decay of the mean; `adafactor` has no use
        for either.
      eps: added to the root of the mean square, by AdamW.
      moments_dtype: of the mean of the gradient. bfloat16 halves it and rounds it to 8 bits: of the
        state of `adamw` a quarter is saved (the mean of the square stays float32: in bfloat16 its
        small changes would be lost), of that of `lion` half, of that of `muon` half for the
        matrices of the layers; `adafactor` has no such mean.
      param_dtype: of the trained parameters, as they are stored; updates are computed in float32
        and rounded to it. bfloat16 halves parameters and gradients, for models that would not fit
        otherwise, but a change smaller than about 1/512 of a number is lost: rounding is to the
        nearest, not stochastic.
      weight_decay: decoupled, times the learning rate; applied to matrices, not to the scales of
        norms.
      clip_norm: largest global norm of a gradient; a longer one is scaled down to it.
      z_loss: this times log(Z)^2 is added to the loss of each token, Z being the sum over the
        vocabulary that its softmax divides by, so that logits do not drift; 1e-4 in PaLM
        (arXiv:2204.02311), 0 for none.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    schedule_steps: int = 0
    decay_from: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
        require(self.name in _OPTIMIZERS, "optimizer.name", self.name, " or ".join(_OPTIMIZERS))
        require(
            self.schedule in _SCHEDULES,
            "optimizer.schedule",
            self.schedule,
            " or ".join(_SCHEDULES),
        )
        require(
            self.param_dtype in _FLOATS,
            "optimizer.param_dtype",
            self.param_dtype,
            " or ".join(_FLOATS),
        )
        dtypes = ("float32",) if self.name == "adafactor" else _FLOATS
        expected = " or ".join(dtypes) + (
            " (adafactor keeps no mean of the gradient)" if self.name == "adafactor" else ""
        )
        require(
            self.moments_dtype in dtypes, "optimizer.moments_dtype", self.moments_dtype, expected
        )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) over a frozen model, `run.init`, instead of training all of it.

    Attributes:
      rank: `r`, columns of an adapter's first factor; 0 for no adapters.
      alpha: the adapters' product is scaled by alpha / rank.
      dropout: share of an adapter's input that is left out in training.
      targets: matrices of a layer that have adapters, of `wq wk wv wo gate up down`.
      new_tokens: last entries of the vocabulary that are trained beside the adapters, in the
        embedding and in the head; `convert --new-token` says how many it has added.
      base: how the frozen weights are held: `float32`, `bfloat16`, `int8`, `int4`, or `auto` for
        the dtype of the compute.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LAYER_MATRICES
    new_tokens: int = 0
    base: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"

    def __post_init__(self) -> None:
        check_fields("adapter", self)
        require(self.base in _BASES, "adapter.base", self.base, " or ".join(_BASES))
        if self.new_tokens:
            require(self.rank > 0, "adapter.rank", self.rank, "above 0 with adapter.new_tokens")
            plain = self.base in ("auto", "float32", "bfloat16")
            require(plain, "adapter.base", self.base, "a float type with adapter.new_tokens")
        known = isinstance(self.targets, tuple) and set(self.targets) <= set(LAYER_MATRICES)
        once = known and len(set(self.targets)) == len(self.targets) > 0
        require(
            once,
            "adapter.targets",
            self.targets,
            f"a list of {', '.join(LAYER_MATRICES)}, each once",
        )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Training on pairs of a chosen and a rejected answer (DPO) instead of the next token.

    Attributes:
      beta: how much it costs to leave the model that the run began with; 0 for training on the next
        token.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        check_fields("preference", self)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is done about steps that go wrong; one whose loss or gradient is not finite is always
    skipped.

    Attributes:
      spike_skip: skip steps whose loss or gradient norm stands out above those of the last 128 good
        ones, too.
      spike_sigma: by how many standard deviations it has to stand out.
      patience: this many consecutive skipped steps, or this many and at least 10 of the last 200,
        send the run back to the newest checkpoint before them, to resume without the data they had
        read.
      rewinds: times that a run may go back to the same checkpoint; then it stops with a report.
      check_replicas: steps between two comparisons of the copies of parameters on different
        devices; 0 for none.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    spike_skip: bool = False
    spike_sigma: float = 6.0
    patience: int = 10
    rewinds: int = 3
    check_replicas: int = 0

    def __post_init__(self) -> None:
        check_fields("guard", self)
