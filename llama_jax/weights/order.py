"""The order in which all tensors of a source are read and written elsewhere."""

from llama_jax.weights.parameter_source import WatchedSource
from llama_jax.weights.run import RunSource
from llama_jax.weights.source import Source, flat_shapes

Place = tuple[str, int | None]  # canonical path and layer, the arguments of `Source.read`


def layered_places(source: Source) -> list[Place]:
    """The tensors of all layers: layer by layer, the order of use; those of a run path by path.

    A checkpoint of ours holds all layers of a parameter in one array: so that each is read once, and one at a time.
    """
    inner = source.source if isinstance(source, WatchedSource) else source
    paths = [path for path in flat_shapes(source.config) if path.startswith("layers/")]
    layers = range(source.config.layers)
    if isinstance(inner, RunSource):
        return [(path, layer) for path in paths for layer in layers]
    return [(path, layer) for layer in layers for path in paths]


def places(source: Source) -> list[Place]:
    """All tensors: the embedding, those of the layers, and the rest."""
    rest: list[Place] = [(path, None) for path in flat_shapes(source.config) if not path.startswith(("embedding", "layers/"))]
    return [("embedding", None), *layered_places(source), *rest]
