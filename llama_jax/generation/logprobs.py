"""Log-probabilities of given tokens, as a pure function."""

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Bool, Float, Int, Parameters
from llama_jax.model.llama import Llama, apply

_BLOCK = 128  # tokens a row whose logits are in memory at a time


def given_logprobs(
    model: Llama, params: Parameters, tokens: Int[Array, "B T"], first: Int[Array, " B"], following: Int[Array, "B W"]
) -> tuple[Float[Array, "B W"], Bool[Array, "B W"]]:
    """Log-probability of tokens in a text, and whether each is the most probable one.

    Logits are formed for these tokens alone, a block of them at a time.

    Args:
      model: the module.
      params: parameters in the form that `model.options.scan` says.
      tokens: the texts, padded on the right with anything.
      first: position in each row whose next token is the first of `following`.
      following: the tokens that follow positions `first`, `first + 1`, ...; padded with anything.
    """
    features = apply(model, params, tokens, None, None, method="features").last
    width = following.shape[1]
    places = jnp.minimum(first[:, None] + jnp.arange(width), tokens.shape[1] - 1)
    features = jnp.take_along_axis(features, places[..., None], axis=1)
    size = min(_BLOCK, width)

    def blocks(x: Array) -> Array:
        """The columns cut into blocks, those in front."""
        padded = jnp.pad(x, [(0, 0), (0, -width % size), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def measure(block: tuple[Array, Array]) -> tuple[Array, Array]:
        """One block."""
        logits = apply(model, params, block[0], method="unembed")
        chosen = jnp.take_along_axis(logits, block[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == block[1]

    logprobs, greedy = lax.map(measure, (blocks(features), blocks(following)))
    return tuple(x.swapaxes(0, 1).reshape(following.shape[0], -1)[:, :width] for x in (logprobs, greedy))
