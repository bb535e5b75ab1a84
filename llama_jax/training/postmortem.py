"""What is known when a run is given up: `RUN/postmortem`, a report and a table of all arrays."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.axes import Array, Float, Parameters, PyTree
from llama_jax.data.atomic import atomic_write
from llama_jax.data.batches import Batch
from llama_jax.training.guard import RING, Guard
from llama_jax.training.step import Recipe, TrainState, summed_gradients
from llama_jax.weights.checksum import by_path

RUN_POSTMORTEM = "postmortem"  # in the directory of a run


class ArrayFigures(NamedTuple):
    """A parameter and its gradient at one batch.

    Attributes:
      path: of the parameter, with the number of its layer: `layers/3/attention/wq`.
      norm: of it.
      not_finite: numbers in it that are not finite.
      gradient_norm: of the gradient.
      gradient_not_finite: numbers in the gradient that are not finite.
    """

    path: str
    norm: float
    not_finite: int
    gradient_norm: float
    gradient_not_finite: int


def array_figures(recipe: Recipe, state: TrainState, batch: Batch, frozen: Sequence[Parameters]) -> list[ArrayFigures]:
    """Every parameter and its gradient at a batch, layer by layer; compiles a program for it.

    Args:
      recipe: what an update is.
      state: of the run; not consumed.
      batch: micro-batches `[A, B, T]`.
      frozen: what the step is given beside them.
    """

    def measured(state: TrainState, batch: Batch, *frozen: Parameters) -> tuple[PyTree, PyTree]:
        """Norms and counts of parameters and gradients, by path."""
        gradient = summed_gradients(recipe, state, batch, *frozen)[1]
        targets = jnp.maximum(recipe.objective.targets(batch), 1)
        trees = state.params, jax.tree.map(lambda g: g / targets, gradient)
        params, gradients = ({path: _measure(path, leaf) for path, leaf in by_path(tree).items()} for tree in trees)
        return params, gradients

    params, gradients = jax.device_get(jax.jit(measured)(state, batch, *frozen))
    rows = []
    for path, of_parameter in params.items():
        for layer, figures in enumerate(np.concatenate([of_parameter, gradients[path]], axis=1)):
            name = path.replace("layers/", f"layers/{layer}/", 1) if _is_stacked(path) else path
            norm, bad, gradient_norm, gradient_bad = map(float, figures)
            rows.append(ArrayFigures(name, norm, int(bad), gradient_norm, int(gradient_bad)))
    return rows


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _measure(path: str, leaf: Array) -> Float[Array, "layers 2"]:
    """Norm, and count of what is not finite, of an array, or of each layer of a stacked one."""
    values = leaf.astype(jnp.float32) if _is_stacked(path) else leaf.astype(jnp.float32)[None]
    each = tuple(range(1, values.ndim))
    bad = jnp.sum(~jnp.isfinite(values), axis=each, dtype=jnp.float32)
    return jnp.stack([jnp.sqrt(jnp.sum(values**2, axis=each)), bad], axis=1)


def usual(guard: Guard) -> dict[str, dict[str, float | int]]:
    """Mean and standard deviation of the latest good losses and gradient norms; the guard is on the host."""
    filled = min(int(guard.good), RING)
    rings = {"loss": guard.losses[:filled], "gradient_norm": guard.norms[:filled]} if filled else {}
    return {name: {"mean": float(np.mean(ring)), "deviation": float(np.std(ring)), "steps": filled}
            for name, ring in rings.items()}  # fmt: skip


def write_postmortem(directory: Path, report: Mapping[str, object], arrays: Sequence[ArrayFigures] = ()) -> Path:
    """Writes `report.json` and `arrays.tsv`; of several processes the first does.

    Args:
      directory: of the run.
      report: JSON values; numbers that are not finite are written as texts.
      arrays: of `array_figures`.

    Returns:
      The directory of the two.
    """
    folder = directory / RUN_POSTMORTEM
    if jax.process_index():
        return folder
    folder.mkdir(exist_ok=True)
    broken = next((row.path for row in arrays if row.not_finite or row.gradient_not_finite), None)
    with atomic_write(folder / "report.json") as file:
        file.write((json.dumps(_plain({**report, "first_array_not_finite": broken}), indent=1) + "\n").encode())
    with atomic_write(folder / "arrays.tsv") as file:
        for row in (ArrayFigures._fields, *arrays):
            file.write(("\t".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row) + "\n").encode())
    return folder


def _plain(value: object) -> object:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
