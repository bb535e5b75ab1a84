"""What is checked of every key of a run's config: its kind and its range."""

import dataclasses
import math

from llama_jax.errors import InputError

# Inclusive ranges, by section and key. Upper ends of counts are far above any use and keep typing errors out of loops.
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


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Refuses a value: what was given, what is expected."""
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
