"""One training run as data: every key that `train.py` understands, with its meaning, default and
range.

The sections are frozen dataclasses; the YAML key `optimizer.learning_rate` is here
`OptimizerConfig.learning_rate`. Numbers of the model have no defaults (see `llama_jax.config`).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from llama_jax.accounting import parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.remat import CONTEXT_ATTENTION, EXPECTED, parse_remat
from llama_jax.training.config_sections import (
    AdapterConfig,
    DataConfig,
    DistributedConfig,
    GuardConfig,
    OptimizerConfig,
    PreferenceConfig,
    check_fields,
    require,
    wall_seconds,
)

_DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long the run is, where it writes, and how often.

    Attributes:
      dir: directory of the run: metrics, checkpoints, tokenizer and the resolved config.
      steps: optimizer updates in all, those before a resume included.
      seed: of the initial parameters.
      init: a model to begin with, anything that `infer --model` takes: its parameters, its
        architecture and, unless `data.tokenizer` names another, its tokenizer; null for random
        parameters.
      overwrite: start anew even where `dir` holds a run; otherwise that run is resumed.
      log_every: steps between two lines of metrics.
      eval_every: steps between two evaluations on held-out text; 0 for none.
      eval_tokens: held-out tokens that an evaluation reads, the same ones each time, chosen by
        `data.seed`, of each data set in proportion to its size; 0 for all.
      checkpoint_every: steps between two checkpoints; the last step always has one.
      keep_checkpoints: newest checkpoints to keep; two or more leave one to fall back on when the
        newest is damaged.
      max_time: wall time of this program, start-up included, as HH:MM:SS or in seconds: the run is
        saved and ended after the step in which it is over; null for no limit.
      hang_seconds: a run without an update for this time, or for ten times as long as an update
        takes, whichever is longer, is taken to hang: it writes down all stacks and exits with
        status 3; 0 never.
      trackers: where metrics go beside `metrics.jsonl`: some of tensorboard, wandb, trackio, each
        an extra to install.
      profile: `FIRST:LAST`, steps to trace (they take longer) into `dir/profile`, as in 10:15; also
        `--profile`.
      sample_prompts: texts that the model continues at each evaluation, as in `["def ", "The "]`;
        also kept in `samples.jsonl`.
      sample_tokens: limit of tokens for each.

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
    eval_tokens: int = 2_000_000
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    max_time: str | int | None = None
    hang_seconds: float = 300
    trackers: tuple[str, ...] = ()
    profile: str | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        check_fields("run", self)
        require(
            isinstance(self.trackers, tuple),
            "run.trackers",
            self.trackers,
            "a list such as [tensorboard]",
        )
        require(
            wall_seconds(self.max_time) > 0,
            "run.max_time",
            self.max_time,
            "HH:MM:SS, seconds or null",
        )
        named = self.init is None or (isinstance(self.init, str) and self.init != "")
        require(named, "run.init", self.init, "a path or null")
        traced = profiled_steps(self.profile)
        require(
            self.profile is None
            or (len(traced) > 0 and traced[0] >= 1 and traced[-1] <= self.steps),
            "run.profile",
            self.profile,
            f"FIRST:LAST from 1 to run.steps ({self.steps}), such as 10:15, or null",
        )
        prompts = isinstance(self.sample_prompts, tuple) and all(
            isinstance(text, str) and text for text in self.sample_prompts
        )
        require(
            prompts,
            "run.sample_prompts",
            self.sample_prompts,
            'a list of texts such as ["def ", "The "]',
        )


def profiled_steps(profile: object) -> range:
    """The steps that `run.profile` names; none where it names none."""
    found = (
        re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", profile) if isinstance(profile, str) else None
    )
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; nothing here changes the results beyond rounding.

    Attributes:
      dtype: of activations and of weights in matrix products; `auto` is float32 on a CPU and
        bfloat16 elsewhere.
      remat: the activations that the forward pass keeps for the backward pass, from `none` (nothing
        is recomputed) over `all`, `no_up`, `attention`, `outputs` and `context` to `full` (each
        layer is recomputed); or names joined by + of what to keep: `q k v context middle gate up`,
        `@host` behind those that the host is to keep; or `20*all+attention`: a policy for the first
        layers and a setting for the others; or `auto`: the first of these policies whose compiled
        step fits the devices, `none` on a CPU, kept in the run's config. `docs/performance.md` has
        a table.
      scan_layers: run the layers as one compiled loop (compile time does not grow with depth)
        instead of unrolled.
      attention: backend of the attention; `auto` takes the best that the device supports.
      context_attention: where mesh.context is above 1: each device gathers the keys and values of
        whole sequences (`all_gather`), or they go round the devices (`ring`), which for very long
        sequences takes less memory and hides the transfer.
      loss_chunk: tokens of one device whose logits exist at one time in the loss; fewer than about
        2,048 make matmuls too small to be fast.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    loss_chunk: int = 2048

    def __post_init__(self) -> None:
        require(self.dtype in _DTYPES, "compute.dtype", self.dtype, " or ".join(_DTYPES))
        form, forms = self.context_attention, CONTEXT_ATTENTION
        require(form in forms, "compute.context_attention", form, " or ".join(forms))
        check_fields("compute", self)
        if self.remat != "auto":
            try:
                parse_remat(self.remat)
            except InputError:
                require(False, "compute.remat", self.remat, f"auto, {EXPECTED}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices.

    Attributes:
      data: copies of the model, each with its own sequences of the batch.
      fsdp: ways in which parameters and sequences are split together.
      tensor: ways in which each matrix product is split.
      context: ways in which each sequence is split along its length, for long sequences; twice as
        many divide data.length.

    At most one of them is -1: the rest of the devices.

    Raises:
      InputError: naming the key, for anything else.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            require(
                whole and (size == -1 or size >= 1),
                f"mesh.{name}",
                size,
                "a number of devices, or -1 for the rest",
            )
        open_axes: Sequence[str] = [name for name, size in sizes.items() if size == -1]
        require(
            len(open_axes) <= 1,
            f"mesh.{open_axes[-1] if open_axes else ''}",
            -1,
            "-1 on one axis of the mesh only",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, resolved: what `config.yaml` in the directory of a run holds.

    Attributes:
      run: how long, where to, how often.
      model: the architecture; in a YAML file or on the command line also the name of a preset such
        as `llama3.2-1b`.
      compute: how the model is computed.
      data: text and batches.
      optimizer: what an update is, and its learning rate.
      mesh: how devices share the work.
      adapter: low-rank adapters instead of whole training.
      preference: pairs of answers instead of the next token.
      distributed: the processes, one a host.
      guard: handling of steps that go wrong.

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
    distributed: DistributedConfig = DistributedConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        context, vocabulary = self.model.context_length, self.model.vocab_size
        require(
            self.data.length <= context,
            "data.length",
            self.data.length,
            f"at most model.context_length ({context})",
        )
        trained = self.data.tokenizer is None and self.run.init is None and not self.data.sources
        fits = not trained or self.data.vocab_size <= vocabulary
        require(
            fits,
            "data.vocab_size",
            self.data.vocab_size,
            f"at most model.vocab_size ({vocabulary})",
        )
        length, begin = self.optimizer.schedule_steps or self.run.steps, self.optimizer.decay_from
        require(
            begin == 0 or begin < length,
            "optimizer.decay_from",
            begin,
            f"fewer updates than the schedule has ({length})",
        )
        layers, remat = self.model.layers, self.compute.remat
        split = 0 if remat == "auto" else parse_remat(remat)[0]
        require(
            split < layers,
            "compute.remat",
            remat,
            f"a split after fewer than model.layers ({layers})",
        )
        self._check_tuning()

    def _check_tuning(self) -> None:
        rank, beta, data = self.adapter.rank, self.preference.beta, self.data
        z_loss = self.optimizer.z_loss
        require(
            z_loss == 0 or rank == 0,
            "optimizer.z_loss",
            z_loss,
            "0 with adapter.rank: it steers a head that is frozen",
        )
        smallest = min(_sides(self.model, self.adapter.targets))
        require(
            rank <= smallest,
            "adapter.rank",
            rank,
            f"at most the smaller side of the targets' matrices ({smallest})",
        )
        require(
            rank == 0 or self.run.init is not None,
            "run.init",
            None,
            "a model for the adapters (adapter.rank) to change",
        )
        require(
            beta == 0 or rank > 0,
            "adapter.rank",
            rank,
            "1 or more with preference.beta: it compares with the bare model",
        )
        require(
            beta == 0 or not self.adapter.new_tokens,
            "adapter.new_tokens",
            self.adapter.new_tokens,
            "0 with preference.beta: it compares with the bare model",
        )
        require(
            self.adapter.new_tokens < self.model.vocab_size,
            "adapter.new_tokens",
            self.adapter.new_tokens,
            f"fewer than the vocabulary ({self.model.vocab_size})",
        )
        sequences = data.batch_size // data.accumulation
        require(
            beta == 0 or sequences % 2 == 0,
            "data.batch_size",
            data.batch_size,
            f"an even number of sequences a micro-batch, {sequences} are left: "
            "preference.beta takes pairs",
        )


def _sides(model: LlamaConfig, targets: Sequence[str]) -> list[int]:
    """Inputs and outputs of the matrices of these names."""
    layer = parameter_shapes(model)["layers"]
    matrices = {**layer["attention"], **layer["feed_forward"]}
    return [side for name in targets for side in matrices[name][1:]]


def with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    """The config with another rematerialization policy."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
