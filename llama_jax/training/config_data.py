"""The section `data` of a run's config."""

import dataclasses
from typing import Literal

from llama_jax.data.steps import Steps
from llama_jax.training.config_checks import check_fields, require


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A folder that `prepare` wrote, as a part of the training data.

    Attributes:
      path: the folder.
      weight: its share of the rows, beside the weights of the others.
      name: in metrics (`held_out/NAME/loss`); null for the folder's own.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    path: str
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        check_fields("data.sources", self)
        named = self.name is None or (isinstance(self.name, str) and self.name != "" and "/" not in self.name)
        require(named, "data.sources.name", self.name, "a name without / or null")


Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is trained on and how it is cut into batches.

    Attributes:
      paths: text files and folders of them; empty for the standard library of the running Python.
      sources: folders that `prepare` wrote, in place of `paths`: `[{path, weight, name}, ...]`, mixed row by row; their
        tokenizer is that of the run.
      vocab_size: of the tokenizer to train when `tokenizer` is not given; at most `model.vocab_size`.
      tokenizer: path of an existing tokenizer file; null to train one on the text.
      held_out_fraction: share of the documents kept out of training, for evaluation; of a single file, its end; 0 for none.
      length: `T`, tokens predicted in a row.
      batch_rows: rows of one optimizer update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in; divides `batch_rows`.
      packing: `cut`: documents one after another, cut into rows; `fit`: whole documents side by side, by best fit. (Pairs of
        answers always have a row each.)
      batch_ramp: later sizes of a batch, `[[step, rows], ...]`: from that step on so many rows, in more micro-batches of the
        same size; skipped steps count.
      skip_steps: data that is never used, `[[first, last], ...]`: what these steps would have read is left out, and the
        steps from `first` on read what follows.
      seed: of the order of the data.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    paths: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    vocab_size: int = 4096
    tokenizer: str | None = None
    held_out_fraction: float = 0.02
    length: int = 256
    batch_rows: int = 8
    accumulation: int = 1
    packing: Literal["cut", "fit"] = "cut"
    batch_ramp: Pairs = ()
    skip_steps: Pairs = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields("data", self)
        texts = isinstance(self.paths, tuple) and all(isinstance(path, str) and path for path in self.paths)
        require(texts, "data.paths", self.paths, "a list of paths such as [text, notes.md]")
        named = self.tokenizer is None or (isinstance(self.tokenizer, str) and self.tokenizer != "")
        require(named, "data.tokenizer", self.tokenizer, "a path or null")
        require(self.batch_rows % self.accumulation == 0, "data.accumulation", self.accumulation,
                 f"a divisor of data.batch_rows ({self.batch_rows})")  # fmt: skip
        require(not (self.sources and self.paths), "data.paths", self.paths, "no text beside data.sources")
        require(
            not (self.sources and self.tokenizer), "data.tokenizer", self.tokenizer, "none beside data.sources (they have one)"
        )
        require(self.packing in ("cut", "fit"), "data.packing", self.packing, "cut or fit")
        Steps(self.batch_rows, self.batch_ramp, self.skip_steps)
        odd = [rows for _, rows in self.batch_ramp if rows % micro_rows(self)]
        require(not odd, "data.batch_ramp", odd, f"multiples of a micro-batch's {micro_rows(self)} rows")


def micro_rows(data: DataConfig) -> int:
    """Rows of a micro-batch."""
    return data.batch_rows // data.accumulation
