"""`child.py` as one of several hosts: its own working directory and version, and a record of the
sequences that it was given.

`HOST_DIRECTORY` is where it works, `HOST_VERSION` what it takes itself for, `HOST_ROWS` the file of
  the sequences: a line `STEP ROW
HASH` for each sequence of each batch that lives on this process.
"""

import hashlib
import os
import pathlib
import sys
from typing import Any

import child


def record_sequences(path: pathlib.Path) -> None:
    """Wraps the making of batches."""
    import numpy as np

    from llama_jax.training import loop

    global_batch = loop.global_batch

    def recorded(batches: Any, step: int, *more: Any) -> Any:
        batch = global_batch(batches, step, *more)
        per_micro = batch.tokens.shape[1]
        with path.open("a") as file:
            for parts in zip(*[field.addressable_shards for field in batch]):
                micro, sequences = (
                    range(*part.indices(size))
                    for part, size in zip(parts[0].index[:2], batch.tokens.shape[:2])
                )
                for i, m in enumerate(micro):
                    for j, sequence in enumerate(sequences):
                        content = b"".join(np.asarray(part.data)[i, j].tobytes() for part in parts)
                        file.write(
                            f"{step + 1} {m * per_micro + sequence} "
                            f"{hashlib.sha256(content).hexdigest()[:16]}\n"
                        )
        return batch

    loop.global_batch = recorded


def main() -> int:
    os.chdir(os.environ.get("HOST_DIRECTORY", "."))
    if "HOST_VERSION" in os.environ:
        import llama_jax

        llama_jax.__version__ = os.environ["HOST_VERSION"]
    if "HOST_ROWS" in os.environ:
        record_sequences(pathlib.Path(os.environ["HOST_ROWS"]))
    return child.main()


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    sys.exit(main())
