"""The sides of `gpu.py`: functions that prepare a model on the GPU and make a function that
measures it.

Weights are random: each side draws its own, of the same shapes. Preparing compiles and warms up, so
that asking measures.
"""

import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sides import call_seconds

_SMALL = 0.3  # of the card


class Update(NamedTuple):
    """What a training side answers.

    Attributes:
      seconds: of one update, the mean of all that were timed together.
      loss: of the last one.
      memory: peak bytes in use.
      prepared: seconds that it took to compile and warm up.
      kernels: where the time went, if asked for.
    """

    seconds: float
    loss: float
    memory: int
    prepared: float
    kernels: str = ""


def use_memory(fraction: float) -> None:
    """How much of the card JAX may take; to be said before it is imported."""
    os.environ.pop("JAX_PLATFORMS", None)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.2f}"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def longest_kernels(run: Callable[[], Any], count: int = 14) -> str:
    """The kernels that took most of the GPU's time in a call: milliseconds, how many, their
    name.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        file = next(pathlib.Path(directory).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        spent: dict[str, list[float]] = {}
        for plane in planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    entry = spent.setdefault(event.name, [0.0, 0])
                    entry[0], entry[1] = entry[0] + event.duration_ns / 1e6, entry[1] + 1
    total = sum(time for time, _ in spent.values())
    order = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
    lines = [
        f"  {spent_ms:9.2f} ms {int(number):6d} x {name[:110]}"
        for name, (spent_ms, number) in order
    ]
    return "\n".join([f"  {total:9.2f} ms in kernels", *lines])


def packed(sequences: int, length: int, mean: int) -> np.ndarray:
    """Document numbers `[sequences, length]`, documents of about `mean` tokens; one document a
    sequence if that is 0.
    """
    if not mean:
        return np.ones((sequences, length), np.int32)
    rng = np.random.default_rng(0)
    ends = rng.random((sequences, length)) < 1 / mean
    return (1 + np.cumsum(ends, axis=1)).astype(np.int32)


def drawn(module: Any) -> Any:
    """Random bfloat16 parameters of a model, array by array: one small program for each shape."""
    import jax
    import jax.numpy as jnp

    from llama_jax.training.step import fresh_parameters

    shapes = jax.eval_shape(lambda: fresh_parameters(module, jax.random.key(0)))
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    leaves, tree = jax.tree.flatten(shapes)
    ones = lambda shape: jnp.ones(shape, jnp.bfloat16)  # noqa: E731 - the scales of norms
    arrays = [
        draw(jax.random.key(i), one.shape)
        if one.shape[-2:-1] and min(one.shape[-2:]) > 64
        else ones(one.shape)
        for i, one in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def train_llama_jax(
    preset: str, settings: list[str], mean: int, updates: int, fraction: float, profile: bool
) -> Callable:
    """A preset's own step: recipe, optimizer, guard and all.

    Args:
      preset: a YAML file.
      settings: that are given behind it, as on the command line.
      mean: tokens of a document; 0 for whole sequences.
      updates: to be timed together.
      fraction: of the card's memory.
      profile: whether to look at one update's kernels too.
    """
    use_memory(fraction)
    started = time.perf_counter()
    import jax

    from llama_jax.cli.arguments import parse_train
    from llama_jax.data.packing import Batch
    from llama_jax.training.setup import make_recipe, run_mesh
    from llama_jax.training.step import batch_sharding, micro_batches, sharded_init, sharded_step

    config = parse_train(["--config", preset, *settings], pathlib.Path(preset))
    recipe, mesh = make_recipe(config), run_mesh(config)
    key, sequences, length = jax.random.key(0), config.data.batch_size, config.data.length
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (sequences, length + 1), np.int32)
    numbers = packed(sequences, length, mean)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((sequences, length), np.float32), numbers)
    batch = jax.device_put(
        micro_batches(batch, config.data.accumulation), batch_sharding(recipe, mesh)
    )
    with jax.set_mesh(mesh):
        frozen = ()
        if config.adapter.rank:
            frozen = (drawn(recipe.model),)
        state = sharded_init(recipe, mesh)(key)
        step = sharded_step(recipe, mesh, *frozen)
        for _ in range(2):
            state, _ = step(state, batch, *frozen)
        jax.block_until_ready(state)
    prepared = time.perf_counter() - started

    def several(count: int) -> Any:
        """So many updates; the figures of the last."""
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, figures = step(state, batch, *frozen)
            return jax.block_until_ready((state, figures))[1]

    def update() -> Update:
        """Measures."""
        started = time.perf_counter()
        figures = several(updates)
        seconds = (time.perf_counter() - started) / updates
        kernels = longest_kernels(lambda: several(1)) if profile else ""
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        return Update(seconds, float(figures.loss), peak, prepared, kernels)

    return update


def _transformers(model: str, dtype: str) -> Any:
    """The model of transformers with random weights on the GPU, attention by
    `scaled_dot_product_attention`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_jax.presets import preset

    ours = preset(model)
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        intermediate_size=ours.ffn_dim,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        max_position_embeddings=8192,
        tie_word_embeddings=ours.tied_head,
        attn_implementation="sdpa",
    )
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        torch.set_default_dtype(getattr(torch, dtype))
        peer = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return peer


