"""How a run stands when the program ends."""

from typing import NamedTuple

from llama_jax.training.display import duration
from llama_jax.training.evaluate import Evaluation, PairEvaluation
from llama_jax.training.goodput import Goodput


class Summary(NamedTuple):
    """How a run stands when the program ends.

    Attributes:
      step: updates done.
      steps: updates wanted.
      evaluation: on what is held out with the final parameters; `None` where this call did not come to the end, or nothing is.
      unigram: nats a token of guessing held-out tokens by their frequency in the training text, as a baseline; `None`
        where nothing is held out, and for pairs of answers.
      saved: whether the last state is on disk.
      goodput: where the wall time of the run went, restarts included.
      skipped: updates that the guard has skipped.
      rewinds: times that the run has gone back.
      failed_saves: checkpoints that could not be written.
    """

    step: int
    steps: int
    evaluation: Evaluation | PairEvaluation | None
    unigram: float | None
    saved: bool
    goodput: Goodput = Goodput()
    skipped: int = 0
    rewinds: int = 0
    failed_saves: int = 0


def summary_lines(summary: Summary, seconds: float) -> dict[str, str]:
    """A summary as the rows of the display's last table."""
    rows = {"steps": f"{summary.step} of {summary.steps}", "time": duration(seconds)}
    if summary.evaluation:
        rows["held-out"] = summary.evaluation.line()
    if summary.evaluation and summary.unigram is not None:
        rows["unigram"] = f"{summary.unigram:.4f} nats a token (the entropy to beat)"
    if summary.skipped or summary.rewinds:
        rows["skipped"] = f"{summary.skipped} steps that went wrong; went back {summary.rewinds} times"
    if summary.failed_saves:
        rows["checkpoints"] = f"{summary.failed_saves} could not be written" + (
            "" if summary.saved else ", the last among them"
        )
    return rows | summary.goodput.lines()
