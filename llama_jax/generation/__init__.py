"""Sampling and the autoregressive loop."""
