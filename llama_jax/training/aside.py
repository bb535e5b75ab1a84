"""What the processes of a run beside the first show: their warnings."""

from collections.abc import Mapping, Sequence

from llama_jax.training.display import Stream
from llama_jax.training.metrics import StepRecord


class Aside:
    """A display that leaves all but warnings to the first process.

    Args:
      stream: where to.
      prefix: says whose warnings they are.
    """

    def __init__(self, stream: Stream, prefix: str) -> None:
        self._stream, self._prefix = stream, prefix

    def start(self, heading: Sequence[str], steps: int) -> None:
        """Shows nothing."""

    def step(self, record: StepRecord) -> None:
        """Shows nothing."""

    def event(self, text: str) -> None:
        """Writes a warning."""
        if text.startswith("warning"):
            self._stream.write(f"{self._prefix}{text}\n")
            self._stream.flush()

    def finish(self, summary: Mapping[str, str]) -> None:
        """Shows nothing."""
