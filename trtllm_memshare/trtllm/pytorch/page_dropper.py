"""Drops the pages that are needed least by shortening sequences: what the second route (framework.py) does to pages.

Everything here is in the terms of TensorRT-LLM's framework for KV cache compression: pages are numbered as they lie,
what is kept moves to the front, and ``py_num_compressed_tokens`` says by how much a sequence is shorter.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtllm_memshare.search.need import PageFacts, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.trtllm.pytorch.backends import V2Backend
from trtllm_memshare.trtllm.pytorch.failures import Complaints, Failures
from trtllm_memshare.trtllm.pytorch.guards import disaggregated_kind
from trtllm_memshare.trtllm.pytorch.kill_switch import KillSwitch
from trtllm_memshare.trtllm.pytorch.pauses import Pauses
from trtllm_memshare.trtllm.pytorch.pressure_stats import PressureStats
from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy
from trtllm_memshare.trtllm.pytorch.settings import Settings
from trtllm_memshare.trtllm.pytorch.totals import NOTHING, Totals, page_bytes, pressure_totals
from trtllm_memshare.trtllm.pytorch.wishes import Wishes

log = logging.getLogger("trtllm_memshare")


class PageDropper:
    """Drops pages for one manager; raises nothing while serving.

    Args:
      manager: TensorRT-LLM's ``KVCacheManagerV2``, of one rank.
      settings: watermarks, floor, need, the file that stops dropping.

    Attributes:
      num_dropped: pages. ``num_shadowed``: pages that shadow would have dropped, each counted once.
      num_copies: pages that moved to the front. ``seconds``: host time spent.
      stats: of pressure. ``pauses``: suspended requests.
      failures: errors that were caught; after the first one nothing is dropped any more.
    """

    def __init__(self, manager: Any, settings: Settings) -> None:
        self._manager, self._config = manager, settings.memshare
        self._backend = V2Backend(manager)
        self._marks = Watermarks(self._config.high_watermark, self._config.low_watermark)
        self._redundancy = Redundancy(self._backend.pool) if "redundancy" in self._config.need else None
        self._draw = np.random.default_rng(self._config.control_seed).random(self._backend.max_blocks_per_seq)
        self._size, self._wishes = int(manager.tokens_per_block), Wishes(self._config.min_kept)
        self._switch, self._step = KillSwitch(settings.off_file), 0
        self._dropped: dict[int, list[int]] = {}  # by request: where pages went, as logical pages of the whole text
        self._done = torch.cuda.Event() if self._backend.pool.is_cuda else None
        self._shadowed: dict[int, set[int]] = {}  # by request: pages that were counted
        self.failures = Failures(f"{type(manager).__name__}, route framework")
        self.num_dropped = self.num_shadowed = self.num_copies = 0
        self.seconds = 0.0
        self.stats = PressureStats(self._backend.pool.shape[0], self._config.low_watermark)
        self.pauses = Pauses(self._backend.is_suspended)
        self._complaints = Complaints(settings.options.on_unsupported)
        self._running: dict[int, Any] = {}  # requests of the last iteration

    def end(self, generation_requests: Sequence[Any]) -> None:
        """Drops pages of the requests whose step has ended, if memory is short.

        With the overlap scheduler the next step runs already: it is on the stream before the moves, with the length of
        before, and its row lies in the page that moves last.
        """
        started = time.perf_counter()
        self._step += 1
        try:
            # The batch comes as it was scheduled, with those that have just been freed: nobody would forget them again.
            held = [r for r in generation_requests if r.py_request_id in self._manager.kv_cache_map]
            self._running = {r.py_request_id: r for r in held}
            self.pauses.look(self._running)
            if not (self.failures.is_off or self._switch.is_off(self._step)):
                self._relieve([r for r in held if self._may_shrink(r)])
        except Exception as error:  # TensorRT-LLM's loop would end with it
            self.failures.stop("a step of the compression route", error)
        self.seconds += time.perf_counter() - started

    def forget(self, request: Any) -> None:
        """Lets go of a request that ended, or that is computed anew, whose count nobody else resets."""
        request_id = request.py_request_id
        if self._dropped.pop(request_id, None):
            request.py_num_compressed_tokens = 0
        for kept in (self._shadowed, self._running):
            kept.pop(request_id, None)
        is_dummy = getattr(request, "is_dummy_request", False)
        self.pauses.freed(request_id, is_dummy or getattr(request.state, "name", "") == "GENERATION_COMPLETE")
        if self._redundancy is not None:
            self._redundancy.forget(request_id)
        if not self._running:
            self.stats.end()

    def totals(self) -> Totals:
        """See ``NOTHING``. Nothing is shared, searched or refused on this route, and nobody is computed anew."""
        size, retired_now = page_bytes(self._backend.pool), sum(map(len, self._dropped.values()))
        at_floor = sum(self._has_given(r) and self._room(r) == 0 for r in self._running.values())
        return {
            **NOTHING,
            "blocks_forgotten": self.num_dropped,
            "blocks_shadowed": self.num_shadowed,
            "pages_copied": self.num_copies,
            "saved_bytes": self.num_dropped * size,
            "errors": self.failures.num_errors,
            "requests_failed": self.failures.num_failed_requests,
            "host_seconds": self.seconds,
            "pauses": self.pauses.num,
            "retired_now": retired_now,
            "bytes_saved_now": retired_now * size,
            **pressure_totals(self.stats, 0, at_floor),
        }

    def log_totals(self) -> None:
        log.info(
            "MemShare dropped %d pages on route framework; shadow counted %d, %d errors were caught, %d requests ended "
            "alone",
            self.num_dropped,
            self.num_shadowed,
            self.failures.num_errors,
            self.failures.num_failed_requests,
        )

    def _may_shrink(self, request: Any) -> bool:
        kind = disaggregated_kind(request)
        if kind is not None:
            self._complaints.say(f"sharing excludes disaggregated serving, got a request of type {kind}")
            return False
        is_active = self._manager.kv_cache_map[request.py_request_id].is_active
        return is_active and getattr(request.state, "name", "") != "GENERATION_COMPLETE"

    def _relieve(self, requests: list[Any]) -> None:
        used = self._backend.pool.shape[0] - self._backend.num_free_pages()
        self.stats.look(used, 1)
        if self.stats.is_look_due():
            lengths = {r.py_request_id: -(-r.max_beam_num_tokens // self._size) for r in requests}
            given_up = [len(self._dropped.get(request_id, ())) for request_id in lengths]
            self.stats.look_for_avoided(used, given_up, lengths)
        count = self._marks.pages_to_free(used, len(requests), self._backend.pool.shape[0])
        if not count:
            return
        by_id = {r.py_request_id: r for r in requests}
        views = self._views(requests)
        choice = choose_pages(views, count, self._config.spread)
        if not self._config.shadow:
            self.stats.count(views, choice, used)
        for request_id, pages in choice:
            if self._config.shadow:
                self._count(request_id, pages.tolist())
                continue
            try:
                self._drop(by_id[request_id], pages.tolist())
            except Exception as error:  # its rows are moved in part, or its length is not what the manager holds
                self.failures.stop(f"dropping pages of request {request_id}", error)
                self.failures.end_requests([by_id[request_id]], str(error))
                return  # nothing of the others has changed yet

    def _span(self, request: Any) -> tuple[int, int, int]:
        """Generated pages as they lie now: the first, the end of the full ones, and how many were dropped before."""
        gone = len(self._dropped.get(request.py_request_id, ()))
        first = math.ceil(request.prompt_len / self._size)
        return first, max(first, self._num_resident(request, gone) // self._size), gone

    def _num_resident(self, request: Any, gone: int) -> int:
        """Rows written, the newest one excepted."""
        return int(request.max_beam_num_tokens) - 1 - gone * self._size

    def _has_given(self, request: Any) -> bool:
        return bool(self._dropped.get(request.py_request_id))

    def _room(self, request: Any) -> int:
        """Pages that a request may still give up for its floor's sake."""
        first, full, gone = self._span(request)
        return floor_room(full - first + gone, gone, self._wishes.min_kept(request))

    def _views(self, requests: list[Any]) -> list[PressureView]:
        """What each could give up. Pages are numbered as they lie now; those before the first generated one stay."""
        found, spans = list[tuple[int, np.ndarray, int]](), list[tuple[int, int, np.ndarray]]()
        for request in requests:
            request_id, (first, full, gone) = request.py_request_id, self._span(request)
            end = (self._num_resident(request, gone) - self._config.protected_tokens) // self._size
            pages = np.arange(first, max(first, end), dtype=np.int32)
            room = min(self._room(request), len(pages))
            if room > 0:
                found.append((request_id, pages, room))
                spans.append((request_id, first, np.array(self._backend.pages(request_id)[first:full])))
        if self._redundancy is not None:
            self._redundancy.catch_up(spans)
        views = list[PressureView]()
        for request_id, pages, room in found:
            redundancy = None if self._redundancy is None else self._redundancy.measure(request_id, pages)
            facts = PageFacts(position=pages, redundancy=redundancy, draw=self._draw[pages].astype(np.float32))
            need = page_need(self._config.need, facts)
            views.append(PressureView(request_id, pages, need, np.zeros(len(pages), bool), room))
        return views

    def _count(self, request_id: int, pages: list[int]) -> None:
        counted = self._shadowed.setdefault(request_id, set())
        self.num_shadowed += len(set(pages) - counted)
        counted.update(pages)

    def _drop(self, request: Any, pages: list[int]) -> None:
        """Moves what is kept to the front, publishes the length, then lets the manager have the end."""
        request_id = request.py_request_id
        listed, pool = self._backend.pages(request_id), self._backend.pool
        gone = set(pages)
        kept = [p for p in range(len(listed)) if p not in gone]
        for target, source in enumerate(kept):
            if target != source:  # in ascending order: a source is never overwritten before it has moved
                pool[listed[target]].copy_(pool[listed[source]], non_blocking=True)
                self.num_copies += 1
        if self._done is not None:
            self._done.record()
            stream = getattr(self._manager, "_stream", None)
            if stream is not None:
                stream.wait_event(self._done)
        request.py_num_compressed_tokens += len(pages) * self._size
        self._backend.shrink(request_id, len(pages))
        self._dropped.setdefault(request_id, []).extend(pages)
        if self._redundancy is not None:
            self._redundancy.forget(request_id)  # pages have other numbers now
        self.num_dropped += len(pages)
