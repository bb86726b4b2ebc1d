"""V of a page wherever a backend puts it: numbers that name their own places are written, and where they land is kept.

The CPU backend packs what it keeps by instruction set; AMX interleaves rows, for one. A packing moves numbers and does
not change them, and it is the same in every block. So before anybody is served one block is filled by the backend's
own operator, K with zeros and V with the digits of an index, and read back as it lies in memory: where the index of a
number is found, that number is found in every other block.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trtllm_memshare.vllm.cache_elements import element_type, elements, write_elements


class PlacedValues:
    """Reads V of one layer's pages out of vLLM's cache.

    Args:
      layer: vLLM's attention layer, its cache in place, whose first axis is blocks.
      block_size: tokens of the scheduler's blocks; a backend may have cut each into several of its own.
      num_blocks: of the scheduler's pool.
      spare_block: for trials, see ``trial_block``; it is overwritten.

    Raises:
      ValueError: the cache is not one tensor of blocks, or V is not found whole and unchanged in it.
    """

    def __init__(self, layer: Any, block_size: int, num_blocks: int, spare_block: int) -> None:
        self._layer, self._cache = layer, layer.kv_cache
        shape = list(getattr(self._cache, "shape", ()))
        if not shape or shape[0] % num_blocks:
            raise ValueError(f"a layer's cache must be one tensor of {num_blocks} blocks, got {shape}")
        self._parts = torch.arange(shape[0] // num_blocks, device=self._cache.device)
        self._places = self._find(layer, block_size, spare_block)

    def of_blocks(self, block_ids: torch.Tensor) -> torch.Tensor:
        """V of blocks (int64 ``[n]``), as elements: ``[n, KV heads, tokens, head size]``, a copy."""
        return elements(self._layer, self._raw(block_ids)[:, self._places])

    def _own(self, block_ids: torch.Tensor) -> torch.Tensor:
        """The backend's blocks of the scheduler's."""
        return (block_ids.to(self._cache.device)[:, None] * len(self._parts) + self._parts).flatten()

    def _raw(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Blocks as they lie in memory, K and V, ``[n, numbers]``."""
        own = self._cache[self._own(block_ids)]
        return own.view(len(block_ids), len(self._parts), *own.shape[1:]).flatten(1)

    def _find(self, layer: Any, block_size: int, block: int) -> torch.Tensor:
        """Place of each number in a block, int64 ``[KV heads, tokens, head size]``."""
        device = self._cache.device
        coarsest = max(torch.finfo(dtype).eps for dtype in (element_type(layer), layer.dtype))
        base = int(2 / coarsest)  # whole numbers up to it are exact
        shape = (block_size, layer.num_kv_heads, layer.head_size)
        index = torch.arange(math.prod(shape), device=device)
        slots = torch.arange(block * block_size, (block + 1) * block_size, device=device)
        block_ids = torch.tensor([block], device=device)
        self._cache[self._own(block_ids)] = 0
        # A digit is written one too high, so that it differs from the zeros of K.
        units = [base**digit for digit in range(math.ceil(math.log(len(index), base)))]
        found = torch.full_like(self._raw(block_ids)[0], -sum(units), dtype=torch.int64)
        for unit in units:
            digits = (index // unit % base + 1).view(shape)
            write_elements(layer, torch.zeros_like(digits), digits, slots)
            found += unit * elements(layer, self._raw(block_ids)[0]).float().long()
        places = (found >= 0).nonzero()[:, 0]
        order = found[places].argsort()
        if not torch.equal(found[places][order], index):
            raise ValueError(f"{len(index)} numbers of V must lie unchanged in a block, found {len(places)} or others")
        return places[order].view(shape).transpose(0, 1)
