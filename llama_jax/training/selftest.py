"""Invariance, on the devices at hand: however an update is computed, the same losses and gradients
come out.

A tiny model makes two updates by the training step itself, once on one device in the plainest way
and then in every other way, one thing changed at a time. Random text in documents of unequal
length, cut as training cuts it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.data.packing import Batch
from llama_jax.model.attention import BACKENDS, KERNELS, choose_backend
from llama_jax.parallel.mesh import MESH_AXES, make_mesh
from llama_jax.training.config import ComputeConfig, RunConfig, TrainConfig
from llama_jax.training.config_sections import DataConfig, OptimizerConfig
from llama_jax.training.setup import make_recipe
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    batch_sharding,
    micro_batches,
    sharded_init,
    sharded_step,
    state_shapes,
)
from llama_jax.weights.assemble import unstack
from llama_jax.weights.checkpoint import Checkpoints

# Largest relative difference of a loss or gradient norm: rounding in another order, with room to
# spare.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}
GROUPS = ("mesh", "accumulation", "layers", "remat", "attention", "documents", "resume")
_LENGTH = 288  # more than one block of the blockwise attention
_PLAIN_ATTENTION = "reference"
_UPDATES = 2
_REMAT = ("full", "q+k+v+context", "middle")


class Case(NamedTuple):
    """What one way of computing gave.

    Attributes:
      group: of `GROUPS`.
      name: the difference from the plainest way.
      difference: largest relative difference of a loss or gradient norm; for `resume`, numbers of
        the state that differ.
      bound: largest that is accepted.
      note: what went wrong, if it could not be computed at all.
    """

    group: str
    name: str
    difference: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound."""
        return self.difference <= self.bound


class _Figures(NamedTuple):
    """Losses and gradient norms of the updates, and the last state."""

    values: np.ndarray
    state: TrainState


