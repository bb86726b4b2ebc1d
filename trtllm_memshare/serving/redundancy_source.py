"""Redundancy of pages for our own executor: how closely each token is met by a later resident one of the same request.

By signatures of V of three layers (``search.signatures``): no rotation to undo, and read once, when pressure asks.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.null_pages import is_null
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.signatures import SignatureIndex, make_projection, page_signatures

_PAGES_AT_ONCE = 256


class ValueRedundancy:
    """Of the generated pages of every request in flight.

    Args:
      manager: the cache, read only.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the runner's.
    """

    def __init__(self, manager: KVCacheManager, pool: torch.Tensor) -> None:
        self._manager, self._pool = manager, pool
        self._projection = make_projection(pool.shape[1], pool.shape[3], pool.shape[5])
        self._requests: dict[int, SignatureIndex] = {}

    def catch_up(self, request_ids: list[int]) -> None:
        """See ``RedundancySource``; reads what was filled since, for all requests together."""
        blocks, places = list[int](), list[tuple[SignatureIndex, int]]()
        for request_id in request_ids:
            first, full, table = self._manager.generated_pages(request_id)
            index = self._requests.setdefault(request_id, SignatureIndex(self._manager.tokens_per_block))
            gone = is_null(table[:full], self._manager.pool)
            index.forget(np.flatnonzero(gone))
            pages = np.arange(max(first, index.num_pages), full)
            pages = pages[~gone[pages]]
            blocks += table[pages].tolist()
            places += [(index, page) for page in pages.tolist()]
        for start in range(0, len(blocks), _PAGES_AT_ONCE):
            stop = start + _PAGES_AT_ONCE
            for (index, page), signatures in zip(places[start:stop], self._signatures(blocks[start:stop]), strict=True):
                index.append(page, signatures)

    def redundancy(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """See ``RedundancySource``."""
        return self._requests[request_id].redundancy()[pages]

    def forget(self, request_id: int) -> None:
        """See ``RedundancySource``."""
        self._requests.pop(request_id, None)

    @torch.inference_mode()
    def _signatures(self, blocks: list[int]) -> np.ndarray:
        """float32 ``[len(blocks), tokens_per_block, width]``."""
        index, none = torch.tensor(blocks), torch.zeros(0)  # V has no rotation to undo
        return page_signatures(self._pool, index, none, none, self._projection).cpu().numpy()


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
