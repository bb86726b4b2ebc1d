"""Which pages are given up when TensorRT-LLM's pool runs short, before its scheduler pauses or suspends anybody.

The scheduler has chosen this iteration's requests when ``prepare_resources`` is called, so what is freed here is for
the next one. Nothing is looked at while use stays below the high watermark. Above it, pages over all requests go until
the low one: exact repeats first, then those needed least, of these none below a request's floor (``search.pressure``).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.sequence import GivablePages
from trtllm_memshare.cache.stand_ins import NO_DONORS
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.floors import blocks_at_floors, most_protected
from trtllm_memshare.search.nearest_earlier import NearestEarlier
from trtllm_memshare.search.need import PageFacts, find_need, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.trtllm.pytorch.admission import AdmissionReserve
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.pressure_stats import PressureStats
from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy
from trtllm_memshare.trtllm.pytorch.requests import KnownRequest, KnownRequests
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap

_FEWEST = 4  # pages that are worth looking for while nobody would be paused
_length = attrgetter("max_beam_num_tokens")

Choice = list[tuple[int, list[int], Mapping[int, int]]]
"""Request, logical pages that it gives up, and the earlier page that is read in place of each that has one."""


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
      stats: counts, and when pressure began and ended.
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
        self._marks, self._wishes = Watermarks(config.high_watermark, config.low_watermark), requests.wishes
        self._need = find_need(config.need)
        self._redundancy = Redundancy(backend.pool) if "redundancy" in self._need.facts else None
        compares = "distance" in self._need.facts
        self._earlier = NearestEarlier(self, backend.pool, config.max_aliases) if compares else None
        self._draw = np.random.default_rng(config.control_seed).random(backend.max_blocks_per_seq).astype(np.float32)
        self._size = manager.tokens_per_block
        self.stats = PressureStats(self._num_pages, config.low_watermark)
        # Of this iteration's requests, unshared ones too: tokens, prompt tokens, share of its pages that each keeps.
        self._active: Mapping[int, Any] = {}
        self._lengths = self._prompts = np.zeros(0, np.int64)
        self._kept = np.zeros(0)
        self._floor_blocks: int | None = None  # what these hold at their floors
        self._has_given = False  # somebody has given pages up
        self._num_passed = 0  # times that nobody was looked at since all were at their floors
        self._found_too_few = False  # the last look, and only who is short may have a page that finds no donor

    def begin(self, active: Mapping[int, Any]) -> None:
        """Takes the requests of this iteration that generate, by id.

        What each wishes is read when others run: the same object means that they are the same.
        """
        self._lengths = np.fromiter(map(_length, active.values()), np.int64, len(active))
        self._floor_blocks = None
        if active is not self._active:
            count, self._active = len(active), active
            prompt = attrgetter("orig_prompt_len" if self._backend.protects_prompt_only else "prompt_len")
            self._prompts = np.fromiter(map(prompt, active.values()), np.int64, count)
            self._kept = np.fromiter(map(self._min_kept, active.values()), np.float64, count)
            for request_id in active if self._paused else ():
                self._paused.pop(request_id, None)

    def choose(self, horizon: int) -> Choice:
        """Pages to give up now; empty below the high watermark.

        Args:
          horizon: iterations after this one for which there must be room.
        """
        # Who opens a page in this iteration or the next ones. With n tokens known to the host, a request opens one when
        # n - 1 fill their pages, or n with the overlap scheduler: both are counted.
        wanted = self._num_wanted(horizon + 1)
        held = 0 if self._reserve is None else self._reserve.num_held
        used = self._num_pages - self._backend.num_free_pages() - held
        self.stats.look(used, horizon)
        if self.stats.is_look_due():
            self._look_for_avoided(used + wanted)
        count = self._marks.pages_to_free(used, wanted, self._num_pages)
        if self._paused and not count:
            # The next one to come back fits beside the floors of those that run: they make room for it.
            need = wanted + next(iter(self._paused.values()))
            if need <= self._allowed():
                count = max(0, need - (self._num_pages - used))
        self._found_too_few &= count > 0
        is_short = wanted > self._num_pages - used  # somebody would be paused
        if not count or not (
            is_short
            or (used - self._floors() >= min(count, _FEWEST) and not self._found_too_few)
            or self._is_look_for_repeats_due()
        ):
            return []  # all are at their floors, or nearly: a page here and there would be had in every iteration
        views = self._views(count, is_short)
        chosen = choose_pages(views, count, self._config.spread)
        self._has_given |= bool(chosen)
        self._found_too_few = self._earlier is not None and sum(len(pages) for _, pages in chosen) < count
        if self._config.shares:
            self.stats.count(views, chosen, used)
        return [(request_id, pages.tolist(), self._donors(request_id, pages)) for request_id, pages in chosen]

    def generated_pages(self, request_id: int) -> tuple[int, int, np.ndarray]:
        """See ``search.nearest_earlier.KnowsPages``: blocks of TensorRT-LLM's pool, -1 where a page was given up."""
        known = self._requests[request_id]
        listed = np.array(self._tail.synchronise(known), np.int64)
        first, full, _ = self._manager.generated_pages(request_id)
        position = np.array(known.pages.position, np.int64)
        return first, full, np.where(position >= 0, listed[position], -1)

    def admit(self, num_incoming: int) -> None:
        """Lets TensorRT-LLM's scheduler see as many free pages as may be taken until it is asked again.

        Args:
          num_incoming: pages that prompts of this iteration are about to take.
        """
        if self._reserve is None:
            return
        free = self._backend.num_free_pages() + self._reserve.num_held
        allowed = self._allowed() - num_incoming
        # Without a request that could give pages up nobody would ever come in by them.
        is_needed = any(True for _ in self._requests)
        self._reserve.hold(free - num_incoming - self._num_wanted(2) - max(0, allowed) if is_needed else 0)

    def num_at_floor(self) -> int:
        """Requests that gave pages up and may give up no more at present."""
        count = 0
        for known in self._requests:
            generated, retired = self._manager.page_counts(known.request_id)
            count += retired > 0 and floor_room(generated, retired, self._wishes.min_kept(known.request)) == 0
        return count

    def release(self) -> None:
        """Holds nothing any more."""
        if self._reserve is not None:
            self._reserve.hold(0)

    def _min_kept(self, request: Any) -> float:
        """Share of its pages that a request keeps; all where it runs unshared."""
        return 1.0 if self._requests.get(request.py_request_id) is None else self._wishes.min_kept(request)

    def _num_wanted(self, num_tokens: int) -> int:
        """Requests that open a page with one of their next tokens."""
        return int(((1 - self._lengths) % self._size <= num_tokens).sum())

    def _allowed(self) -> int:
        """Pages that would be left below the high watermark if all running requests were at their floors."""
        return int(self._config.high_watermark * self._num_pages) - self._floors()

    def _floors(self) -> int:
        if self._floor_blocks is None:
            # One token more than now: a request whose pages are full writes into a new one next.
            protected = most_protected(self._config)
            known = map(self._requests.get, self._active) if self._has_given else ()
            gone = np.array([0 if k is None else k.pages.num_given_up for k in known] or 0)
            self._floor_blocks = blocks_at_floors(
                self._lengths + 1, self._prompts, self._kept, protected, self._size, gone
            )
        return self._floor_blocks

    def _is_look_for_repeats_due(self) -> bool:
        """Pages that stand again may go at any floor. There can be new ones once requests have filled a page."""
        self._num_passed = (self._num_passed + 1) % self._size
        return not self._num_passed

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
            if self._earlier is not None:  # one that is paused gives up the same pages for the same donors again
                self._earlier.forget(request_id)
        if not was_known:
            return
        if self._redundancy is not None:
            self._redundancy.forget(request_id)
        if getattr(request.state, "name", "") != "GENERATION_COMPLETE":
            self._paused[request_id] = request.max_beam_num_tokens // self._size + 2
        if is_last:  # nobody runs: the scheduler may have anything
            self.begin({})
            self.stats.end()
            self.release()

    def _look_for_avoided(self, num_needed: int) -> None:
        known = [k for i in self._active if (k := self._requests.get(i)) is not None]
        pages = dict(zip(self._active, (-(-self._lengths // self._size)).tolist(), strict=True))
        self.stats.look_for_avoided(num_needed, [k.pages.num_given_up for k in known], pages)

    def _donors(self, request_id: int, pages: np.ndarray) -> Mapping[int, int]:
        """Who is read in place of pages that go now."""
        if self._earlier is None:
            return NO_DONORS
        donors = self._earlier.donors(request_id)
        if self._config.shares:
            self._earlier.retired(request_id, pages)
        if self._config.retired_becomes != "alias":
            return NO_DONORS
        gone = set(pages.tolist())
        return {page: donor for page, donor in donors.items() if page in gone}

    def _views(self, count: int, is_short: bool) -> list[PressureView]:
        """What each request could give up, of those that have something.

        Args:
          count: most pages that go now.
          is_short: somebody would be paused; else pages of infinite need stay.
        """
        found = list[tuple[KnownRequest, GivablePages, int]]()
        for request in self._active.values():
            known = self._requests.get(request.py_request_id)
            if known is None or known.is_behind or self._wishes.keeps_whole(request):
                continue
            givable = self._manager.givable_pages(known.request_id, self._need.finds_repeats)
            room = floor_room(givable.num_generated, givable.num_retired, self._wishes.min_kept(request))
            if givable.most(room):
                found.append((known, givable, room))
        if self._redundancy is not None:
            self._redundancy.catch_up([self._where(known) for known, *_ in found])
        if self._earlier is not None:
            self._earlier.catch_up([known.request_id for known, *_ in found])
        views = list[PressureView]()
        for known, givable, room in found:
            request_id, pages = known.request_id, givable.pages
            redundancy = None if self._redundancy is None else self._redundancy.measure(request_id, pages)
            distance = None
            if self._earlier is not None:
                distance = self._earlier.measure(request_id, pages, min(givable.most(room), count))
            facts = PageFacts(pages, redundancy=redundancy, draw=self._draw[pages], distance=distance)
            need = page_need(self._config.need, facts)
            room = room if is_short else min(room, int((~np.isposinf(need)).sum()))
            views.append(PressureView(request_id, pages, need, givable.repeated, room))
        return views

    def _where(self, known: KnownRequest) -> tuple[int, int, np.ndarray]:
        """A request, its first generated page, and where its full ones from there on lie; -1 = given up."""
        first, full, blocks = self.generated_pages(known.request_id)
        return known.request_id, first, blocks[first:full]
