"""The sections of a run's config that say how it learns: optimizer, adapters, preferences, the guard against bad steps."""

import dataclasses
from typing import Literal

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.training.config_checks import check_fields, require

_BASES = ("auto", "float32", "bfloat16", "int8", "int4")
_FLOATS = ("float32", "bfloat16")
_OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
_SCHEDULES = ("cosine", "wsd", "linear", "constant")


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
      decay_from: updates after which the decay begins, from `learning_rate`, so that a finished run that is trained on decays
        anew; 0 for the end of the warm-up, or what `decay_fraction` says.
      decay_fraction: share of the schedule that the decay of `wsd` takes.
      final_fraction: learning rate of the last update, as a fraction of the peak.
      beta1: decay of the mean of the gradient; with `lion`, weight of the mean in an update.
      beta2: decay of the mean of its square; with `lion`, decay of the mean; `adafactor` has no use for either.
      eps: added to the root of the mean square, by AdamW.
      moments_dtype: of the mean of the gradient. bfloat16 halves it and rounds it to 8 bits: of the state of `adamw` a quarter
        is saved (the mean of the square stays float32: in bfloat16 its small changes would be lost), of that of `lion` half, of
        that of `muon` half for the matrices of the layers; `adafactor` has no such mean.
      param_dtype: of what is trained, as it is stored; updates are computed in float32 and rounded to it. bfloat16 halves
        parameters and gradients, for models that would not fit otherwise, but a change smaller than about 1/512 of a number is
        lost: rounding is to the nearest, not stochastic.
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
        require(self.schedule in _SCHEDULES, "optimizer.schedule", self.schedule, " or ".join(_SCHEDULES))
        require(self.param_dtype in _FLOATS, "optimizer.param_dtype", self.param_dtype, " or ".join(_FLOATS))
        dtypes = ("float32",) if self.name == "adafactor" else _FLOATS
        expected = " or ".join(dtypes) + (" (adafactor keeps no mean of the gradient)" if self.name == "adafactor" else "")
        require(self.moments_dtype in dtypes, "optimizer.moments_dtype", self.moments_dtype, expected)


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
        check_fields("adapter", self)
        require(self.base in _BASES, "adapter.base", self.base, " or ".join(_BASES))
        known = isinstance(self.targets, tuple) and set(self.targets) <= set(LAYER_MATRICES)
        once = known and len(set(self.targets)) == len(self.targets) > 0
        require(once, "adapter.targets", self.targets, f"a list of {', '.join(LAYER_MATRICES)}, each once")


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
        check_fields("preference", self)


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
        check_fields("guard", self)
