"""The two KV cache managers of TensorRT-LLM behind one protocol: pages, tail, pool."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trtllm_memshare.errors import UserError

_DTYPES = {"FP8": torch.float8_e4m3fn, "INT8": torch.int8}  # pools that arrive as plain bytes


class CacheBackend(Protocol):
    """The calls that differ between TensorRT-LLM's KV cache managers.

    Attributes:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the live pool.
      max_blocks_per_seq: entries of a row of the block table.
      max_batch_size: most requests at once.
      max_held_blocks: most blocks that requests hold at once, each counted for whoever reads it, wherever it lies.
      protects_prompt_only: False when a request that was computed anew may not be cut below its old tokens: they are
        history (V2), or their pages may be known to the reuse tree (V1).
    """

    pool: torch.Tensor
    max_blocks_per_seq: int
    max_batch_size: int
    max_held_blocks: int
    protects_prompt_only: bool

    def pages(self, request_id: int) -> list[int]:
        """The request's list: indices into the pool."""

    def shrink(self, request_id: int, num_pages: int) -> None:
        """Frees the last pages of the list; the manager's token count falls by whole blocks."""

    def num_free_pages(self) -> int:
        """Pages that the manager could hand out now."""

    def is_suspended(self, request_id: int) -> bool:
        """Whether the manager keeps a request without holding its pages on the device."""

    def entries(self, request_id: int, count: int) -> torch.Tensor:
        """What the block table holds for a request's first pages, int32 ``[num_pools, 2, count]``, pool's device.

        Writes no row that the manager owns.
        """


class _Backend:
    """What both have in common. Reads the manager's geometry once."""

    protects_prompt_only: bool
    pool: torch.Tensor

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.max_blocks_per_seq = int(manager.max_blocks_per_seq)
        self.max_batch_size = int(manager.max_batch_size)

    def _max_held(self, pools: int) -> int:
        """What so many pools would hold, and no more than all requests at their full length."""
        return min(pools * self.pool.shape[0], self.max_batch_size * self.max_blocks_per_seq)

    def _shape(self, num_blocks: int) -> tuple[int, ...]:
        m = self._manager
        return (num_blocks, m.num_local_layers, 2, m.num_kv_heads_per_layer[0], m.tokens_per_block, m.head_dim)


class V1Backend(_Backend):
    """The C++ ``KVCacheManager``; ``rewind_kv_cache`` drops tokens from the end (TensorRT-LLM 1.0 to now)."""

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        pool = manager.get_unique_primary_pool()
        shape = self._shape(pool.shape[0])
        # [blocks, layers, 2, elements of a block]: heads before tokens, as TensorRT-LLM's kernels store them.
        if tuple(pool.shape[:3]) != shape[:3] or pool.numel() != torch.Size(shape).numel():
            raise UserError(
                f"the KV pool must have the elements of [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, "
                f"head_dim] = {list(shape)}, got {list(pool.shape)} (this TensorRT-LLM lays its pool out differently)"
            )
        self.pool = _typed(pool, manager.dtype).view(shape)
        self.protects_prompt_only = not manager.enable_block_reuse
        # A page of the reuse tree is read by several requests.
        self.max_held_blocks = self._max_held(1 if self.protects_prompt_only else 4)

    def pages(self, request_id: int) -> list[int]:
        """See ``CacheBackend.pages``. A vector of C++ until 1.2: it equals no list, so it is copied into one."""
        return list(self._manager.get_batch_cache_indices([request_id])[0])

    def shrink(self, request_id: int, num_pages: int) -> None:
        """See ``CacheBackend.shrink``: as many tokens as the pages hold, so that the phase in a block stays."""
        self._manager.impl.rewind_kv_cache(request_id, num_pages * self._manager.tokens_per_block)

    def num_free_pages(self) -> int:
        """See ``CacheBackend.num_free_pages``."""
        return int(self._manager.get_num_free_blocks())

    def is_suspended(self, request_id: int) -> bool:
        """See ``CacheBackend.is_suspended``. A request that V1 pauses is freed."""
        return False

    def entries(self, request_id: int, count: int) -> torch.Tensor:
        """See ``CacheBackend.entries``: the C++ object fills any host tensor of the table's shape."""
        host = torch.zeros((self._manager.num_pools, 1, 2, self.max_blocks_per_seq), dtype=torch.int32)
        self._manager.impl.copy_batch_block_offsets(host, [request_id], 1, 0)
        return host[:, 0, :, :count].to(self.pool.device)


