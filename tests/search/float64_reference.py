"""Block distance and signatures in float64 with numpy: errors of kernels and references are measured by them."""

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


def page_signatures_float64(fields, block_ids, inv_freq, positions, matrix) -> np.ndarray:
    """float64 ``[blocks, tokens_per_block, width]``, one token at a time; blocks must lie in the pool.

    Args:
      fields: as ``page_signatures`` takes them.
      inv_freq: float32 ``[rotary_dim / 2]``; empty where nothing is rotated, and for V.
      matrix: float32 ``[chosen layers, num_kv_heads, head_dim, width]``.
    """
    data = [field.to(torch.float64).numpy() for field in fields]
    weights, frequencies = matrix.double().numpy(), inv_freq.double().numpy()
    size, width = data[0].shape[2], weights.shape[-1]
    out = np.zeros((len(block_ids), size, width))
    for place, (block, first) in enumerate(zip(block_ids.tolist(), positions.tolist(), strict=True)):
        for token in range(size):
            total = np.zeros(width)
            for layer, field in enumerate(data):
                stored = field[block, :, token][None, None]  # [1, 1, heads, head_dim]
                rows = _turn(stored, np.array([-(first + token)]), frequencies, False)[0, 0]
                for row, of_head in zip(rows, weights[layer], strict=True):
                    total += _unit(row) @ of_head
            out[place, token] = _unit(total)
    return out


def _unit(vector):
    length = np.sqrt(np.square(vector).sum())
    return vector / length if length > 0 else vector


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
