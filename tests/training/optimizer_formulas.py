"""The optimizers in NumPy and float64, one matrix (or vector) at a time, from their papers; and a
step with given gradients.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.batches import Batch
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.loss import Objective
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.step import Recipe

# From gradients in order of time and the parameter as it is at each, to the update for a learning
# rate of 1, before decay.
Direction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def adamw(config: OptimizerConfig) -> Direction:
    """arXiv:1711.05101, algorithm 2."""
    m, v, t = 0.0, 0.0, 0

    def direction(g, p):
        nonlocal m, v, t
        t += 1
        m, v = (
            config.beta1 * m + (1 - config.beta1) * g,
            config.beta2 * v + (1 - config.beta2) * g * g,
        )
        return m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.eps)

    return direction


def lion(config: OptimizerConfig) -> Direction:
    """arXiv:2302.06675, algorithm 2."""
    m = 0.0

    def direction(g, p):
        nonlocal m
        update = np.sign(config.beta1 * m + (1 - config.beta1) * g)
        m = config.beta2 * m + (1 - config.beta2) * g
        return update

    return direction


def adafactor(config: OptimizerConfig) -> Direction:
    """arXiv:1804.04235, algorithms 4 and 5: decay 1 - t^-0.8, clipped at 1, times the size of the
    parameter but at least 1e-3.

    As in all implementations, small matrices and vectors (here a side below 128) keep the square of
    every entry.
    """
    rows, columns, v, t = 0.0, 0.0, 0.0, 0

    def direction(g, p):
        nonlocal rows, columns, v, t
        t += 1
        decay, square = 1 - t**-0.8, g * g + 1e-30
        if g.ndim == 2 and min(g.shape) >= 128:
            rows = decay * rows + (1 - decay) * square.sum(axis=1)
            columns = decay * columns + (1 - decay) * square.sum(axis=0)
            mean_square = np.outer(rows, columns) / rows.sum()
        else:
            v = decay * v + (1 - decay) * square
            mean_square = v
        update = g / np.sqrt(mean_square)
        return max(1e-3, rms(p)) * update / max(1.0, rms(update))

    return direction


def muon(config: OptimizerConfig) -> Direction:
    """kellerjordan.github.io/posts/muon, five steps of its quintic, with a Nesterov momentum of
    0.95 that is corrected for its start as in NAdam (Dozat, 2016); scaled by 0.2 sqrt(longer side),
    arXiv:2502.16982."""
    m, t = 0.0, 0

    def direction(g, p):
        nonlocal m, t
        t += 1
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        return orthogonal(ahead) * 0.2 * max(g.shape) ** 0.5

    return direction


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Newton and Schulz' iteration as Muon has it: singular values are moved near 1."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


FORMULAS = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "muon": muon}


def formula_of(config: OptimizerConfig, path: tuple[str, ...]) -> Direction:
    """What a parameter is moved by; Muon has only the matrices of the layers, which are not
    norms.
    """
    in_layer = path[0].startswith("layers") and "scale" not in path
    name = "adamw" if config.name == "muon" and not in_layer else config.name
    return FORMULAS[name](config)


def matrices(path: tuple[str, ...], leaf: np.ndarray) -> Iterator[np.ndarray]:
    """The parameters in a leaf: one a layer where they are stacked."""
    yield from leaf if path[0] == "layers" else [leaf]


def names_of(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def trained_by_formula(config: OptimizerConfig, steps: int, params, gradients):
    """Parameters after one step for each entry on the leading axis of the gradients, by the
    formulas; float64.
    """
    rates = np.asarray(learning_rate_schedule(config, steps)(np.arange(steps)), np.float64)

    def train(path, leaf, given):
        names, done = names_of(path), []
        given = np.asarray(given, np.float64)
        for number, start in enumerate(matrices(names, np.asarray(leaf, np.float64))):
            p, direction = start.copy(), formula_of(config, names)
            decay = 0.0 if "scale" in names else config.weight_decay
            for count, at_step in enumerate(given):
                g = at_step[number] if names[0] == "layers" else at_step
                p = p - rates[count] * (direction(g, p) + decay * p)
            done.append(p)
        return np.stack(done) if names[0] == "layers" else done[0]

    return jax.tree_util.tree_map_with_path(train, params, gradients)


def given_recipe(config: OptimizerConfig, steps: int, params) -> Recipe:
    """A recipe that begins with those parameters; its gradient is what the step is given as
    frozen.
    """

    def loss(model, pair, batch, chunk):
        """Linear in what is trained."""
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), *pair)
        return sum(jax.tree.leaves(products)), {}

    return Recipe(
        None,
        make_optimizer(config),
        learning_rate_schedule(config, steps),
        1,  # type: ignore[arg-type]
        Objective(loss, lambda batch: jnp.float32(1)),
        init=lambda model, key: params,
        parameters=lambda trained, gradient, draw: (trained, gradient),
    )


def any_batch() -> Batch:
    """Micro-batches `[1, 4, 1]`, which the loss does not look at."""
    zeros = np.zeros((1, 4, 1), np.int32)
    return Batch(zeros, zeros, np.ones((1, 4, 1), np.float32), zeros + 1)
