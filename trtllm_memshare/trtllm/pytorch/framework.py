"""The second route, for TensorRT-LLM 1.4 and later: a method of its own framework for KV cache compression.

TensorRT-LLM calls a ``KVCacheCompressionManager`` by five hooks and lets it shorten sequences: it moves what is kept to
the front of a sequence's pages, publishes by how much the sequence is shorter (``py_num_compressed_tokens``), and cuts
the capacity in ``KVCacheManagerV2``. Pages go at the watermarks and by the need of the other route, but exact repeats
do not go first, since nothing looks for them here, and each request that runs counts as one that opens a page. What the
framework cannot express is a second name for a page: no entry of a block table can be pointed at another page. So
nothing is shared here, and there are no null pages; a page that goes is dropped.

Its rules, and how they are kept: the prompt stays where it is; completion is published before a resize (moves, length
and resize are in one hook, on one stream, with an event for the manager's); nothing is calibrated while serving; there
is one method for an LLM, so the other route is off.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtllm_memshare.search.need import PageFacts, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.trtllm.pytorch.backends import V2Backend
from trtllm_memshare.trtllm.pytorch.failures import Complaints, Failures
from trtllm_memshare.trtllm.pytorch.kill_switch import KillSwitch
from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy
from trtllm_memshare.trtllm.pytorch.settings import Settings
from trtllm_memshare.trtllm.pytorch.wishes import Wishes

log = logging.getLogger("trtllm_memshare")

ALGORITHM = "memshare"
"""``kv_cache_compression_config.algorithm``: unknown to TensorRT-LLM, whose configuration then has no other field."""


def make_compression_manager(base: type, config: Any, settings: Settings, **keywords: Any) -> Any:
    """A manager for the framework.

    Args:
      base: TensorRT-LLM's ``KVCacheCompressionManager``.
      config: its ``KvCacheCompressionConfig`` with our algorithm.
      settings: this project's.
      keywords: what TensorRT-LLM's factory was given beside; handed on as far as the base class takes it.
    """
    taken = inspect.signature(base).parameters

    class MemShareCompressionManager(base):
        """Drops the pages that are needed least by shortening sequences.

        ``memshare``: what drops them; None where it must not, which is logged.
        """

        memshare: PageDropper | None = None

        def bind_kv_cache_managers(self, target: Any, draft: Any = None) -> None:
            """Raises UserError for several ranks, where ``on_unsupported`` is stop."""
            super().bind_kv_cache_managers(target, draft)
            reason = several_ranks(target.mapping)
            if reason is not None:
                Complaints(settings.options.on_unsupported)(reason)
                return
            # The configuration of an algorithm that TensorRT-LLM does not know says that lengths stay.
            target.kv_compression_manages_history = True
            self.memshare = PageDropper(target, settings)

        def on_generation_step_end(self, scheduled_batch: Any, **keywords: Any) -> None:
            if self.memshare is not None:
                self.memshare.end(scheduled_batch.generation_requests)

        def on_request_finish(self, request: Any, **keywords: Any) -> None:
            if self.memshare is not None:
                self.memshare.forget(request)

        def shutdown(self) -> None:
            if self.memshare is not None:
                self.memshare.log_totals()
            super().shutdown()

    return MemShareCompressionManager(config, **{k: v for k, v in keywords.items() if k in taken})


def several_ranks(mapping: Any) -> str | None:
    """Why this route does not serve these ranks, None for one rank: each would choose pages by its own heads."""
    sizes = {name: getattr(mapping, name) for name in ("tp_size", "pp_size", "cp_size")}
    if all(size == 1 for size in sizes.values()):
        return None
    got = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"route framework serves one rank, got {got} (take route overlay for tp_size, and set the others to 1)"


class PageDropper:
    """Drops pages for one manager; raises nothing while serving.

    Args:
      manager: TensorRT-LLM's ``KVCacheManagerV2``, of one rank.
      settings: watermarks, floor, need, the file that stops dropping.

    Attributes:
      num_dropped: pages. ``num_shadowed``: pages that shadow would have dropped, each counted once.
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
        self.num_dropped = self.num_shadowed = 0

    def end(self, generation_requests: Sequence[Any]) -> None:
        """Drops pages of the requests whose step has ended, if memory is short.

        With the overlap scheduler the next step runs already: it is on the stream before the moves, with the length of
        before, and its row lies in the page that moves last.
        """
        self._step += 1
        if self.failures.is_off or self._switch.is_off(self._step):
            return
        try:
            self._relieve([r for r in generation_requests if self._may_shrink(r)])
        except Exception as error:  # TensorRT-LLM's loop would end with it
            self.failures.stop("a step of the compression route", error)

    def forget(self, request: Any) -> None:
        self._dropped.pop(request.py_request_id, None)
        self._shadowed.pop(request.py_request_id, None)
        if self._redundancy is not None:
            self._redundancy.forget(request.py_request_id)

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
        cache = self._manager.kv_cache_map.get(request.py_request_id)
        return cache is not None and cache.is_active and getattr(request.state, "name", "") != "GENERATION_COMPLETE"

    def _relieve(self, requests: list[Any]) -> None:
        used = self._backend.pool.shape[0] - self._backend.num_free_pages()
        count = self._marks.pages_to_free(used, len(requests), self._backend.pool.shape[0])
        if not count:
            return
        by_id = {r.py_request_id: r for r in requests}
        views = [v for v in map(self._view, requests) if v is not None]
        for request_id, pages in choose_pages(views, count, self._config.spread):
            if self._config.shadow:
                self._count(request_id, pages.tolist())
                continue
            try:
                self._drop(by_id[request_id], pages.tolist())
            except Exception as error:  # its rows are moved in part, or its length is not what the manager holds
                self.failures.stop(f"dropping pages of request {request_id}", error)
                self.failures.end_requests([by_id[request_id]], str(error))

    def _view(self, request: Any) -> PressureView | None:
        """Pages are numbered as they lie now; those before ``first`` hold prompt."""
        gone = len(self._dropped.get(request.py_request_id, ()))
        first = math.ceil(request.py_prompt_len / self._size)
        resident = request.max_beam_num_tokens - 1 - gone * self._size  # rows written, the newest one excepted
        full = max(first, resident // self._size)
        pages = np.arange(first, max(first, (resident - self._config.protected_tokens) // self._size), dtype=np.int32)
        room = min(floor_room(full - first + gone, gone, self._wishes.min_kept(request)), len(pages))
        if room <= 0:
            return None
        redundancy = None
        if self._redundancy is not None:
            listed = np.array(self._backend.pages(request.py_request_id)[first:full])
            redundancy = self._redundancy.of(request.py_request_id, first, listed, pages)
        facts = PageFacts(position=pages, redundancy=redundancy, draw=self._draw[pages].astype(np.float32))
        need = page_need(self._config.need, facts)
        return PressureView(request.py_request_id, pages, need, np.zeros(len(pages), bool), room)

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
