"""Sharing for one KV cache manager of TensorRT-LLM that can free the end of a sequence only.

What is shared is decided by this project's own manager, over virtual blocks: one for each page that TensorRT-LLM
holds, never moved, whatever becomes of the page. It brings stage 1, chains of copies, limits and staleness. Here its
remaps are carried out: a retired block's page is overwritten by the last page of the request's list, the list is cut
by one, and the rows of the block table are rearranged to match (page_list.py, row_map.py).

Order in one iteration, all on the stream of the forward passes::

    prepare_resources(n):  apply what search n-1 decided | search | TensorRT-LLM adds a token
    forward(n):            block table written, rows rearranged, kernels read and write

With the overlap scheduler forward n-1 may still run when ``prepare_resources(n)`` is called. Its last write is on the
stream before our copies, and whoever takes a freed page writes after them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.search.block_search import BlockSearch, Distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.policy import SharingPolicy, make_pairs
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, PairBatch
from trtllm_memshare.trtllm.pytorch.requests import KnownRequest, KnownRequests
from trtllm_memshare.trtllm.pytorch.row_map import RowMap

_MAX_AHEAD = 2  # tokens that may have a slot before the host knows them: the one in flight, and the next


class CacheBackend(Protocol):
    """The calls that differ between TensorRT-LLM's KV cache managers.

    Attributes:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the live pool.
      max_blocks_per_seq: entries of a row of the block table.
      max_batch_size: most requests at once.
      protects_prompt_only: False when pages of a resumed request's old tokens may be known to the reuse tree.
      edits_pinned_rows: ``shrink`` writes into the rows that the table is copied from.
    """

    pool: torch.Tensor
    max_blocks_per_seq: int
    max_batch_size: int
    protects_prompt_only: bool
    edits_pinned_rows: bool

    def pages(self, request_id: int) -> list[int]:
        """The request's list: indices into the pool."""

    def shrink(self, request_id: int, num_pages: int) -> None:
        """Frees the last pages of the list; the manager's token count falls by whole blocks."""


