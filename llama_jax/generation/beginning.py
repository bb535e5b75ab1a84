"""What several prompts begin with: found once, so that a shared system message is prefilled once for all of them."""

from collections.abc import Iterable, Sequence

from llama_jax.generation.generate import Generator
from llama_jax.generation.session import Prefix

_WORTH_IT = 16  # tokens; fewer are run again faster than their cache is copied


def common_beginning(prompts: Iterable[Sequence[int]]) -> list[int]:
    """The longest beginning that all prompts share, in token ids; of one prompt or none, nothing."""
    shared: list[int] = []
    for number, prompt in enumerate(prompts):
        most = len(prompt) if number == 0 else min(len(shared), len(prompt))
        same = (at for at in range(most) if number and prompt[at] != shared[at])
        shared = list(prompt[: next(same, most)])
    return shared


def shared_prefix(generator: Generator, beginning: Sequence[int], prompts: int) -> Prefix | None:
    """The beginning of so many prompts, run; `None` where it would not save anything.

    Args:
      generator: that is to run the prompts.
      beginning: from `common_beginning`.
      prompts: how many there are.
    """
    return generator.prefix(list(beginning)) if prompts > 1 and len(beginning) >= _WORTH_IT else None


def saved(prefix: Prefix | None, lengths: Iterable[int]) -> int:
    """Tokens of prompts of these lengths, all of which begin with the prefix, that are not run again."""
    return 0 if prefix is None else sum(min(len(prefix.token_ids), length - 1) for length in lengths)
