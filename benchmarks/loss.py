"""Memory of the loss as XLA plans it: temporaries of loss and gradients beside those of the usual
form, which has all logits.

    python benchmarks/loss.py [--tokens 8192] [--dim 2048] [--vocabulary 128256] [--chunks 512,2048]
    [--dtypes float32,bfloat16]

Nothing is run. Features and head are what the step of a model has at its end; both gradients are
formed.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from report import heading

from llama_jax.training.cross_entropy import cross_entropy


def usual(features, head, targets, weights):
    """The loss as one would write it: logits of all tokens in float32, their log-softmax, the
    entries at the targets.
    """
    logits = jnp.einsum("btd,dv->btv", features, head, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(weights * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0])


def planned(loss: Callable, options: argparse.Namespace, dtype: str) -> tuple[int, int]:
    """Bytes of temporaries and of results (the gradients of features and head) of a compiled loss
    with its gradients.
    """
    tokens, dim, vocabulary = options.tokens, options.dim, options.vocabulary
    shapes = [
        ((1, tokens, dim), dtype),
        ((dim, vocabulary), dtype),
        ((1, tokens), "int32"),
        ((1, tokens), "float32"),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for shape, kind in shapes]
    figures = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(*arguments)
        .compile()
        .memory_analysis()
    )
    return figures.temp_size_in_bytes, figures.output_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the loss.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument(
        "--chunks", default="512,2048", help="tokens whose logits exist at one time"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    print(heading())
    print(
        f"setting   {options.tokens} tokens, D {options.dim}, V {options.vocabulary}: "
        "logits in float32 are "
        f"{4 * options.tokens * options.vocabulary / 2**20:,.0f} MiB"
    )
    forms = {"usual": usual} | {
        f"by chunks of {chunk}": lambda *given, chunk=int(chunk): cross_entropy(*given, chunk)
        for chunk in options.chunks.split(",")
    }
    for dtype in options.dtypes.split(","):
        print(
            f"\n| loss and gradients, {dtype} | temporaries | gradients | of the usual "
            "|\n|---|---|---|---|"
        )
        first = 0
        for name, loss in forms.items():
            spare, results = planned(loss, options, dtype)
            first = first or spare
            print(
                f"| {name} | {spare / 2**20:,.0f} MiB | {results / 2**20:,.0f} MiB | "
                f"{spare / first:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