class TailSwap:
    """Searches, decides and shares for the requests of one manager.

    Args:
      backend: of the manager.
      config: settings of the search.
      boundaries: of the model's tokenizer.
      search: compares rows of the backend's pool.
      agreement: of tensor-parallel ranks, each of which runs its own copy of this; None = there is one rank.
      complain: told of what sharing excludes and only shows while serving; raises, or lets requests run unshared.

    Attributes:
      requests: what is known of the requests.
      is_off: nothing is searched or shared, since ``complain`` was told why and returned.
      seconds: host time spent so far, waits for distances included. ``search_seconds``: of the comparisons.
    """

    def __init__(
        self,
        backend: CacheBackend,
        config: MemShareConfig,
        boundaries: BoundaryTokens,
        search: BlockSearch,
        agreement: RankAgreement | None,
        complain: Callable[[str], None],
    ) -> None:
        self._backend, self._config, self._search, self._agreement = backend, config, search, agreement
        self._size = backend.pool.shape[4]
        self.manager = KVCacheManager(
            # Pages of the reuse tree belong to several requests, virtual blocks to one each.
            num_blocks=backend.pool.shape[0] * (1 if backend.protects_prompt_only else 4) + backend.max_batch_size,
            num_layers=backend.pool.shape[1],
            tokens_per_block=self._size,
            max_blocks_per_seq=backend.max_blocks_per_seq,
            max_batch_size=backend.max_batch_size,
            config=config,
            make_matcher=make_matcher_factory(config, self._size, boundaries),
        )
        self.policy = SharingPolicy(config)
        self._rows = RowMap(backend.max_batch_size, backend.max_blocks_per_seq, backend.pool.device)
        self._tokens_at_once = max(config.search_interval, self._size // 2)
        self.requests = KnownRequests(
            self.manager, self._tokens_at_once, backend.max_batch_size, backend.protects_prompt_only, complain
        )
        self._complain = complain
        self.is_off = False
        self._pending: tuple[list[Candidate], Distances | None] | None = None
        self._page_of = np.zeros(self.manager.pool.num_blocks, np.int32)  # scratch: virtual block -> page
        self._stream: torch.cuda.Stream | None = None
        self._table_copied: torch.cuda.Event | None = None
        self._step = 0
        self.num_tables = self.num_copies = 0
        self.seconds = self.search_seconds = 0.0

    @property
    def pool(self) -> torch.Tensor:
        """The live pool, see ``CacheBackend.pool``."""
        return self._backend.pool

    def begin_step(self, generation_requests: Sequence[Any]) -> None:
        """Applies the last search and, every few steps, starts the next; before the manager adds tokens.

        Args:
          generation_requests: TensorRT-LLM's ``LlmRequest`` objects of this iteration that are past their prompt.

        Raises:
          UserError: from ``complain``.
          RuntimeError: the manager's list is not what its calls imply, or ranks disagree.
        """
        started = time.perf_counter()
        is_needed = self.manager.pool.num_used >= self._config.min_pool_use * self.pool.shape[0]
        searches = is_needed and self._step % self._config.search_interval == 0
        if self.is_off or not self._table_is_ours(generation_requests):
            return
        self.requests.take_in(generation_requests)
        if self._pending is not None or searches:
            active = {r.py_request_id for r in generation_requests}
            with self._forward_stream():
                self._apply(active)
                if searches:
                    self._start_search(active)
        self._step += 1
        self.seconds += time.perf_counter() - started

    def rearrange(self, table: torch.Tensor, request_ids: Sequence[int]) -> None:
        """Rearranges the block table that the manager has just written, on the current stream; modifies it.

        Args:
          table: int32 ``[num_pools, >= len(request_ids), 2, max_blocks_per_seq]``, device.
          request_ids: of its rows; those that share nothing, dummies included, stay as they are.
        """
        started = time.perf_counter()
        self.num_tables += 1
        self._rows.gather(table, request_ids)
        if table.is_cuda:
            self._stream = torch.cuda.current_stream(table.device)
            self._table_copied = self._table_copied or torch.cuda.Event()
            self._table_copied.record(self._stream)
        self.seconds += time.perf_counter() - started

    def _table_is_ours(self, generation_requests: Sequence[Any]) -> bool:
        """Whether rows can be rearranged: a request that generates has had a table for its prompt."""
        if self.num_tables == 0 and any(not getattr(r, "is_dummy_request", False) for r in generation_requests):
            self._complain(
                "sharing needs the attention backend TRTLLM, got one that does not write its block table through the "
                "KV cache manager (set attn_backend: TRTLLM)"
            )
            self.is_off = True
        return not self.is_off

    def _wait_for_table(self) -> None:
        """The last copy of the manager's pinned rows has been read: V2's resize writes into them at once."""
        if self._table_copied is not None:
            self._table_copied.synchronize()

    def _forward_stream(self) -> AbstractContextManager[Any]:
        """The stream that the last table was written on: the forward passes', whatever the manager calls its own."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def shares(self, request_id: int) -> bool:
        """True if pages of the request hold what other tokens read too."""
        return request_id in self._rows

    def forget(self, request: Any) -> None:
        """Lets go of a request whose resources are freed."""
        self._rows.forget(request.py_request_id)
        self.requests.forget(request)

    def _start_search(self, active: Container[int]) -> None:
        candidates = self._only_active(self.manager.candidates(), active)
        distances = None
        if candidates and not self._config.accept_all:
            distances = self._search.compare(self._physical_pairs(candidates))
        self._pending = candidates, distances

    def _physical_pairs(self, candidates: list[Candidate]) -> PairBatch:
        """Stage 2's input in rows of the pool: virtual blocks are looked up in the requests' lists."""
        pool, size, page_of = self.manager.pool, self._size, self._page_of
        pairs = make_pairs(candidates, pool.origin_position, size, self._config.undo_rope)
        lists: dict[int, np.ndarray] = {}
        for candidate in candidates:
            request_id = candidate.request_id
            if request_id not in lists:
                known = self.requests[request_id]
                pages = self._synchronise(known)
                lists[request_id] = np.array(pages, np.int32)[np.array(known.pages.position)]
            blocks = np.append(candidate.kept_rows // size, candidate.block)
            page_of[blocks] = lists[request_id][pool.origin_position[blocks] // size]
        new_rows, old_rows = (page_of[r // size] * size + r % size for r in (pairs.new_rows, pairs.old_rows))
        return PairBatch(new_rows, old_rows, pairs.position_delta, pairs.undo_rope)

    def _only_active(self, candidates: list[Candidate], active: Container[int]) -> list[Candidate]:
        """Those of requests in this iteration; the others are offered again.

        V2 keeps suspended requests, whose pages are nowhere on the device. A request whose newest tokens found no room
        in our tables waits until they do.
        """
        kept = []
        for candidate in candidates:
            known = self.requests.get(candidate.request_id)
            if candidate.request_id in active and known is not None and not known.is_behind:
                kept.append(candidate)
            else:
                self.manager.offer_again(candidate)
        return kept

    def _apply(self, active: Container[int]) -> None:
        """Carries out what the last search found, on every rank in the same iteration."""
        if self._pending is None:
            return
        (candidates, distances), self._pending = self._pending, None
        sums = None
        if distances is not None:
            sums, seconds = distances.read()
            self.search_seconds += seconds
        if self._agreement is None:
            decisions = self.policy.decide(candidates, sums)
        else:
            # Each rank schedules on its own count of free blocks: one that differed in a decision would break all.
            state = self.manager.pool.generation.tobytes()
            decisions = self._agreement.decide(candidates, sums, state, self.policy.decide)
        kept = {id(c) for c in self._only_active([d.candidate for d in decisions], active)}
        decisions = [d for d in decisions if id(d.candidate) in kept]
        if not decisions:
            return
        if not self._config.shares:
            self.manager.count_shadow(decisions)
            return
        self.manager.apply(decisions)
        retired = defaultdict[int, list[int]](list)
        for candidate in (d.candidate for d in decisions):
            if self.manager.is_retired(candidate.request_id, candidate.logical):
                retired[candidate.request_id].append(candidate.logical)
        for request_id, blocks in retired.items():
            self._swap(request_id, blocks)

    def _swap(self, request_id: int, blocks: list[int]) -> None:
        """Gives the pages of retired blocks back to TensorRT-LLM."""
        known = self.requests[request_id]
        pages = self._synchronise(known)
        pool = self._backend.pool
        for source, target in known.pages.give_up(blocks):
            pool[pages[target]].copy_(pool[pages[source]], non_blocking=True)
            self.num_copies += 1
        if self._backend.edits_pinned_rows:
            self._wait_for_table()
        self._backend.shrink(request_id, len(blocks))
        left = self._backend.pages(request_id)
        if left != pages[: known.pages.num_pages]:
            raise RuntimeError(
                f"request {request_id} had pages {pages}, {len(blocks)} were dropped from the end, but the KV cache "
                f"manager now lists {left}"
            )
        width = self._backend.max_blocks_per_seq
        self._rows.set_row(request_id, known.pages.row(self.manager.origin_blocks(request_id), width))

    def _synchronise(self, known: KnownRequest) -> list[int]:
        """The manager's list of a request, after pages that it appended since were taken over."""
        pages, page_list = self._backend.pages(known.request_id), known.pages
        logical = len(pages) + page_list.num_given_up
        fewest = self.manager.blocks_for(known.num_tokens - 1)
        most = self.manager.blocks_for(known.num_tokens + self._tokens_at_once + _MAX_AHEAD)
        if not max(fewest, page_list.num_blocks) <= logical <= most:
            raise RuntimeError(
                f"request {known.request_id} of {known.num_tokens} tokens must have {fewest} to {most} blocks, got "
                f"{len(pages)} pages and {page_list.num_given_up} given up, {page_list.num_blocks} known before"
            )
        page_list.extend(logical)
        return pages