class SelfTest:
    """The cases for some devices.

    Args:
      devices: of this process.
      dtype: to compute in.
      directory: for the checkpoint of the resume.
    """

    def __init__(
        self, devices: Sequence[jax.Device], dtype: Literal["float32", "bfloat16"], directory: Path
    ) -> None:
        self._devices, self._directory = list(devices), directory
        self._bound = BOUNDS[dtype]
        self.config = tiny_config(len(devices), dtype)
        self._one = make_mesh(1, 1, 1, self._devices[:1])
        self._batches = [random_batch(self.config, seed) for seed in range(2 * _UPDATES)]

    def cases(self, groups: Sequence[str] = GROUPS) -> Iterator[Case]:
        """The cases of some groups, each as it is done."""
        for group, name, bound, difference in self._plans():
            if group in groups:
                yield _case(group, name, bound, difference)

    def _plans(self) -> Iterator[tuple[str, str, float, Callable[[], float]]]:
        """Group, name, bound and how the difference is found, for each case."""
        for sizes in meshes(len(self._devices), self.config.model):
            mesh = make_mesh(devices=self._devices, **dict(zip(MESH_AXES, sizes)))
            name = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            yield (
                "mesh",
                name,
                self._bound,
                functools.partial(self._against_plain, self.config, mesh),
            )
            if mesh.shape["context"] > 1:
                ring = self._computed(context_attention="ring")
                yield (
                    "mesh",
                    f"{name}, ring",
                    self._bound,
                    functools.partial(self._against_plain, ring, mesh),
                )
        for accumulation in (2, 4):
            data = dataclasses.replace(self.config.data, accumulation=accumulation)
            config = dataclasses.replace(self.config, data=data)
            compared = functools.partial(self._against_plain, config, self._one)
            yield "accumulation", f"{accumulation} micro-batches", self._bound, compared
        computed: list[tuple[str, str, dict[str, Any]]] = [
            ("layers", "unrolled", {"scan_layers": False})
        ]
        computed += [("remat", remat, {"remat": remat}) for remat in _REMAT]
        computed += [
            ("attention", backend, {"attention": backend})
            for backend in BACKENDS
            if backend != _PLAIN_ATTENTION
        ]
        for group, name, change in computed:
            yield (
                group,
                name,
                self._bound,
                functools.partial(self._against_plain, self._computed(**change), self._one),
            )
        kernel = self._kernel()
        if kernel:
            yield (
                "attention",
                f"{kernel}, bfloat16",
                BOUNDS["bfloat16"],
                functools.partial(self._kernel_against_plain, kernel),
            )
        for backend in BACKENDS:
            yield (
                "documents",
                f"packed or alone, {backend}",
                self._bound,
                functools.partial(self._documents, backend),
            )
        yield "resume", f"{_UPDATES} + {_UPDATES} updates, bit for bit", 0.0, self._resume

    def _kernel(self) -> str:
        """The attention that the devices at hand have a kernel for, in the type that it takes;
        nothing where there is none.
        """
        length, head_dim = self.config.data.length, self.config.model.head_dim
        chosen = choose_backend(
            "auto", length, length, self._devices[0].platform, head_dim, 1, "bfloat16"
        )
        return chosen if chosen in KERNELS else ""

    def _kernel_against_plain(self, kernel: str) -> float:
        """Both in bfloat16, packed sequences."""
        ways = (
            self._computed(dtype="bfloat16", attention=attention)
            for attention in (kernel, _PLAIN_ATTENTION)
        )
        ours, plain = (
            self._run(config, self._one, self._batches[:_UPDATES]).values for config in ways
        )
        return relative_difference(ours, plain)

    def _computed(self, **change: Any) -> TrainConfig:
        return dataclasses.replace(
            self.config, compute=dataclasses.replace(self.config.compute, **change)
        )

    @functools.cached_property
    def _plain(self) -> np.ndarray:
        """What comes out in the plainest way."""
        return self._run(self.config, self._one, self._batches[:_UPDATES]).values

    def _against_plain(self, config: TrainConfig, mesh: Mesh) -> float:
        return relative_difference(
            self._run(config, mesh, self._batches[:_UPDATES]).values, self._plain
        )

    def _run(
        self,
        config: TrainConfig,
        mesh: Mesh,
        batches: Sequence[Batch],
        state: TrainState | None = None,
    ) -> _Figures:
        """Updates by the training step, from the same parameters whatever their form and place."""
        recipe, start = make_recipe(config), self._start(config.compute.scan_layers)
        with jax.default_matmul_precision("float32"), jax.set_mesh(mesh):
            if state is None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(recipe, mesh))
                state = jax.device_put(start, shardings, may_alias=False)
            step, sharding = self._step(config, mesh), batch_sharding(recipe, mesh)
            values = []
            for batch in batches:
                state, figures = step(
                    state, jax.device_put(micro_batches(batch, config.data.accumulation), sharding)
                )
                values += [figures.loss, figures.grad_norm]
            return _Figures(np.array(jax.device_get(values), np.float64), state)

    @functools.cache  # noqa: B019 - one object a program
    def _step(
        self, config: TrainConfig, mesh: Mesh
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        return sharded_step(make_recipe(config), mesh)

    @functools.cache  # noqa: B019 - one object a program
    def _start(self, scan_layers: bool) -> TrainState:
        """The state to begin with, on the host: one set of parameters in either form."""
        recipe = make_recipe(self._computed(scan_layers=scan_layers))
        with jax.set_mesh(self._one):
            state = jax.device_get(sharded_init(recipe, self._one)(jax.random.key(0)))
        return (
            state
            if scan_layers
            else state._replace(params=jax.device_get(unstack(self._start(True).params)))
        )

    def _documents(self, backend: str) -> float:
        """Documents that share a sequence, and each in a sequence of its own: the same loss and
        gradient of all of them.
        """
        config, packed = self._computed(attention=backend), self._batches[0]
        together = self._run(config, self._one, [packed]).values
        return relative_difference(self._run(config, self._one, [alone(packed)]).values, together)

    def _resume(self) -> float:
        """Numbers of the state that differ after a save and restore half-way."""
        mesh = make_mesh(1, -1, 1, self._devices)
        whole = self._run(self.config, mesh, self._batches).state
        half = self._run(self.config, mesh, self._batches[:_UPDATES]).state
        with (
            jax.set_mesh(mesh),
            Checkpoints.open(self._directory / "checkpoints", keep=1) as checkpoints,
        ):
            checkpoints.save(_UPDATES, half, {})
            checkpoints.wait()
            restored = checkpoints.restore(_UPDATES, state_shapes(make_recipe(self.config), mesh))
        resumed = self._run(self.config, mesh, self._batches[_UPDATES:], restored).state
        pairs = zip(
            jax.tree.leaves(jax.device_get(whole)),
            jax.tree.leaves(jax.device_get(resumed)),
            strict=True,
        )
        return float(sum(np.sum(_bits(a) != _bits(b)) for a, b in pairs))


def tiny_config(devices: int, dtype: Literal["float32", "bfloat16"]) -> TrainConfig:
    """A run whose model and batch every mesh of this many devices divides, as far as tensor
    parallelism goes up to 8.
    """
    tensor = math.gcd(devices, 8) if devices > 8 else devices
    kv_heads = max(2, tensor)
    model = LlamaConfig(
        vocab_size=64 * kv_heads,
        dim=math.lcm(32, devices),
        layers=2,
        heads=2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=8,
        ffn_dim=16 * kv_heads,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        context_length=_LENGTH,
        tied_head=False,
    )
    return TrainConfig(
        run=RunConfig(steps=10),
        model=model,
        compute=ComputeConfig(dtype=dtype, attention=_PLAIN_ATTENTION, loss_chunk=1024),
        data=DataConfig(vocab_size=model.vocab_size, length=_LENGTH, batch_size=4 * devices),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )


def meshes(devices: int, model: LlamaConfig) -> list[tuple[int, ...]]:
    """Every way to share devices among the axes of a mesh, in their order, that the model and the
    length of a sequence allow.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    ways = itertools.product(divisors, repeat=len(MESH_AXES))
    return [sizes for sizes in ways if math.prod(sizes) == devices and _fits(model, *sizes)]


def _fits(model: LlamaConfig, data: int, fsdp: int, context: int, tensor: int) -> bool:
    sequences = context == 1 or _LENGTH % (2 * context) == 0
    return sequences and model.kv_heads % tensor == 0 and model.dim % (fsdp * context) == 0


def random_batch(config: TrainConfig, seed: int) -> Batch:
    """Rows of two documents, cut anywhere; the last token of a document has no target, as in
    training.
    """
    rng, sequences = np.random.default_rng(seed), config.data.batch_size
    ids = rng.integers(0, config.model.vocab_size, (sequences, _LENGTH + 1), dtype=np.int32)
    cuts = rng.integers(4, _LENGTH - 4, (sequences, 1))
    documents = (1 + (np.arange(_LENGTH + 1) >= cuts)).astype(np.int32)
    weights = (documents[:, 1:] == documents[:, :-1]).astype(np.float32)
    return Batch(
        tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights, documents=documents[:, :-1]
    )


def alone(packed: Batch) -> Batch:
    """The same documents, each at the beginning of a sequence of its own, the rest of which is
    padding.
    """
    sequences = []
    for sequence, number in itertools.product(range(len(packed.tokens)), (1, 2)):
        here = packed.documents[sequence] == number
        columns = [np.zeros_like(values[sequence]) for values in packed]
        for column, values in zip(columns, packed):
            column[: here.sum()] = values[sequence][here]
        columns[-1][: here.sum()] = 1
        sequences.append(columns)
    return Batch(*[np.stack(column) for column in zip(*sequences)])


def relative_difference(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest, over losses and gradient norms; not a number where one of them is none."""
    return float(np.max(np.abs(values - expected) / np.abs(expected)))


def _bits(leaf: object) -> np.ndarray:
    array = np.atleast_1d(np.asarray(leaf))
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _case(group: str, name: str, bound: float, difference: Callable[[], float]) -> Case:
    """A case; one that cannot be computed has failed, and the others continue."""
    try:
        return Case(group, name, difference(), bound)
    except Exception as error:  # the compiler's, the runtime's, our own refusals
        return Case(
            group,
            name,
            math.nan,
            bound,
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        )
