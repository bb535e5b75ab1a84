"""The sides of the training benchmark: functions that make a function (sequences, length) ->
(seconds, loss) of one update.

All start from the same weights, read the same batches in the same order and use the same AdamW in
float32. Each takes the name of a model: a preset whose weights are read from `path`, or `medium`,
whose weights are drawn.
"""

import functools
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

from llama_jax.config import LlamaConfig

MEDIUM = LlamaConfig(
    vocab_size=8192,
    dim=384,
    layers=8,
    heads=6,
    kv_heads=2,
    head_dim=64,
    ffn_dim=1024,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context_length=1024,
    tied_head=True,
)
RATE, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
CHUNK = 512  # of the loss, as in configs/demo.yaml


def start_weights(path: pathlib.Path | None) -> tuple[LlamaConfig, dict]:
    """Architecture and parameters, those of each layer apart, float32."""
    from llama_jax import load

    if path is not None:
        model = load(path)
        return model.config, model.params
    import jax

    from llama_jax.model.llama import Llama
    from llama_jax.model.options import ModelOptions
    from llama_jax.training.step import fresh_parameters

    return MEDIUM, jax.jit(
        functools.partial(fresh_parameters, Llama(MEDIUM, ModelOptions(scan=False)))
    )(jax.random.key(0))


def batches(vocabulary: int):
    """A function (sequences, length) -> tokens `[sequences, length + 1]`: ids of Zipf's
    frequencies, the same on every side.
    """
    rng = np.random.default_rng(0)
    return lambda sequences, length: np.minimum(
        rng.zipf(1.2, (sequences, length + 1)) + 2, vocabulary - 1
    ).astype(np.int32)


def llama_jax(path: pathlib.Path | None):
    """The product's own step, compiled for one device, layers unrolled."""
    import jax

    from llama_jax.data.packing import Batch
    from llama_jax.model.attention import choose_backend
    from llama_jax.model.llama import Llama
    from llama_jax.model.options import ModelOptions
    from llama_jax.parallel.mesh import make_mesh
    from llama_jax.training.config_sections import OptimizerConfig
    from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
    from llama_jax.training.step import Recipe, fresh_state, sharded_step, state_shapes

    config, params = start_weights(path)
    settings = OptimizerConfig(
        learning_rate=RATE,
        warmup_steps=0,
        final_fraction=1.0,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    optimizer, schedule = make_optimizer(settings), learning_rate_schedule(settings, 1)
    draw, mesh = batches(config.vocab_size), make_mesh(devices=jax.devices()[:1])

    def recipe(length: int) -> Recipe:
        options = ModelOptions(scan=False, attention=choose_backend("auto", length, length))
        return Recipe(Llama(config, options), optimizer, schedule, CHUNK)

    places = jax.tree.map(
        lambda x: x.sharding, state_shapes(recipe(1), mesh)
    )  # else the second update compiles again
    state = jax.device_put(fresh_state(recipe(1), params), places)

    @functools.cache
    def program(length: int):
        return sharded_step(recipe(length), mesh)

    def update(sequences: int, length: int) -> tuple[float, float]:
        nonlocal state
        tokens = draw(sequences, length)
        ones = np.ones((1, sequences, length), np.int32)
        batch = Batch(tokens[None, :, :-1], tokens[None, :, 1:], ones.astype(np.float32), ones)
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            state, figures = program(length)(state, batch)
            loss = float(jax.block_until_ready((state, figures))[1].loss)
        return time.perf_counter() - started, loss

    return update


def transformers(path: pathlib.Path | None, compiled: bool = False):
    """The model of transformers, PyTorch's fused AdamW; attention by
    `scaled_dot_product_attention`, documents not masked.
    """
    import torch
    from support import transformers_model
    from torch.nn.functional import cross_entropy

    config, params = start_weights(path)
    model = transformers_model(config, params).train()
    assert model.config._attn_implementation == "sdpa"
    draw = batches(config.vocab_size)
    every = list(model.parameters())
    groups = [
        {"params": [p for p in every if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in every if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)

    def loss_of(ids, targets):
        """Mean loss at all positions."""
        return cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), targets)

    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def update(sequences: int, length: int) -> tuple[float, float]:
        tokens = torch.from_numpy(draw(sequences, length)).long()
        started = time.perf_counter()
        loss = forward(tokens[:, :-1], tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started, loss.item()

    return update
