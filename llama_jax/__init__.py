"""LLaMA 1 to 3.3 in JAX and Flax: pretrain, fine-tune and generate, from a laptop to a TPU pod."""

__version__ = "0.1.0"
