"""`attention="auto"` reaches the kernel of the platform that a program is compiled for, wherever it
is called from.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, float64_logits, random_parameters, unrolled_parameters

from llama_jax.generation.decode import generate_tokens
from llama_jax.generation.programs import Programs
from llama_jax.generation.sampling import make_sampling
from llama_jax.model import cudnn
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import Llama, hidden_states, logits, model_for
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.loss import mean_loss

CONFIG = dataclasses.replace(TINY, layers=2, heads=4, kv_heads=2, head_dim=64, context_length=512)
KERNELS = {
    "tpu": "tpu_custom_call",
    "cuda": "__cudnn$fmhaSoftmax",
    "cpu": "custom_call_target=none",
}
TOKENS = jax.ShapeDtypeStruct((2, 256), jnp.int32)


@pytest.fixture(scope="module", autouse=True)
def cudnn_present():
    """JAX takes cuDNN to be there, on a Hopper GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "check_cudnn_version", lambda: 91900)
        patch.setattr(module, "check_compute_capability", lambda least: float(least) <= 9.0)
        cudnn._kernel.cache_clear()
        yield
    cudnn._kernel.cache_clear()


@functools.cache
def narrow(stacked: bool = True):
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16),
        (random_parameters if stacked else unrolled_parameters)(CONFIG),
    )


def kernels(function, *args) -> dict[str, int]:
    """Calls of each platform's kernel in a program lowered for it, and of any in one for a CPU."""
    traced = jax.jit(function).trace(*args)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("tpu", "cuda", "cpu")
    }
    assert not any(kernel in texts["cpu"] for kernel in KERNELS.values())
    return {platform: texts[platform].count(KERNELS[platform]) for platform in ("tpu", "cuda")}


FUNCTIONS = {
    "logits": lambda params, tokens: logits(params, tokens, CONFIG),
    "mean_loss": lambda params, tokens: mean_loss(params, tokens, CONFIG),
    "hidden_states": lambda params, tokens: hidden_states(params, tokens, CONFIG),
    "module": lambda params, tokens: Llama(CONFIG, ModelOptions("bfloat16")).apply(
        {"params": params}, tokens
    ),
    "packed": lambda params, tokens: logits(params, tokens, CONFIG, tokens),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(name):
    ways = (
        2 if name == "packed" else 1
    )  # cuDNN has one for sequences of one document and one for several
    assert kernels(FUNCTIONS[name], narrow(), TOKENS) == {"tpu": 1, "cuda": ways}


def test_layers_that_are_not_scanned_share_a_kernel():
    """A program that calls it twice holds it once."""
    assert kernels(FUNCTIONS["logits"], narrow(stacked=False), TOKENS) == {"tpu": 1, "cuda": 1}


def test_backward():
    """Forward once, and no more than the backward kernels beside it, where its output is kept."""
    gradient = jax.grad(lambda params, tokens: mean_loss(params, tokens, CONFIG, remat="attention"))
    assert kernels(gradient, narrow(), TOKENS) == {"tpu": 3, "cuda": 2}


def test_prefill_and_rollouts():
    model = model_for(narrow(stacked=False), CONFIG)
    programs, lengths = Programs(model, None), jnp.asarray([256, 9])
    cache = jax.eval_shape(lambda: init_cache(CONFIG, 2, 512, jnp.bfloat16))
    first = functools.partial(programs.prefill.__wrapped__.__wrapped__, fresh=True)
    assert kernels(first, narrow(stacked=False), TOKENS, lengths, cache) == {"tpu": 1, "cuda": 1}
    # Tokens behind a cache see more than themselves: no kernel takes them.
    behind = programs.prefill.__wrapped__.__wrapped__
    assert kernels(behind, narrow(stacked=False), TOKENS, lengths, cache) == {"tpu": 0, "cuda": 0}
    rollout = functools.partial(
        generate_tokens, model, sampling=make_sampling(2), stop_ids=(), max_new_tokens=3
    )
    assert kernels(rollout, narrow(stacked=False), TOKENS, lengths) == {"tpu": 1, "cuda": 1}


def test_on_a_mesh():
    """Rows and heads over devices; heads that the mesh does not divide and sequences over devices
    go another way.
    """
    for sizes, expected in (({"fsdp": 2, "tensor": 2}, 1), ({"tensor": 4}, 0), ({"context": 2}, 0)):
        mesh = make_mesh(
            **{"fsdp": 1, **sizes}, devices=jax.devices()[: np.prod(list(sizes.values()))]
        )
        with jax.set_mesh(mesh):
            assert kernels(FUNCTIONS["mean_loss"], narrow(), TOKENS) == {
                "tpu": expected,
                "cuda": expected,
            }


@pytest.mark.parametrize(
    ("length", "dtype", "expected"),
    [
        (255, "bfloat16", {"tpu": 0, "cuda": 0}),
        (250, "bfloat16", {"tpu": 0, "cuda": 1}),
        (256, "float32", {"tpu": 1, "cuda": 0}),
    ],
)
def test_sizes_that_a_kernel_does_not_take(length, dtype, expected):
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    assert (
        kernels(
            lambda params, tokens: logits(params, tokens, CONFIG, dtype=dtype), narrow(), tokens
        )
        == expected
    )


def test_what_is_asked_for_by_name_stays():
    for name in ("reference", "blockwise"):
        run = lambda params, tokens, name=name: logits(params, tokens, CONFIG, attention=name)
        assert kernels(run, narrow(), TOKENS) == {"tpu": 0, "cuda": 0}


def test_forward_mode_derivatives():
    """`auto` has a `jax.jvp` on a CPU, though kernels that have none are traced beside it; a
    `jax.jacfwd` asks for `reference` by name.
    """
    config = dataclasses.replace(CONFIG, layers=1)
    params = random_parameters(config)
    x = 0.1 * jax.random.normal(jax.random.key(0), (1, 128, config.dim))
    run = lambda scale, **options: logits(params, x * scale, config, **options)[0, -1]
    _, got = jax.jvp(run, (1.0,), (1.0,))
    half = 2.0**-7
    expected = (run(1 + half) - run(1 - half)) / (2 * half)
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=2e-3)
    by_name = jax.jacfwd(functools.partial(run, attention="reference"))(1.0)
    np.testing.assert_allclose(by_name, got, rtol=1e-5, atol=1e-5)


def test_here_it_computes_what_it_did():
    config = dataclasses.replace(CONFIG, layers=1)
    params, tokens = (
        random_parameters(config),
        np.random.default_rng(0).integers(0, config.vocab_size, (1, 128)),
    )
    np.testing.assert_allclose(
        logits(params, jnp.asarray(tokens), config),
        float64_logits(params, tokens, config),
        atol=2e-5,
    )