def train_transformers(
    model: str, method: str, sequences: int, micro_batch_size: int, length: int, updates: int
) -> Callable:
    """transformers, compiled: AdamW in float32 under autocast (`pretrain`), adapters of peft
    (`lora`), Adafactor (`full`).

    Documents are not masked: every sequence is one.
    """
    started = time.perf_counter()
    import torch
    from torch.nn.functional import cross_entropy

    peer = _transformers(model, "float32" if method == "pretrain" else "bfloat16").train()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        peer = get_peft_model(
            peer,
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    trained = [p for p in peer.parameters() if p.requires_grad]
    vocabulary = peer.config.vocab_size
    adafactor = method == "full"
    optimizer = (
        torch.optim.Adafactor(trained, lr=1e-3)
        if adafactor
        else torch.optim.AdamW(trained, lr=1e-4, fused=True)
    )

    def loss_of(ids: Any, targets: Any) -> Any:
        """Mean loss at all positions."""
        with torch.autocast("cuda", torch.bfloat16, enabled=method == "pretrain"):
            logits = peer(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets)

    forward = torch.compile(loss_of, dynamic=False)
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(vocabulary, (sequences, length + 1), device="cuda", generator=generator)

    def several(count: int) -> Any:
        """So many updates; the loss of the last micro-batch."""
        for _ in range(count):
            for part in tokens.split(micro_batch_size):
                loss = forward(part[:, :-1], part[:, 1:].flatten())
                (loss * (len(part) / sequences)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return loss

    several(2)
    prepared = time.perf_counter() - started

    def update() -> Update:
        """Measures."""
        started = time.perf_counter()
        loss = several(updates)
        seconds = (time.perf_counter() - started) / updates
        return Update(seconds, loss.item(), torch.cuda.max_memory_allocated(), prepared)

    return update


class Answer(NamedTuple):
    """Seconds of a generation: up to the first new tokens of all sequences, and for those after
    them.
    """

    prefill: float
    decode: float


def _timed(
    generate: Callable[[np.ndarray, int], Answer], cases: list[tuple[int, int, int]]
) -> Callable[..., Answer]:
    """From sequences, prompt length and new tokens to the shortest times of three; all cases are
    run once before.
    """
    rng = np.random.default_rng(0)
    prompts = {
        (sequences, length): rng.integers(0, 40_000, (sequences, length))
        for sequences, length, _ in cases
    }
    for sequences, length, new in cases:
        generate(prompts[sequences, length], new)

    def answer(sequences: int, length: int, new: int) -> Answer:
        """The best of each."""
        return Answer(
            *map(min, zip(*[generate(prompts[sequences, length], new) for _ in range(3)]))
        )

    return answer


def generate_llama_jax(
    model: str, dtype: str, cases: list[tuple[int, int, int]], fraction: float, profile: bool
) -> Callable:
    """`Generator` on bfloat16 weights, or on 8-bit ones, greedy, without stop tokens."""
    use_memory(fraction)
    from llama_jax.generation.generate import Generator
    from llama_jax.model.llama import Llama
    from llama_jax.model.options import ModelOptions
    from llama_jax.model.quantize import quantize
    from llama_jax.presets import preset

    config = preset(model)
    module = Llama(config, ModelOptions(scan=False))
    params = drawn(module)
    if dtype == "int8":
        params = quantize(params, 8)
    generator = Generator(params, config, dtype="bfloat16")

    def generate(prompts: np.ndarray, new: int) -> Answer:
        """All sequences, in chunks of 32 tokens as `Generator.generate` has them."""
        started = time.perf_counter()
        session = generator.start(prompts.tolist(), new)
        chunks = session.stream(32)
        np.asarray(session._first.token)
        first = time.perf_counter()
        drawn = sum(len(tokens.token_ids) for chunk in chunks for tokens in chunk)
        assert drawn == new * len(prompts), drawn
        return Answer(first - started, time.perf_counter() - first)

    answer = _timed(generate, cases)
    if profile:
        sequences, length, new = cases[0]
        prompts = np.ones((sequences, length), np.int64)
        print(
            f"{model} {dtype} {cases[0]}\n" + longest_kernels(lambda: generate(prompts, new), 24),
            flush=True,
        )
    return answer


def generate_transformers(model: str, cases: list[tuple[int, int, int]]) -> Callable:
    """`generate` of transformers in bfloat16 with a static cache, through torch.compile as it does
    by itself then.
    """
    import torch

    peer = _transformers(model, "bfloat16").eval()

    class Clock:
        """Looks on as logits come: the time of the first."""

        def __init__(self) -> None:
            self.first = 0.0

        def __call__(self, ids: Any, logits: Any) -> Any:
            """Leaves the logits alone."""
            if not self.first:
                torch.cuda.synchronize()
                self.first = time.perf_counter()
            return logits

    def generate(prompts: np.ndarray, new: int) -> Answer:
        """All sequences."""
        ids, clock = torch.from_numpy(prompts).cuda(), Clock()
        exactly = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
        }
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                cache_implementation="static",
                logits_processor=[clock],
                **exactly,
            )
        torch.cuda.synchronize()
        return Answer(clock.first - started, time.perf_counter() - clock.first)

    return _timed(generate, cases)


def hardware() -> Callable:
    """Bytes a second that a copy moves (read and written), and FLOP/s of a bfloat16 product of
    8192^3.
    """
    use_memory(_SMALL)
    import jax
    import jax.numpy as jnp

    def measure() -> tuple[str, float, float, int]:
        """The card's name, both rates, and its memory."""
        keys = jax.random.split(jax.random.key(0))
        numbers = jax.random.normal(keys[0], (2**30,), jnp.bfloat16)
        a, b = (jax.random.normal(key, (8192, 8192), jnp.bfloat16) for key in keys)
        copied = 2 * numbers.nbytes / call_seconds(lambda x: -x, 10, numbers)
        multiplied = 2 * 8192**3 / call_seconds(lambda a, b: (a @ b) * jnp.bfloat16(0.01), 10, a, b)
        (device, *_) = jax.devices()
        memory = (device.memory_stats() or {}).get("bytes_limit", 0) / _SMALL
        return device.device_kind, copied, multiplied, int(memory)

    return measure
