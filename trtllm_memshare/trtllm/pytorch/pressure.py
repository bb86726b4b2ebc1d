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
from trtllm_memshare.search.floors import blocks_at_floors
from trtllm_memshare.search.need import PageFacts, find_need, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.trtllm.pytorch.admission import AdmissionReserve, lengths_of
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy
from trtllm_memshare.trtllm.pytorch.requests import KnownRequest, KnownRequests
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap
from trtllm_memshare.trtllm.pytorch.wishes import Wishes

_FEWEST = 4  # pages that are worth looking for

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
      reserve: holds pages so that TensorRT-LLM admits nobody who could not stay; None = it admits as it likes.

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
        reserve: AdmissionReserve | None = None,
    ) -> None:
        self._backend, self._manager, self._requests, self._tail = backend, manager, requests, tail
        self._config, self._num_pages, self._reserve = config, backend.pool.shape[0] - num_reserved, reserve
        self._paused: dict[int, int] = {}  # pages that paused requests need to come back
        self._marks, self._wishes = Watermarks(config.high_watermark, config.low_watermark), Wishes(config.min_kept)
        self._need = find_need(config.need)
        self._redundancy = Redundancy(backend.pool) if "redundancy" in self._need.facts else None
        self._draw = np.random.default_rng(config.control_seed).random(backend.max_blocks_per_seq).astype(np.float32)
        self._size = manager.tokens_per_block
        self.num_episodes = 0

    def choose(self, generation_requests: Sequence[Any], horizon: int) -> Choice:
        """Pages to give up now; empty below the high watermark.

        Args:
          generation_requests: of this iteration.
          horizon: iterations after this one for which there must be room.
        """
        lengths = lengths_of(generation_requests)
        # Who opens a page in this iteration or the next ones. With n tokens known to the host, a request opens one when
        # n - 1 fill their pages, or n with the overlap scheduler: both are counted.
        wanted = int(((1 - lengths) % self._size <= horizon + 1).sum())
        held = 0 if self._reserve is None else self._reserve.num_held
        used = self._num_pages - self._backend.num_free_pages() - held
        count = self._marks.pages_to_free(used, wanted, self._num_pages)
        if self._paused and not count:
            # The next one to come back fits beside the floors of those that run: they make room for it.
            need = wanted + next(iter(self._paused.values()))
            if need <= self._allowed(generation_requests, lengths):
                count = max(0, need - (self._num_pages - used))
        if not count or used - self._floors(generation_requests, lengths) < min(count, _FEWEST):
            return []  # all are at their floors, or nearly: a page here and there would be had in every iteration
        views = [v for v in map(self._view, generation_requests) if v is not None]
        chosen = choose_pages(views, count, self._config.spread)
        freed = sum(len(pages) for _, pages in chosen)
        self.num_episodes += freed > 0
        return [(request_id, pages.tolist()) for request_id, pages in chosen]

    def admit(self, generation_requests: Sequence[Any], num_incoming: int) -> None:
        """Lets TensorRT-LLM's scheduler see as many free pages as may be taken until it is asked again.

        Args:
          generation_requests: of this iteration.
          num_incoming: pages that prompts of this iteration are about to take.
        """
        if self._reserve is None:
            return
        lengths = lengths_of(generation_requests)
        wanted = int(((1 - lengths) % self._size <= 2).sum())
        free = self._backend.num_free_pages() + self._reserve.num_held
        allowed = self._allowed(generation_requests, lengths) - num_incoming
        self._reserve.hold(free - num_incoming - wanted - max(0, allowed) if len(lengths) else 0)

    def release(self) -> None:
        """Holds nothing any more."""
        if self._reserve is not None:
            self._reserve.hold(0)

    def _allowed(self, requests: Sequence[Any], lengths: np.ndarray) -> int:
        """Pages that would be left below the high watermark if all running requests were at their floors."""
        return int(self._config.high_watermark * self._num_pages) - self._floors(requests, lengths)

    def _floors(self, requests: Sequence[Any], lengths: np.ndarray) -> int:
        # One token more than now: a request whose pages are full writes into a new one next.
        prompts = np.fromiter((r.orig_prompt_len for r in requests), np.int64, len(requests))
        kept = np.fromiter(map(self._wishes.min_kept, requests), np.float64, len(requests))
        return blocks_at_floors(lengths + 1, prompts, kept, self._config.protected_tokens, self._size)

    def resume(self, generation_requests: Sequence[Any]) -> None:
        for request in generation_requests if self._paused else ():
            self._paused.pop(request.py_request_id, None)

    def forget(self, request: Any, was_known: bool, is_last: bool) -> None:
        """A request is freed; if it is only paused, TensorRT-LLM will compute it anew, all of it.

        Args:
          request: TensorRT-LLM's.
          was_known: it generated. One that waits to come back does not, and may be cancelled all the same.
          is_last: no request that generates is left.
        """
        request_id = request.py_request_id
        if getattr(request.state, "name", "") == "GENERATION_COMPLETE":
            self._paused.pop(request_id, None)
        if not was_known:
            return
        if self._redundancy is not None:
            self._redundancy.forget(request_id)
        if getattr(request.state, "name", "") != "GENERATION_COMPLETE":
            self._paused[request_id] = request.max_beam_num_tokens // self._size + 2
        if is_last:  # nobody runs: the scheduler may have anything
            self.release()

    def _view(self, request: Any) -> PressureView | None:
        known = self._requests.get(request.py_request_id)
        if known is None or known.is_behind:
            return None
        givable = self._manager.givable_pages(known.request_id)
        room = floor_room(givable.num_generated, givable.num_retired, self._wishes.min_kept(request))
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
