"""One training run as data: every key that `train.py` understands, with its meaning, default and range.

The sections are frozen dataclasses; what a YAML file calls `optimizer.learning_rate` is here
`OptimizerConfig.learning_rate`. Numbers of the model have no defaults (see `llama_jax.config`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

from llama_jax.accounting import LAYER_MATRICES, parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.data.steps import Steps
from llama_jax.errors import InputError
from llama_jax.training.distributed_config import DistributedConfig
from llama_jax.training.wall_time import wall_seconds

# Inclusive ranges, by section and key. Upper ends of counts are far above any use and keep typing errors out of loops.
_RANGES: dict[str, tuple[float, float]] = {
    "run.steps": (1, 10**9),
    "run.seed": (0, 2**32 - 1),
    "run.log_every": (1, 10**9),
    "run.eval_every": (0, 10**9),
    "run.checkpoint_every": (1, 10**9),
    "run.keep_checkpoints": (1, 10**6),
    "run.sample_tokens": (1, 10**6),
    "run.hang_seconds": (0, 10**6),
    "compute.loss_chunk": (1, 10**9),
    "data.vocab_size": (1, 1 << 22),
    "data.held_out_fraction": (0, 0.5),
    "data.length": (1, 1 << 27),
    "data.batch_rows": (1, 10**9),
    "data.accumulation": (1, 10**6),
    "data.seed": (0, 2**32 - 1),
    "data.sources.weight": (1e-9, 1e9),
    "optimizer.learning_rate": (0, 10),
    "optimizer.warmup_steps": (0, 10**9),
    "optimizer.schedule_steps": (0, 10**9),
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
    "preference.beta": (0, 100),
    "guard.spike_sigma": (1, 1000),
    "guard.patience": (1, 200),
    "guard.rewinds": (0, 1000),
    "guard.check_replicas": (0, 10**9),
}
_DTYPES = ("auto", "float32", "bfloat16")
_BASES = (*_DTYPES, "int8", "int4")
_OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
_SCHEDULES = ("cosine", "wsd", "linear", "constant")


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{key}: {value!r} given, {expected} expected")


def _require_in_range(key: str, value: object, whole: bool) -> None:
    low, high = _RANGES[key]
    kinds = int if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    expected = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
    _require(number and low <= value <= high, key, value, expected)  # type: ignore[operator]


def _require_kind(key: str, value: object, kind: type) -> None:
    expected = {bool: "true or false", str: "a text that is not empty"}[kind]
    _require(isinstance(value, kind) and value != "", key, value, expected)


def _check_fields(section: str, config: object) -> None:
    """Checks every field by its declared type: numbers by `_RANGES`, texts and switches by kind."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        key, value = f"{section}.{field.name}", getattr(config, field.name)
        if key in _RANGES:
            _require_in_range(key, value, whole=field.type is int)
        elif field.type in (bool, str):
            _require_kind(key, value, field.type)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long the run is, where it writes, and how often.

    Attributes:
      dir: directory of the run: metrics, checkpoints, tokenizer and the resolved config.
      steps: optimizer updates in all, those before a resume included.
      seed: of the initial parameters.
      init: a model to begin with, anything that `infer --model` takes: its parameters, its architecture and, unless
        `data.tokenizer` names another, its tokenizer; null for random parameters.
      overwrite: start anew even where `dir` holds a run; otherwise that run is resumed.
      log_every: steps between two lines of metrics.
      eval_every: steps between two evaluations on held-out text; 0 for none.
      checkpoint_every: steps between two checkpoints; the last step always has one.
      keep_checkpoints: newest checkpoints to keep; two or more leave one to fall back on when the newest is damaged.
      max_time: wall time of this program, start-up included, as HH:MM:SS or in seconds: the run is saved and ended after the
        step in which it is over; null for no limit.
      hang_seconds: a run without an update for so long, or for ten times as long as an update takes, whichever is longer, is
        taken to hang: it writes down all stacks and exits with status 3; 0 never.
      trackers: where metrics go beside `metrics.jsonl`: some of tensorboard, wandb, trackio, each an extra to install.
      profile: `FIRST:LAST`, steps to trace (they take longer) into `dir/profile`, as in 10:15; also `--profile`.
      sample_prompts: texts that the model continues at each evaluation, as in `["def ", "The "]`; also kept in `samples.jsonl`.
      sample_tokens: at most so many tokens each.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    dir: str = "runs/debug"
    steps: int = 1000
    seed: int = 0
    init: str | None = None
    overwrite: bool = False
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    max_time: str | int | None = None
    hang_seconds: float = 300
    trackers: tuple[str, ...] = ()
    profile: str | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _check_fields("run", self)
        _require(isinstance(self.trackers, tuple), "run.trackers", self.trackers, "a list such as [tensorboard]")
        _require(wall_seconds(self.max_time) > 0, "run.max_time", self.max_time, "HH:MM:SS, seconds or null")
        named = self.init is None or (isinstance(self.init, str) and self.init != "")
        _require(named, "run.init", self.init, "a path or null")
        traced = profiled_steps(self.profile)
        _require(self.profile is None or (len(traced) > 0 and traced[0] >= 1 and traced[-1] <= self.steps), "run.profile",
                 self.profile, f"FIRST:LAST from 1 to run.steps ({self.steps}), such as 10:15, or null")  # fmt: skip
        prompts = isinstance(self.sample_prompts, tuple) and all(isinstance(text, str) and text for text in self.sample_prompts)
        _require(prompts, "run.sample_prompts", self.sample_prompts, 'a list of texts such as ["def ", "The "]')


