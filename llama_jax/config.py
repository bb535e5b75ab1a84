"""The architecture of a LLaMA as data: the meaning of the weights, and nothing about how they are
run.

No field that is a number of the model has a default: a forgotten one is an error, never a silent
1e-6.
"""

import dataclasses
from collections.abc import Mapping

from llama_jax.errors import InputError

# Bounds for values read from untrusted files: far above any LLaMA, far below what would exhaust
# memory by accident.
_LARGEST = {
    "vocab_size": 1 << 22,
    "dim": 1 << 17,
    "layers": 1000,
    "heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "ffn_dim": 1 << 20,
    "context_length": 1 << 27,
}

_HUGE = (
    1e18  # above every real value; also refuses infinity, and compares with integers of any size
)


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{field}: {value!r:.100} given, {expected} expected")


def _require_count(field: str, value: object, largest: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and 1 <= value <= largest, field, value, f"a whole number from 1 to {largest}")  # type: ignore[operator]


def _require_positive(field: str, value: object) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(real and 0 < value < _HUGE, field, value, "a positive number")  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach beyond the context of pretraining.

    Attributes:
      rope_type: `linear` (positions divided by `factor`) or `llama3` (only long wavelengths are
        divided).
      factor: how many times longer the context becomes: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2.
      low_freq_factor: `llama3` only; wavelengths above `original_context / low_freq_factor` are
        divided by `factor`.
      high_freq_factor: `llama3` only; wavelengths below `original_context / high_freq_factor` are
        kept.
      original_context: `llama3` only; context length of pretraining, in tokens.

    Raises:
      InputError: naming the field, for any other `rope_type` and for numbers that are missing or
        out of range.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.rope_type in ("linear", "llama3"),
            "rope_scaling.rope_type",
            self.rope_type,
            "default, linear or llama3",
        )
        _require_positive("rope_scaling.factor", self.factor)
        if self.rope_type == "llama3":
            self._check_llama3()
            return
        for name in ("low_freq_factor", "high_freq_factor", "original_context"):
            value = getattr(self, name)
            _require(
                value is None,
                f"rope_scaling.{name}",
                value,
                f"nothing with rope_type {self.rope_type}",
            )

    def _check_llama3(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        _require_positive("rope_scaling.low_freq_factor", low)
        _require_positive("rope_scaling.high_freq_factor", high)
        _require_count(
            "rope_scaling.original_context", self.original_context, _LARGEST["context_length"]
        )
        below = f"a number below high_freq_factor ({high})"
        _require(low < high, "rope_scaling.low_freq_factor", low, below)  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The numbers that define a LLaMA (letters as in `llama_jax.axes`).

    Attributes:
      vocab_size: `V`, rows of the embedding table.
      dim: `D`, width of the residual stream.
      layers: `L`, number of layers.
      heads: `N`, query heads.
      kv_heads: `K`, key/value heads; divides `heads`.
      head_dim: `H`, width of a head; even. Not always `dim / heads`.
      ffn_dim: `F`, width of the feed-forward layer.
      norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: `None` for the plain rotary embedding.
      context_length: tokens the model was made for.
      tied_head: whether the output head is the embedding table transposed.

    Raises:
      InputError: naming the field that is wrong, the value given and the one expected.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context_length: int
    tied_head: bool

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            _require_count(name, getattr(self, name), largest)
        _require_positive("norm_eps", self.norm_eps)
        _require_positive("rope_theta", self.rope_theta)
        _require(
            self.heads % self.kv_heads == 0,
            "kv_heads",
            self.kv_heads,
            f"a divisor of heads ({self.heads})",
        )
        _require(
            self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "an even number (rotary embedding turns pairs)",
        )
        _require(isinstance(self.tied_head, bool), "tied_head", self.tied_head, "true or false")
        scaling = self.rope_scaling
        _require(
            scaling is None or isinstance(scaling, RopeScaling),
            "rope_scaling",
            scaling,
            "nothing or a RopeScaling",
        )

    @property
    def group(self) -> int:
        """`G`, the query heads that share one key/value head."""
        return self.heads // self.kv_heads


def config_from_dict(values: Mapping) -> LlamaConfig:
    """The inverse of `dataclasses.asdict` for a `LlamaConfig`, for values that come from a file.

    Raises:
      InputError: naming fields that are missing or unknown, and values that are out of range or of
        another kind.
    """
    _require_fields("model", LlamaConfig, values)
    scaling = values["rope_scaling"]
    if scaling is not None:
        _require(isinstance(scaling, Mapping), "rope_scaling", scaling, "nothing or its fields")
        _require_fields("rope_scaling", RopeScaling, scaling)
        scaling = RopeScaling(**scaling)
    return LlamaConfig(**{**values, "rope_scaling": scaling})


def _require_fields(name: str, kind: type, values: Mapping) -> None:
    """Refuses other fields than those of a class."""
    expected = {field.name for field in dataclasses.fields(kind)}
    wrong = sorted(expected ^ set(values))
    if wrong:
        raise InputError(
            f"{name}: field {wrong[0]:.60} is {'missing' if wrong[0] in expected else 'unknown'}"
        )
