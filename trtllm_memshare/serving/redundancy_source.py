"""Redundancy of pages for our own executor: how closely each token is met by a later one that the request still has.

Signatures are V of three layers, which carries no rotation to undo. Pages are looked at when pressure asks, and once
each, so a pool with room costs nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.page_signer import make_page_signer
from trtllm_memshare.search.signatures import SignatureIndex, make_projection

_PAGES_AT_ONCE = 256


class ValueRedundancy:
    """Of the generated pages of every request in flight.

    Args:
      manager: the cache, read only.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the runner's.
    """

    def __init__(self, manager: KVCacheManager, pool: torch.Tensor) -> None:
        self._manager = manager
        projection = make_projection(pool.shape[1], pool.shape[3], pool.shape[5])
        self._signer = make_page_signer(pool, torch.empty(0), projection)  # V has no rotation to undo
        self._indexes: dict[int, SignatureIndex] = {}

    def catch_up(self, request_ids: list[int]) -> None:
        """See ``RedundancySource``; reads what was filled since, for all requests together."""
        blocks, owners = list[int](), list[tuple[int, int]]()
        for request_id in request_ids:
            first, full, table = self._manager.generated_pages(request_id)
            index = self._indexes.setdefault(request_id, SignatureIndex(self._manager.tokens_per_block))
            for page in range(max(first, index.num_pages), full):
                blocks.append(int(table[page]))
                owners.append((request_id, page))
        for start in range(0, len(blocks), _PAGES_AT_ONCE):
            stop = start + _PAGES_AT_ONCE
            signatures = self._signatures(blocks[start:stop])
            for (request_id, page), of_page in zip(owners[start:stop], signatures, strict=True):
                self._indexes[request_id].append(page, of_page)

    def redundancy(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """See ``RedundancySource``."""
        return self._indexes[request_id].redundancy()[pages]

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """See ``RedundancySource``."""
        self._indexes[request_id].forget(pages)

    def forget(self, request_id: int) -> None:
        """See ``RedundancySource``."""
        self._indexes.pop(request_id, None)

    @torch.inference_mode()
    def _signatures(self, blocks: list[int]) -> np.ndarray:
        index = torch.tensor(blocks, dtype=torch.int32)
        return self._signer.page_signatures(index, torch.zeros_like(index)).cpu().numpy()


def open_redundancy(manager: KVCacheManager, runner: Runner) -> ValueRedundancy:
    """The source for a runner.

    Raises:
      UserError: the runner does not show its pool.
    """
    pool = getattr(runner, "pool", None)
    if not isinstance(pool, torch.Tensor):
        raise UserError(
            "this need reads the redundancy of pages, got a runner that does not show its pool (use the torch runner, "
            "or set need=age, need=random or need=surprisal)"
        )
    return ValueRedundancy(manager, pool)
