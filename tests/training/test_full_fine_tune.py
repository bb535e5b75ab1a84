"""Twenty steps of fine-tuning a real model whole: the loss curve of transformers and PyTorch's
AdamW on the same batches.
"""

import argparse
import copy
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.batches import Batches, Source, Steps
from llama_jax.data.packing import pack
from llama_jax.data.token_file import write_tokens
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.step import (
    Recipe,
    batch_sharding,
    fresh_state,
    global_batch,
    sharded_step,
    state_shapes,
)

pytestmark = [pytest.mark.smollm2, pytest.mark.parity]

STEPS, ROWS, LENGTH, WARMUP = 20, 2, 32, 5
# A decay that shows within twenty steps; clipping cuts every gradient here.
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-4, warmup_steps=WARMUP, weight_decay=0.5, clip_norm=1.0
)


@pytest.fixture(scope="module")
def batches(smollm2_model, tmp_path_factory) -> Batches:
    """The source of a module of the standard library, cut into sequences, in the product's
    order.
    """
    ids = smollm2_model.tokenizer.encode(pathlib.Path(argparse.__file__).read_text())
    path = tmp_path_factory.mktemp("source") / "argparse.tokens"
    size = smollm2_model.config.vocab_size
    tokens = write_tokens(
        path, [ids], vocab_size=size, bytes_of_text=1, tokenizer_sha256="", sources_sha256=""
    )
    return Batches((Source(pack(tokens, LENGTH, "cut"), 1.0),), Steps(ROWS), 0)


def rate_of(step: int) -> float:
    """Warm-up and cosine, written out: the first step has a fifth of the peak, the last a tenth of
    it.
    """
    peak, done = OPTIMIZER.learning_rate, step + 1
    if done <= WARMUP:
        return peak * done / WARMUP
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (done - WARMUP) / (STEPS - WARMUP))) / 2)


def torch_curve(model, batches: Batches, rates: list[float]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps, by PyTorch."""
    import torch

    every = list(model.parameters())
    groups = [
        {"params": [p for p in every if p.dim() == 2], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in every if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    losses, norms = [], []
    for step, rate in enumerate(rates):
        batch = batches.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(torch.from_numpy(batch.tokens).long()).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(batch.targets).long().flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(every, OPTIMIZER.clip_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def our_curve(model, batches: Batches) -> tuple[list[float], list[float]]:
    """The same by the step of the product."""
    mesh, schedule = make_mesh(devices=jax.devices()[:1]), learning_rate_schedule(OPTIMIZER, STEPS)
    recipe = Recipe(
        Llama(model.config, ModelOptions(scan=False)),
        make_optimizer(OPTIMIZER),
        schedule,
        ROWS * LENGTH,
    )
    params = jax.tree.map(jnp.array, model.params)  # the step consumes what it is given
    places = jax.tree.map(
        lambda x: x.sharding, state_shapes(recipe, mesh)
    )  # else the second step compiles again
    state = jax.device_put(fresh_state(recipe, params), places)
    figures = []
    with jax.set_mesh(mesh):
        program, sharding = sharded_step(recipe, mesh), batch_sharding(recipe, mesh)
        for step in range(STEPS):
            state, metrics = program(state, global_batch(batches, step, ROWS, sharding))
            figures.append((float(metrics.loss), float(metrics.grad_norm)))
    losses, norms = zip(*figures)
    return list(losses), list(norms)


def test_twenty_steps_have_the_losses_of_pytorch(smollm2_model, smollm2_torch, batches):
    assert all(batches.batch(step).weights.all() for step in range(STEPS))
    rates = [rate_of(step) for step in range(STEPS)]
    wanted, norms = torch_curve(copy.deepcopy(smollm2_torch), batches, rates)
    losses, our_norms = our_curve(smollm2_model, batches)
    apart = np.abs(np.subtract(losses, wanted))
    print(
        f"losses {wanted[0]:.4f} to {wanted[-1]:.4f}, {apart.max():.1e} apart; norms "
        f"{min(norms):.2f} to {max(norms):.2f}"
    )
    assert apart.max() < 1e-3
    np.testing.assert_allclose(our_norms[0], norms[0], rtol=1e-4)
    assert np.mean(wanted[-5:]) < np.mean(wanted[:5]) - 0.3
    assert min(norms) > OPTIMIZER.clip_norm
