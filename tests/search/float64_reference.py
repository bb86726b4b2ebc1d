"""The block distance in float64 with numpy, one pair at a time: what errors of kernel and reference are measured by."""

from __future__ import annotations

import numpy as np
import torch


def block_distance_float64(pool, new_rows, old_rows, position_delta, inv_freq, interleaved=False) -> np.ndarray:
    """float64 ``[pairs, num_layers, 4]``; rows must lie in the pool or both be -1."""
    size = pool.shape[4]
    data = pool.to(torch.float64).numpy()
    out = np.zeros((len(new_rows), pool.shape[1], 4))
    for pair, (new, old, delta) in enumerate(
        zip(new_rows.numpy(), old_rows.numpy(), position_delta.numpy(), strict=True)
    ):
        there = new != -1
        newer, older = (data[r[there] // size, :, :, :, r[there] % size] for r in (new, old))
        turned = _turn(older[:, :, 0], delta[there], inv_freq.double().numpy(), interleaved)
        parts = (newer[:, :, 0] - turned, newer[:, :, 0], newer[:, :, 1] - older[:, :, 1], newer[:, :, 1])
        out[pair] = np.stack([np.square(p).sum((0, 2, 3)) for p in parts], -1)
    return out


def _turn(k, delta, inv_freq, interleaved):
    """K ``[tokens, layers, heads, head_dim]`` as stored ``delta`` tokens later."""
    half = len(inv_freq)
    angle = (delta[:, None] * inv_freq)[:, None, None, :]
    x, y = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    turned = k.copy()
    turned[..., x] = k[..., x] * np.cos(angle) - k[..., y] * np.sin(angle)
    turned[..., y] = k[..., y] * np.cos(angle) + k[..., x] * np.sin(angle)
    return turned


def relative_error(sums, exact) -> float:
    """Largest error of any sum, relative to |K_new|^2 or |V_new|^2 of its pair and layer."""
    sums = np.asarray(sums, np.float64)
    norms = exact[..., [1, 1, 3, 3]]
    return float((np.abs(sums - exact) / np.where(norms > 0, norms, 1)).max(initial=0.0))
