"""The letters of array shapes, the same everywhere: signatures, einsum strings and prose.

| letter | meaning |
|---|---|
| `B` | batch: sequences |
| `T` | new tokens of a sequence (queries) |
| `S` | key/value slots of a sequence (keys); `S = T` without a cache |
| `D` | width of the residual stream |
| `N` | query heads |
| `K` | key/value heads |
| `G` | query heads that share one key/value head, `N / K` |
| `H` | width of a head |
| `F` | width of the feed-forward layer |
| `V` | vocabulary |
| `L` | layers |

A signature such as `Float[Array, "B T D"]` is documentation for a reader and, in the tests, a check
at run time (jaxtyping with beartype, switched on by the test runner, so it costs users nothing).
"""

from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree, Shaped, UInt32

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Num",
    "Parameters",
    "PyTree",
    "Shaped",
    "UInt32",
]

# A nested dict of arrays: {"embedding": ..., "layers": {...}, "final_norm": {...}}; see
# `accounting.parameter_shapes`.
Parameters = dict
