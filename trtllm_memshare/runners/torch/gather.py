"""Copies pages out of the pool for PyTorch's attention, on a CPU into memory that is used again and again.

A fresh tensor of some megabytes costs more on a CPU than filling it: the allocator gives such memory back to the
system, and the system clears it anew in each layer of each step.
"""

from __future__ import annotations

import torch

GATHERED_BYTES = 2**21
"""K and V that one call of attention reads on a CPU, about: they are still in its cache when attention reads them."""


class PageGather:
    """Reads head units of a pool, see ``plan``.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      compute_dtype: of what is read.

    Attributes:
      pages_per_call: pages that one call of attention should read at most; None = any number.
    """

    def __init__(self, pool: torch.Tensor, compute_dtype: torch.dtype) -> None:
        _, _, _, num_kv_heads, tokens_per_block, self._head_dim = pool.shape
        self._units_per_layer = 2 * num_kv_heads
        self._head_units = pool.view(-1, tokens_per_block * self._head_dim)
        self._dtype = compute_dtype
        page_bytes = self._units_per_layer * tokens_per_block * self._head_dim * pool.element_size()
        on_cpu = pool.device.type == "cpu"
        self.pages_per_call = max(1, GATHERED_BYTES // page_bytes) if on_cpu else None
        self._kept = [self._head_units.new_empty(0) for _ in range(2)] if on_cpu else None

    def keys_and_values(self, head_units: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, good until the next call.

        Args:
          head_units: int64 ``[2, ..., heads, blocks]`` of layer 0, K then V.

        Returns:
          Twice ``[..., heads, blocks * tokens_per_block, head_dim]``.
        """
        key, value = (self._read(units, field, layer) for field, units in enumerate(head_units))
        return key, value

    def _read(self, head_units: torch.Tensor, field: int, layer: int) -> torch.Tensor:
        index = (head_units + layer * self._units_per_layer).view(-1)
        if self._kept is None:
            states = self._head_units.index_select(0, index)
        else:
            needed = len(index) * self._head_units.shape[1]
            if len(self._kept[field]) < needed:
                self._kept[field] = self._head_units.new_empty(needed)
            states = self._kept[field][:needed].view(len(index), -1)
            torch.index_select(self._head_units, 0, index, out=states)
        return states.view(*head_units.shape[:-1], -1, self._head_dim).to(self._dtype)
