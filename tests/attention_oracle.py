"""Attention written out in float64, forward and backward: what every backend is held against."""

import numpy as np


def float64_attention(q, k, v, d_out, seen):
    """Output and gradients of q, k and v by the closed form; `seen [B, T, S]`. A query that sees no
    key gives 0.
    """
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.where(seen[:, None], q @ keys.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    out, d_weights = weights @ values, d_out @ values.swapaxes(2, 3)
    d_scores = (
        weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    )
    shared = lambda x: x.reshape(*k.shape[:2], group, *x.shape[2:]).sum(2)
    return (
        out,
        d_scores @ keys,
        shared(d_scores.swapaxes(2, 3) @ q),
        shared(weights.swapaxes(2, 3) @ d_out),
    )


def seen_by(positions, documents):
    earlier = np.asarray(positions)[None, None, :] <= np.asarray(positions)[None, :, None]
    return earlier & (
        documents is None or np.asarray(documents)[:, :, None] == np.asarray(documents)[:, None, :]
    )
