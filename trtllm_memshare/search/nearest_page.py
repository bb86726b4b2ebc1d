"""The published method's choice at a budget: which page goes, and which earlier page is read in its place.

Whole pages are compared with whole pages, in phase, K and V as they are stored, rotation included; the pair with the
smallest distance goes first. The paper (arXiv 2507.21433) publishes neither its thresholds nor what it does when they
free too little, so a budget in place of a threshold is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

ReadPages = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""K and V of blocks int ``[pages]`` in a layer, float32 ``[pages, width]`` each; all pages' numbers in one order."""


def page_distances(pool: torch.Tensor, new_blocks: torch.Tensor, old_blocks: torch.Tensor) -> torch.Tensor:
    """Distance of each new page to each old one: the larger of K's and V's, mean over layers.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      new_blocks: int ``[n]``, physical blocks.
      old_blocks: int ``[m]``.

    Returns:
      float32 ``[n, m]``, on the pool's device: 0 = equal, 1.41 = unrelated; NaN where a page is all zero.
    """

    def read(layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = pool[blocks.long(), layer].float().flatten(2).unbind(1)
        return key, value

    return distances_of_layers(read, pool.shape[1], new_blocks.to(pool.device), old_blocks.to(pool.device))


def distances_of_layers(
    read: ReadPages, num_layers: int, new_blocks: torch.Tensor, old_blocks: torch.Tensor
) -> torch.Tensor:
    """``page_distances`` of a pool that ``read`` reads, float32 ``[n, m]``, on the blocks' device."""
    result = torch.zeros(len(new_blocks), len(old_blocks), device=new_blocks.device)
    for layer in range(num_layers):
        new, old = read(layer, new_blocks), read(layer, old_blocks)
        result += torch.maximum(*map(relative_distances_of_rows, new, old)) / num_layers
    return result


def relative_distances_of_rows(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of every two rows over the root mean square of their lengths.

    Args:
      rows: float32 ``[n, width]``.
      others: float32 ``[m, width]``.

    Returns:
      float32 ``[n, m]``.
    """
    mean = ((rows * rows).sum(1)[:, None] + (others * others).sum(1)[None]) / 2
    return ((2 * mean - 2 * rows @ others.T).clamp_min(0) / mean).sqrt()


def pair_with_earlier(distance: np.ndarray, counts: np.ndarray, max_aliases: int, limit: int) -> list[tuple[int, int]]:
    """Pages that go and the earlier ones that are read in their place, nearest pair first.

    What a page stands for goes with it: with pages 0, 1, 2 and pairs (2, 1) and then (1, 0), page 0 stands for three.
    Distances along the result never fall, since pages and pairs only become fewer: the first k pairs of a long result
    are the result for ``limit`` k.

    Args:
      distance: float ``[n, n]``, row = the page that would go; only earlier columns and finite values are looked at.
      counts: int ``[n]``, how many entries each page stands for, itself included.
      max_aliases: most entries that one page may stand for.
      limit: most pairs.

    Returns:
      (page, earlier page) by index. Fewer than ``limit`` where no pair is left.
    """
    num_pages = len(distance)
    near = np.where(np.tri(num_pages, k=-1, dtype=bool) & np.isfinite(distance), distance, np.inf)
    near[counts[:, None] + counts > max_aliases] = np.inf
    counts, pairs = counts.copy(), list[tuple[int, int]]()
    # Of each row the nearest: after a pair only the rows that had it in one of its two pages are looked at again.
    nearest = near.argmin(1) if num_pages else np.zeros(0, np.int64)
    least = near[np.arange(num_pages), nearest]
    for _ in range(min(limit, num_pages)):
        page = int(least.argmin())
        other = int(nearest[page])
        if not np.isfinite(least[page]):
            break
        pairs.append((page, other))
        counts[other] += counts[page]
        near[page], near[:, page] = np.inf, np.inf
        full = counts + counts[other] > max_aliases
        near[full, other], near[other, full] = np.inf, np.inf
        changed = np.flatnonzero((nearest == page) | (nearest == other))
        changed = np.union1d(changed, [page, other])
        nearest[changed] = near[changed].argmin(1)
        least[changed] = near[changed, nearest[changed]]
    return pairs
