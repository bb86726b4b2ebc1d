"""K and V of whole pages in vLLM's own cache, compared with one another.

A distance of two pages does not ask how their numbers are ordered inside a block, as long as all blocks are ordered
alike and K is told from V. vLLM's backends see a layer's cache as ``[blocks, KV heads, tokens, 2 * head size]``.
On GPUs K is the first half of the last dimension. On a CPU it is the first half of a head's rows, in an order that
depends on the instruction set::

    GPU   token 0: K V              CPU   seen as [blocks, KV heads, 2 * tokens, head size]
          token 1: K V                    rows 0 .. tokens - 1: K, the rest: V

Nothing promises either. So a start writes pages through the backend's own operator: what their distances come to
decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.nearest_page import distances_of_layers
from trtllm_memshare.vllm.cache_elements import elements, rounded, write_elements

Halves = tuple[torch.Tensor, torch.Tensor]
Split = Callable[[torch.Tensor], Halves]
"""K and V of blocks that were read out of a layer's cache, in any order of their numbers."""

_ERROR = 1e-3  # of a distance; halves that mix K and V are a tenth off and more
_NEAR, _FAR = 0.1, 1.0
_PAGES = 64  # that are read at a time: vLLM has planned its memory without them


def split_last(blocks: torch.Tensor) -> Halves:
    """As backends for GPUs have them. ``blocks``: ``[n, KV heads, tokens, 2 * head size]``."""
    first, second = blocks.chunk(2, dim=3)
    return first, second


def split_rows(blocks: torch.Tensor) -> Halves:
    """As the CPU's backend has them: each head's first half of memory, and its second."""
    first, second = blocks.flatten(2).chunk(2, dim=2)
    return first, second


class CachePages:
    """Pages of vLLM's pool.

    Args:
      layers: vLLM's attention layers, first to last, caches in place.
      block_size: tokens of the scheduler's blocks; a backend may have cut each into several of its own.
      split: how K and V lie in a block.

    Raises:
      ValueError: a cache of another form.
    """

    def __init__(self, layers: list[Any], block_size: int, split: Split) -> None:
        self._layers, self._split = layers, split
        for layer in layers:
            shape, heads, dim = list(getattr(layer.kv_cache, "shape", ())), layer.num_kv_heads, layer.head_size
            if len(shape) != 4 or (shape[1], shape[3]) != (heads, 2 * dim):
                raise ValueError(f"a layer's cache must be [blocks, {heads}, tokens, {2 * dim}], got {shape}")
        cache = layers[0].kv_cache
        self._parts = torch.arange(block_size // cache.shape[2], device=cache.device)

    @torch.inference_mode()
    def distances(self, new_blocks: list[int], old_blocks: list[int]) -> np.ndarray:
        """Distance of each new block to each old one, float32 ``[n, m]``; see ``search.nearest_page``."""
        device = self._parts.device
        new, old = (torch.tensor(blocks, dtype=torch.int64, device=device) for blocks in (new_blocks, old_blocks))
        rows = [
            torch.cat(
                [distances_of_layers(self.read, len(self._layers), some, others) for others in old.split(_PAGES)], 1
            )
            for some in new.split(_PAGES)
        ]
        return torch.cat(rows).cpu().numpy() if len(new) and len(old) else np.zeros((len(new), len(old)), np.float32)

    def read(self, layer: int, blocks: torch.Tensor) -> Halves:
        """Elements of K and V of blocks, int64 ``[n]``, in one layer: float32 ``[n, width]`` each."""
        own = (blocks[:, None] * len(self._parts) + self._parts).flatten()
        there = elements(self._layers[layer], self._layers[layer].kv_cache[own])
        key, value = (half.reshape(len(blocks), -1).float() for half in self._split(there))
        return key, value


def open_cache_pages(layers: list[Any], block_size: int, spare_block: int) -> CachePages:
    """The pages of this worker's cache, in the order in which its backend keeps them.

    Args:
      layers: vLLM's attention layers, first to last, caches in place.
      spare_block: for trials, see ``trial_block``; it is overwritten.

    Raises:
      UserError: distances of pages that were written are not those that are read.
    """
    try:
        splits: tuple[Split, ...] = (split_last, split_rows)
        found = {split: CachePages(layers, block_size, split) for split in splits}
        errors = _errors(layers, found, block_size, spare_block)
    except ValueError as error:
        raise UserError(
            f"need nearest-earlier compares pages in vLLM's cache, but {error} (take redundancy)"
        ) from error
    best = min(errors, key=lambda split: errors[split])
    if not errors[best] < _ERROR:
        raise UserError(
            f"need nearest-earlier compares pages in vLLM's cache, but distances read there are not those of what was "
            f"written, by {errors[best]:.2g} (take redundancy)"
        )
    return found[best]


def _errors(layers: list[Any], found: dict[Split, CachePages], block_size: int, block: int) -> dict[Split, float]:
    """How far each one's distances are from those of pages that are written into one block, one after the other.

    Of the pages, the second is near the first in K and far in V, the third near it in V and far in K.
    """
    generator = torch.Generator().manual_seed(0)
    written: list[list[Halves]] = []
    read: dict[Split, list[list[Halves]]] = {split: [] for split in found}
    cache = layers[0].kv_cache
    blocks = torch.tensor([block], device=cache.device)
    slots = torch.arange(block * block_size, (block + 1) * block_size, device=cache.device)
    shape = (2, len(layers), block_size, layers[0].num_kv_heads, layers[0].head_size)
    first = torch.randn(shape, generator=generator)
    for far in (0.0, _NEAR), (_NEAR, _FAR), (_FAR, _NEAR):
        noise = torch.randn(shape, generator=generator)
        page = rounded(layers[0], first + torch.tensor(far).view(2, 1, 1, 1, 1) * noise)
        for index, layer in enumerate(layers):
            write_elements(layer, page[0, index], page[1, index], slots)
        written.append([(page[0, i][None], page[1, i][None]) for i in range(len(layers))])
        for split, pages in found.items():
            read[split].append([pages.read(i, blocks) for i in range(len(layers))])
    expected = _between(written)
    # A page's distance to itself is a rounding error, however it is read.
    return {split: float((_between(pages) - expected).fill_diagonal_(0).abs().max()) for split, pages in read.items()}


def _between(pages: list[list[Halves]]) -> torch.Tensor:
    """Distances of pages, each a K and a V of every layer: float32 ``[n, n]``."""

    def rows(layer: int, chosen: torch.Tensor) -> Halves:
        key, value = (
            torch.cat([pages[i][layer][field].float().flatten(1) for i in chosen.tolist()]) for field in (0, 1)
        )
        return key, value

    every = torch.arange(len(pages), device=pages[0][0][0].device)
    return distances_of_layers(rows, len(pages[0]), every, every)