def profiled_steps(profile: object) -> range:
    """The steps that `run.profile` names; none where it names none."""
    found = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", profile) if isinstance(profile, str) else None
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; nothing here changes what is computed beyond rounding.

    Attributes:
      dtype: of activations and of weights in matrix products; `auto` is float32 on a CPU and bfloat16 elsewhere.
      remat: what the forward pass keeps for the backward pass: `none` (recompute nothing), `full` (recompute each
        layer), or names joined by + of what to keep: `q k v context middle gate up`.
      scan_layers: run the layers as one compiled loop (compile time does not grow with depth) instead of unrolled.
      attention: backend of the attention; `auto` takes the best that the device supports.
      loss_chunk: tokens whose logits exist at one time in the loss.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    loss_chunk: int = 2048

    def __post_init__(self) -> None:
        _require(self.dtype in _DTYPES, "compute.dtype", self.dtype, " or ".join(_DTYPES))
        _check_fields("compute", self)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A folder that `prepare` wrote, as a part of the training data.

    Attributes:
      path: the folder.
      weight: its share of the rows, beside the weights of the others.
      name: in metrics (`held_out/NAME/loss`); null for the folder's own.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    path: str
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        _check_fields("data.sources", self)
        named = self.name is None or (isinstance(self.name, str) and self.name != "" and "/" not in self.name)
        _require(named, "data.sources.name", self.name, "a name without / or null")


Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is trained on and how it is cut into batches.

    Attributes:
      paths: text files and folders of them; empty for the standard library of the running Python.
      sources: folders that `prepare` wrote, in place of `paths`: `[{path, weight, name}, ...]`, mixed row by row; their
        tokenizer is that of the run.
      vocab_size: of the tokenizer to train when `tokenizer` is not given; at most `model.vocab_size`.
      tokenizer: path of an existing tokenizer file; null to train one on the text.
      held_out_fraction: share of the documents kept out of training, for evaluation; of a single file, its end.
      length: `T`, tokens predicted in a row.
      batch_rows: rows of one optimizer update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in; divides `batch_rows`.
      packing: `cut`: documents one after another, cut into rows; `fit`: whole documents side by side, by best fit. (Pairs of
        answers always have a row each.)
      batch_ramp: later sizes of a batch, `[[step, rows], ...]`: from that step on so many rows, in more micro-batches of the
        same size; skipped steps count.
      skip_steps: data that is never used, `[[first, last], ...]`: what these steps would have read is left out, and the
        steps from `first` on read what follows.
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
    batch_rows: int = 8
    accumulation: int = 1
    packing: Literal["cut", "fit"] = "cut"
    batch_ramp: Pairs = ()
    skip_steps: Pairs = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fields("data", self)
        texts = isinstance(self.paths, tuple) and all(isinstance(path, str) and path for path in self.paths)
        _require(texts, "data.paths", self.paths, "a list of paths such as [text, notes.md]")
        named = self.tokenizer is None or (isinstance(self.tokenizer, str) and self.tokenizer != "")
        _require(named, "data.tokenizer", self.tokenizer, "a path or null")
        _require(self.batch_rows % self.accumulation == 0, "data.accumulation", self.accumulation,
                 f"a divisor of data.batch_rows ({self.batch_rows})")  # fmt: skip
        _require(not (self.sources and self.paths), "data.paths", self.paths, "no text beside data.sources")
        _require(
            not (self.sources and self.tokenizer), "data.tokenizer", self.tokenizer, "none beside data.sources (they have one)"
        )
        _require(self.packing in ("cut", "fit"), "data.packing", self.packing, "cut or fit")
        Steps(self.batch_rows, self.batch_ramp, self.skip_steps)
        odd = [rows for _, rows in self.batch_ramp if rows % micro_rows(self)]
        _require(not odd, "data.batch_ramp", odd, f"multiples of a micro-batch's {micro_rows(self)} rows")


