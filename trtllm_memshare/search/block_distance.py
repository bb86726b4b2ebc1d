"""Stage 2, the specification: distance of KV rows in a paged pool, in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.search.types import PairBatch

DK, K_NEW, DV, V_NEW = range(4)
"""Last axis of the result: sums of squares of the K difference, the newer K, the V difference, the newer V."""


def block_distance(
    pool: torch.Tensor,
    new_rows: torch.Tensor,
    old_rows: torch.Tensor,
    position_delta: torch.Tensor,
    inv_freq: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """Sums of squared differences between paired rows of the pool, per pair and layer.

    Row r is slot ``r % tokens_per_block`` of block ``r // tokens_per_block``; with 16-token blocks row 35 is slot 3 of
    block 2. The older K is rotated by ``position_delta`` before it is compared, so that equal text at two positions
    compares equal.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, floating point.
      new_rows: int32 ``[pairs, tokens_per_block]``, -1 = no row (then in old_rows too).
      old_rows: int32, same shape.
      position_delta: int32, same shape: position at which the newer row was written minus that of the older one.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token; empty = compare K as stored.
      interleaved: element 2i of a head turns with element 2i + 1 (GPT-J); False: element i turns with element
        ``i + rotary_dim / 2`` (GPT-NeoX, Llama, Qwen).

    Returns:
      float32 ``[pairs, num_layers, 4]``: sums over rows and heads of |dK|^2, |K_new|^2, |dV|^2, |V_new|^2, in stored
      units. A pair with a row outside the pool, other than -1, is NaN.

    Raises:
      ValueError: shapes that do not agree.
    """
    num_blocks, _, _, _, tokens_per_block, _ = pool.shape
    if not new_rows.shape == old_rows.shape == position_delta.shape or new_rows.ndim != 2:
        raise ValueError(
            f"new_rows, old_rows and position_delta must share one shape [pairs, tokens_per_block], got "
            f"{list(new_rows.shape)}, {list(old_rows.shape)} and {list(position_delta.shape)}"
        )
    num_rows = num_blocks * tokens_per_block
    absent = (new_rows == -1) & (old_rows == -1)
    inside = (new_rows >= 0) & (new_rows < num_rows) & (old_rows >= 0) & (old_rows < num_rows)
    bad_pair = (~inside & ~absent).any(1)
    new, old = _read(pool, new_rows, inside), _read(pool, old_rows, inside)
    old_k = rotate(old[:, :, :, 0], position_delta, inv_freq, interleaved) if len(inv_freq) else old[:, :, :, 0]
    parts = torch.stack([new[:, :, :, 0] - old_k, new[:, :, :, 0], new[:, :, :, 1] - old[:, :, :, 1], new[:, :, :, 1]])
    sums = parts.square_().sum((2, 4, 5))  # [4, pairs, num_layers]
    sums[:, bad_pair] = torch.nan
    return sums.permute(1, 2, 0).contiguous()


def rotate(
    k: torch.Tensor, position_delta: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """K rows as they would be stored ``position_delta`` tokens later.

    Args:
      k: float32 ``[pairs, tokens, num_layers, num_kv_heads, head_dim]``; elements from rotary_dim on stay as they are.
      position_delta: int32 ``[pairs, tokens]``.
      inv_freq: float32 ``[rotary_dim / 2]``.
      interleaved: see ``block_distance``.
    """
    half = len(inv_freq)
    # Angles in float64: at 32k positions a float32 angle is off by a thousandth of a turn.
    angle = (position_delta.double()[:, :, None] * inv_freq.double())[:, :, None, None, :]
    cos, sin = angle.cos().float(), angle.sin().float()
    rest = k[..., 2 * half :]
    if interleaved:
        first, second = k[..., 0 : 2 * half : 2], k[..., 1 : 2 * half : 2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1)
    first, second = k[..., :half], k[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def relative_distances(sums: np.ndarray) -> np.ndarray:
    """Per-layer relative distances of K and V.

    Args:
      sums: float32 ``[pairs, num_layers, 4]`` as from ``block_distance``.

    Returns:
      float32 ``[pairs, num_layers, 2]``: |dK| / |K_new| and |dV| / |V_new|; 0 = equal, 1.41 = unrelated.
    """
    norms = np.maximum(sums[..., [K_NEW, V_NEW]], np.finfo(np.float32).tiny)
    return np.sqrt(sums[..., [DK, DV]] / norms)


def pairs_on(device: torch.device, pairs: PairBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows and deltas of a batch as int32 tensors on ``device``."""
    new_rows, old_rows, delta = (torch.from_numpy(a) for a in (pairs.new_rows, pairs.old_rows, pairs.position_delta))
    return new_rows.to(device), old_rows.to(device), delta.to(device)


def _read(pool: torch.Tensor, rows: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Rows of the pool, float32 ``[pairs, tokens, num_layers, 2, num_kv_heads, head_dim]``; zeros where not inside."""
    safe = torch.where(inside, rows, 0).long()
    size = pool.shape[4]
    values = pool[safe // size, :, :, :, safe % size].float()
    # Chosen, not multiplied: row 0 stands in for rows that are not there, and NaN times 0 is NaN.
    return torch.where(inside[:, :, None, None, None, None], values, 0.0)