class V2Backend(_Backend):
    """``KVCacheManagerV2``; ``resize`` sets the capacity, never below what counts as history.

    Main's scheduler frees requests where suspending is not enough; their new prompt, old answer included, is history.
    """

    protects_prompt_only = False

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        layers = manager.num_local_layers
        offsets = manager.kv_cache_pool_mapping[:, 1].tolist()
        if offsets != list(range(layers)):
            raise UserError(
                f"the layers of a page must lie one behind the other, got offsets {offsets} (this TensorRT-LLM lays "
                f"its pool out differently)"
            )
        # The view of the first layer spans all: a page's index for one layer counts the pages of every layer.
        first = manager.get_buffers(manager.pp_layers[0], kv_layout="HND")
        if first.shape[0] % layers:
            raise UserError(f"the pool must hold {layers} layers a page, got {first.shape[0]} pages of one layer")
        self._layers = layers
        self.pool = _typed(first, manager.dtype).view(self._shape(first.shape[0] // layers))
        # Suspended requests keep blocks on the host, whose tier is as large as the pool unless it was set. One costs
        # our tables 22 bytes, and 4 more a token: there is room for a larger tier.
        self.max_held_blocks = self._max_held(4)

    def pages(self, request_id: int) -> list[int]:
        """See ``CacheBackend.pages``."""
        return [index // self._layers for index in self._manager.get_batch_cache_indices([request_id])[0]]

    def shrink(self, request_id: int, num_pages: int) -> None:
        """See ``CacheBackend.shrink``."""
        cache = self._manager.kv_cache_map[request_id]
        capacity = cache.capacity - num_pages * self._manager.tokens_per_block
        if cache.resize(capacity, None) is False:
            raise RuntimeError(f"request {request_id} could not be cut to {capacity} tokens, it has {cache.capacity}")

    def num_free_pages(self) -> int:
        """See ``CacheBackend.num_free_pages``. V2 answers ``get_num_free_blocks`` while it is empty only.

        Pages of suspended requests can go to the host, so those that run count alone; pages that two requests share
        through block reuse count twice.
        """
        size = self._manager.tokens_per_block
        used = sum(-(-c.capacity // size) for c in self._manager.kv_cache_map.values() if c.is_active)
        return max(0, self.pool.shape[0] - used)

    def is_suspended(self, request_id: int) -> bool:
        """See ``CacheBackend.is_suspended``."""
        cache = self._manager.kv_cache_map.get(request_id)
        return cache is not None and not cache.is_active

    def entries(self, request_id: int, count: int) -> torch.Tensor:
        """See ``CacheBackend.entries``: the manager's copy reads its rows and writes the tensor that it is given.

        The class's own, not the one that is shadowed: this is no table of a forward pass.
        """
        shape = (self._manager.num_pools, 1, 2, self.max_blocks_per_seq)
        table = torch.zeros(shape, dtype=torch.int32, device=self.pool.device)
        type(self._manager).copy_batch_block_offsets(self._manager, table, [request_id], 1, 0, 1)
        return table[:, 0, :, :count].clone()


def _typed(pool: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Gives a pool of bytes its element type; ``dtype``: TensorRT-LLM's ``DataType``."""
    target = _DTYPES.get(getattr(dtype, "name", ""))
    return pool.view(target) if target is not None and pool.dtype == torch.uint8 else pool
