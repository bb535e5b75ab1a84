"""What a plan is about: a training on given chips, every choice that memory or time depends on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.remat import layer_parts
from llama_jax.parallel.chips import Topology
from llama_jax.training.config import ComputeConfig

ITEMSIZES: Mapping[str, float] = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")


class MeshSizes(NamedTuple):
    """Chips along each axis of the mesh.

    Attributes:
      data: copies of the model, each with its own sequences.
      fsdp: ways in which parameters and sequences are split together.
      tensor: ways in which each product is split.
      context: ways in which the tokens of a sequence are split; keys and values are gathered over
        it. Parameters are split over it as over `fsdp`.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def sequences(self) -> int:
        """Ways in which the sequences of a batch are split."""
        return self.data * self.fsdp

    @property
    def stored(self) -> int:
        """Ways in which parameters and the state of the optimizer are split, beside `tensor`;
        gathered for use.
        """
        return self.fsdp * self.context

    def __str__(self) -> str:
        return (
            ",".join(f"{axis}={size}" for axis, size in self._asdict().items() if size > 1)
            or "fsdp=1"
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """A training, as far as memory and time depend on it.

    Attributes:
      config: the architecture.
      topology: the chips.
      mesh: how they share the work.
      length: `T`, tokens of a sequence.
      sequences: of one optimizer update, all micro-batches together.
      microbatches: into which an update is cut.
      remat: `compute.remat`.
      optimizer: `optimizer.name`.
      moment_dtype: of the mean of the gradient.
      param_dtype: of the parameters that are trained.
      compute_dtype: of activations and of weights in use.
      loss_chunk: `compute.loss_chunk`, tokens of one chip whose logits exist at one time.
      rank: of adapters (LoRA) instead of whole training; 0 for none.
      base_dtype: of the frozen weights under adapters.

    Raises:
      InputError: naming the values that do not fit together.
    """

    config: LlamaConfig
    topology: Topology
    mesh: MeshSizes
    length: int
    sequences: int
    microbatches: int = 1
    remat: str = "full"
    optimizer: str = "adamw"
    moment_dtype: str = "float32"
    param_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    loss_chunk: int = ComputeConfig.loss_chunk
    rank: int = 0
    base_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        mesh, chips = self.mesh, self.topology.chips
        if math.prod(mesh) != chips:
            raise InputError(
                f"mesh {mesh} makes {math.prod(mesh)} chips, {self.topology.name} has "
                f"{chips}; set one axis to -1"
            )
        require_divisible(self.config, mesh, self.length)
        layer_parts(self.remat, self.config.layers)
        if self.sequences % (mesh.sequences * self.microbatches):
            raise InputError(
                f"{self.sequences} sequences a step given; a multiple of data * fsdp * "
                "microbatches "
                f"({mesh.sequences * self.microbatches}) expected"
            )
        if self.length > self.config.context_length:
            raise InputError(
                f"length {self.length} given; at most the model's context "
                f"({self.config.context_length}) expected"
            )

    @property
    def tokens(self) -> int:
        """Of one optimizer update."""
        return self.sequences * self.length

    @property
    def chip_batch_size(self) -> int:
        """Rows that a chip has at one time, whole or as its part of each."""
        return self.sequences // self.microbatches // self.mesh.sequences

    @property
    def chip_tokens(self) -> float:
        """Tokens that a chip has at one time."""
        return self.chip_batch_size * self.length / self.mesh.context

    @property
    def chunk_tokens(self) -> float:
        """Tokens of a chunk of the loss on a chip: at most all that it has at one time."""
        return min(self.loss_chunk, self.chip_tokens)


def require_divisible(config: LlamaConfig, mesh: MeshSizes, length: int) -> None:
    """Refuses a mesh that does not divide the model, as
    `llama_jax.parallel.sharding.check_divisible` does at run time.

    Raises:
      InputError: naming the axis and the size that it does not divide.
    """
    shared = {
        "kv_heads": config.kv_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
    }
    sizes = {"fsdp*context": (mesh.stored, {"dim": config.dim}), "tensor": (mesh.tensor, shared)}
    for axis, (ways, parts) in sizes.items():
        for name, size in parts.items():
            if size % ways:
                raise InputError(
                    f"mesh axis {axis} of size {ways} does not divide {name} ({size}); "
                    "choose a divisor"
                )
    if mesh.context > 1 and length % (2 * mesh.context):
        raise InputError(
            f"length {length} given; a multiple of 2 * context ({2 * mesh.context}) expected"
        )


def parse_mesh(text: str | None, topology: Topology) -> MeshSizes:
    """Sizes of the mesh, `fsdp=64,tensor=2`; one may be -1, the rest. By default `data` is the
    slices, `fsdp` all else.

    Raises:
      InputError: for an unknown axis, a size that is none, and sizes that do not make up the chips.
    """
    given: dict[str, int] = {}
    for part in text.replace("*", ",").split(",") if text else ():
        axis, _, size = part.strip().partition("=")
        if (
            axis not in MeshSizes._fields
            or not size.lstrip("-").isdecimal()
            or (int(size) < 1 and size != "-1")
        ):
            raise InputError(
                f"mesh {text!r:.60}: {part!r:.30} given; AXIS=SIZE of "
                f"{', '.join(MeshSizes._fields)} expected"
            )
        given[axis] = int(size)
    open_axes = [axis for axis, size in given.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"mesh {text!r:.60}: -1 on one axis only expected")
    if (
        not open_axes
        and "data" not in given
        and topology.slices > 1
        and math.prod(given.values()) != topology.chips
    ):
        given["data"] = topology.slices
    free = (
        open_axes[0]
        if open_axes
        else "fsdp"
        if "fsdp" not in given
        else "data"
        if "data" not in given
        else ""
    )
    known = math.prod(size for axis, size in given.items() if axis != free)
    if topology.chips % known or (not free and known != topology.chips):
        raise InputError(
            f"mesh {text!r:.60} does not make up the {topology.chips} chips of "
            f"{topology.name}; set one axis to -1"
        )
    return MeshSizes(**({**given, free: topology.chips // known} if free else given))
