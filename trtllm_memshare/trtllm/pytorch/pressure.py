"""Which pages are given up when TensorRT-LLM's pool runs short, before its scheduler pauses or suspends anybody.

The scheduler has chosen this iteration's requests when ``prepare_resources`` is called, so what is freed here is for
the next one. Nothing is looked at while use stays below the high watermark. Above it, pages over all requests go until
the low one: exact repeats first, then those needed least, none below a request's floor (``search.pressure``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.need import PageFacts, find_need, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy
from trtllm_memshare.trtllm.pytorch.requests import KnownRequest, KnownRequests
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap

Choice = list[tuple[int, list[int]]]
"""Logical pages that each request gives up."""


class Pressure:
    """Chooses pages for one manager.

    Args:
      backend: of TensorRT-LLM's manager.
      manager: this project's, over virtual blocks.
      requests: what is known of TensorRT-LLM's.
      tail: knows the requests' lists.
      config: watermarks, floor, need.
      num_reserved: pages of the pool that are nobody's: the null pages.

    Attributes:
      num_episodes: times that pages were given up.
    """

    def __init__(
        self,
        backend: CacheBackend,
        manager: KVCacheManager,
        requests: KnownRequests,
        tail: TailSwap,
        config: MemShareConfig,
        num_reserved: int,
    ) -> None:
        self._backend, self._manager, self._requests, self._tail = backend, manager, requests, tail
        self._config, self._num_pages = config, backend.pool.shape[0] - num_reserved
        self._marks = Watermarks(config.high_watermark, config.low_watermark)
        self._need = find_need(config.need)
        self._redundancy = Redundancy(backend.pool) if "redundancy" in self._need.facts else None
        self._draw = np.random.default_rng(config.control_seed).random(backend.max_blocks_per_seq).astype(np.float32)
        self._size = manager.tokens_per_block
        self._rest_until = 0  # pages in use below which nobody is asked again: all were at their floors
        self.num_episodes = 0

    def choose(self, generation_requests: Sequence[Any], horizon: int) -> Choice:
        """Pages to give up now; empty below the high watermark.

        Args:
          generation_requests: of this iteration.
          horizon: iterations after this one for which there must be room.
        """
        lengths = np.fromiter((r.max_beam_num_tokens for r in generation_requests), np.int64, len(generation_requests))
        # Who opens a page in this iteration or the next ones. With n tokens known to the host, a request opens one when
        # n - 1 fill their pages, or n with the overlap scheduler: both are counted.
        wanted = int(((1 - lengths) % self._size <= horizon + 1).sum())
        used = self._num_pages - self._backend.num_free_pages()
        count = self._marks.pages_to_free(used, wanted, self._num_pages)
        if not count or used < self._rest_until:
            return []
        views = [v for v in map(self._view, generation_requests) if v is not None]
        chosen = choose_pages(views, count, self._config.spread)
        freed = sum(len(pages) for _, pages in chosen)
        self._rest_until = 0 if freed >= count else used - freed + max(1, wanted)
        self.num_episodes += freed > 0
        return [(request_id, pages.tolist()) for request_id, pages in chosen]

    def forget(self, request_id: int) -> None:
        if self._redundancy is not None:
            self._redundancy.forget(request_id)

    def min_kept(self, request: Any) -> float:
        """Share of its generated pages that a request keeps: its own wish, where its object carries one."""
        if getattr(request, "py_memshare", True) is False:
            return 1.0
        own = getattr(request, "py_memshare_min_kept", None)
        return self._config.min_kept if own is None else float(own)

    def _view(self, request: Any) -> PressureView | None:
        known = self._requests.get(request.py_request_id)
        if known is None or known.is_behind:
            return None
        givable = self._manager.givable_pages(known.request_id)
        room = floor_room(givable.num_generated, givable.num_retired, self.min_kept(request))
        room = min(room, len(givable.pages))
        if room <= 0:
            return None
        need = page_need(self._config.need, self._facts(known, givable.pages))
        return PressureView(known.request_id, givable.pages, need, givable.repeated, room)

    def _facts(self, known: KnownRequest, pages: np.ndarray) -> PageFacts:
        if self._redundancy is None:
            return PageFacts(position=pages, draw=self._draw[pages])
        listed = self._tail.synchronise(known)
        first, full, _ = self._manager.generated_pages(known.request_id)
        position = np.array(known.pages.position[first:full], np.int64)
        blocks = np.where(position >= 0, np.array(listed, np.int64)[position], -1)
        redundancy = self._redundancy.of(known.request_id, first, blocks, pages)
        return PageFacts(position=pages, redundancy=redundancy, draw=self._draw[pages])
