"""Stage 1's candidates and stage 2's comparison, over the pages where they lie now."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.block_search import BlockSearch, Distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.policy import make_pairs
from trtllm_memshare.search.types import Candidate, PairBatch
from trtllm_memshare.trtllm.pytorch.requests import KnownRequests
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap

Pending = tuple[list[Candidate], Distances | None]
"""Candidates of a search, and their distances, perhaps still on their way; None where nothing is compared."""


class Searcher:
    """Searches for one manager.

    Args:
      manager: this project's, over virtual blocks.
      requests: what is known of TensorRT-LLM's.
      search: compares rows of the pool.
      tail: knows the requests' lists.
      config: settings of the search.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        requests: KnownRequests,
        search: BlockSearch,
        tail: TailSwap,
        config: MemShareConfig,
    ) -> None:
        self._manager, self._requests, self._search, self._tail = manager, requests, search, tail
        self._config, self._size = config, manager.tokens_per_block
        self._page_of = np.zeros(manager.pool.num_blocks, np.int32)  # scratch: virtual block -> page

    def start(self, active: Container[int]) -> Pending:
        """Begins a search over requests of this iteration."""
        candidates = self.only_active(self._manager.candidates(), active)
        if not candidates or self._config.accept_all:
            return candidates, None
        return candidates, self._search.compare(self._physical_pairs(candidates))

    def only_active(self, candidates: list[Candidate], active: Container[int]) -> list[Candidate]:
        """Those of requests in this iteration; the others are offered again.

        V2 keeps suspended requests, whose pages are nowhere on the device. A request whose newest tokens found no room
        in our tables waits until they do.
        """
        kept = []
        for candidate in candidates:
            known = self._requests.get(candidate.request_id)
            if candidate.request_id in active and known is not None and not known.is_behind:
                kept.append(candidate)
            else:
                self._manager.offer_again(candidate)
        return kept

    def _physical_pairs(self, candidates: list[Candidate]) -> PairBatch:
        """Stage 2's input in rows of the pool: virtual blocks are looked up in the requests' lists."""
        pool, size, page_of = self._manager.pool, self._size, self._page_of
        pairs = make_pairs(candidates, pool.origin_position, size, self._config.undo_rope)
        lists: dict[int, np.ndarray] = {}
        for candidate in candidates:
            request_id = candidate.request_id
            if request_id not in lists:
                known = self._requests[request_id]
                pages = self._tail.synchronise(known)
                lists[request_id] = np.array(pages, np.int32)[np.array(known.pages.position)]
            blocks = np.append(candidate.kept_rows // size, candidate.block)
            page_of[blocks] = lists[request_id][pool.origin_position[blocks] // size]
        new_rows, old_rows = (page_of[r // size] * size + r % size for r in (pairs.new_rows, pairs.old_rows))
        return PairBatch(new_rows, old_rows, pairs.position_delta, pairs.undo_rope)