def micro_rows(data: DataConfig) -> int:
    """Rows of a micro-batch."""
    return data.batch_rows // data.accumulation


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate and what is added to the loss.

    Attributes:
      name: `adamw`; `adafactor` (almost no state; the learning rate is relative to the size of a matrix's entries); `lion` (one
        moment; published with a third to a tenth of AdamW's learning rate and as much more decay); `muon` (one moment, made
        orthogonal, for the matrices of the layers, AdamW for the rest; learning rate and decay as for AdamW).
      learning_rate: peak, reached at the end of the warm-up.
      schedule: after the warm-up: `cosine`, `linear`, `wsd` (at the peak until the decay) or `constant`.
      warmup_steps: updates in which the learning rate rises to its peak.
      schedule_steps: updates that the schedule is laid out for, where that is not the run: 0 for `run.steps`.
      decay_fraction: share of the schedule that the decay of `wsd` takes.
      final_fraction: learning rate of the last update, as a fraction of the peak.
      beta1: decay of the mean of the gradient; with `lion`, weight of the mean in an update.
      beta2: decay of the mean of its square; with `lion`, decay of the mean; `adafactor` has no use for either.
      eps: added to the root of the mean square, by AdamW.
      moments_dtype: of the mean of the gradient. bfloat16 halves it and rounds it to 8 bits: of the state of `adamw` a quarter
        is saved (the mean of the square stays float32: in bfloat16 its small changes would be lost), of that of `lion` half, of
        that of `muon` half for the matrices of the layers; `adafactor` has no such mean.
      weight_decay: decoupled, times the learning rate; applied to matrices, not to the scales of norms.
      clip_norm: largest global norm of a gradient; a longer one is scaled down to it.
      z_loss: this times log(Z)^2 is added to the loss of each token, Z being the sum over the vocabulary that its softmax
        divides by, so that logits do not drift; 1e-4 in PaLM (arXiv:2204.02311), 0 for none.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    schedule_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _check_fields("optimizer", self)
        _require(self.name in _OPTIMIZERS, "optimizer.name", self.name, " or ".join(_OPTIMIZERS))
        _require(self.schedule in _SCHEDULES, "optimizer.schedule", self.schedule, " or ".join(_SCHEDULES))
        dtypes = ("float32",) if self.name == "adafactor" else ("float32", "bfloat16")
        expected = " or ".join(dtypes) + (" (adafactor keeps no mean of the gradient)" if self.name == "adafactor" else "")
        _require(self.moments_dtype in dtypes, "optimizer.moments_dtype", self.moments_dtype, expected)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices.

    Attributes:
      data: copies of the model, each with its own rows of the batch.
      fsdp: ways in which parameters and rows are split together.
      tensor: ways in which each matrix product is split.

    At most one of them is -1: the rest of the devices.

    Raises:
      InputError: naming the key, for anything else.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            _require(whole and (size == -1 or size >= 1), f"mesh.{name}", size, "a number of devices, or -1 for the rest")
        open_axes: Sequence[str] = [name for name, size in sizes.items() if size == -1]
        _require(len(open_axes) <= 1, f"mesh.{open_axes[-1] if open_axes else ''}", -1, "-1 on one axis of the mesh only")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) over a frozen model, `run.init`, in place of training it whole.

    Attributes:
      rank: `r`, columns of an adapter's first factor; 0 for no adapters.
      alpha: the adapters' product is scaled by alpha / rank.
      dropout: share of an adapter's input that is left out in training.
      targets: matrices of a layer that have adapters, of `wq wk wv wo gate up down`.
      base: how the frozen weights are held: `float32`, `bfloat16`, `int8`, `int4`, or `auto` for the dtype of the compute.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LAYER_MATRICES
    base: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"

    def __post_init__(self) -> None:
        _check_fields("adapter", self)
        _require(self.base in _BASES, "adapter.base", self.base, " or ".join(_BASES))
        known = isinstance(self.targets, tuple) and set(self.targets) <= set(LAYER_MATRICES)
        once = known and len(set(self.targets)) == len(self.targets) > 0
        _require(once, "adapter.targets", self.targets, f"a list of {', '.join(LAYER_MATRICES)}, each once")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Training on pairs of a chosen and a rejected answer (DPO) in place of the next token.

    Attributes:
      beta: how much it costs to leave the model that the run began with; 0 for training on the next token.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        _check_fields("preference", self)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is done about steps that go wrong; one whose loss or gradient is not finite is always skipped.

    Attributes:
      spike_skip: skip steps whose loss or gradient norm stands out above those of the last 128 good ones, too.
      spike_sigma: by how many standard deviations it has to stand out.
      patience: so many skipped steps in a row, or as many as that and at least 10 of the last 200, send the run back to the
        newest checkpoint before them, to go on without the data they had read.
      rewinds: times that a run may go back to the same checkpoint; then it stops with a report.
      check_replicas: steps between two comparisons of the copies of parameters on different devices; 0 for none.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    spike_skip: bool = False
    spike_sigma: float = 6.0
    patience: int = 10
    rewinds: int = 3
    check_replicas: int = 0

    def __post_init__(self) -> None:
        _check_fields("guard", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, resolved: what `config.yaml` in the directory of a run holds.

    Attributes:
      run: how long, where to, how often.
      model: the architecture; in a YAML file or on the command line also the name of a preset such as `llama3.2-1b`.
      compute: how the model is computed.
      data: text and batches.
      optimizer: what an update is, and its learning rate.
      mesh: how devices share the work.
      adapter: low-rank adapters instead of whole training.
      preference: pairs of answers instead of the next token.
      distributed: the processes, one a host.
      guard: what is done about steps that go wrong.

    Raises:
      InputError: naming the key, where two sections contradict each other.
    """

    run: RunConfig = RunConfig()
    model: LlamaConfig
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    adapter: AdapterConfig = AdapterConfig()
    preference: PreferenceConfig = PreferenceConfig()
    distributed: DistributedConfig = DistributedConfig()  # noqa: RUF009 (frozen)
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        context, vocabulary = self.model.context_length, self.model.vocab_size
        _require(self.data.length <= context, "data.length", self.data.length,
                 f"at most model.context_length ({context})")  # fmt: skip
        trained = self.data.tokenizer is None and self.run.init is None and not self.data.sources
        fits = not trained or self.data.vocab_size <= vocabulary
        _require(fits, "data.vocab_size", self.data.vocab_size, f"at most model.vocab_size ({vocabulary})")
        self._check_tuning()

    def _check_tuning(self) -> None:
        rank, beta, data = self.adapter.rank, self.preference.beta, self.data
        z_loss = self.optimizer.z_loss
        _require(z_loss == 0 or rank == 0, "optimizer.z_loss", z_loss, "0 with adapter.rank: it steers a head that is frozen")
        smallest = min(_sides(self.model, self.adapter.targets))
        _require(rank <= smallest, "adapter.rank", rank, f"at most the smaller side of the targets' matrices ({smallest})")
        _require(rank == 0 or self.run.init is not None, "run.init", None, "a model for the adapters (adapter.rank) to change")
        _require(beta == 0 or rank > 0, "adapter.rank", rank, "1 or more with preference.beta: it compares with the bare model")
        rows = data.batch_rows // data.accumulation
        _require(beta == 0 or rows % 2 == 0, "data.batch_rows", data.batch_rows,
                 f"an even number of rows a micro-batch, {rows} are left: preference.beta takes pairs")  # fmt: skip


def _sides(model: LlamaConfig, targets: Sequence[str]) -> list[int]:
    """Inputs and outputs of the matrices of these names."""
    layer = parameter_shapes(model)["layers"]
    matrices = {**layer["attention"], **layer["feed_forward"]}
    return [side for name in targets for side in matrices[name][1:]]
