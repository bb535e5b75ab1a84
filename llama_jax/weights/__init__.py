"""Weights of others into the one parameter tree, and our own checkpoints."""
