"""Sharing for one KV cache manager of TensorRT-LLM: what is decided when, and that nothing of it ends the server.

What is shared is decided by this project's own manager, over virtual blocks: one for each page that TensorRT-LLM holds,
never moved, whatever becomes of the page. It brings stage 1, chains of copies, limits and staleness. Its remaps are
carried out by tail_swap.py, and row_map.py rearranges the rows of the block table.

Order in one iteration, all on the stream of the forward passes::

    prepare_resources(n):  apply what search n-1 decided | search | TensorRT-LLM adds a token (V2: has added it)
    forward(n):            block table written, rows rearranged, kernels read and write
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.ranks.agreement import RankAgreement, RankDisagreementError
from trtllm_memshare.search.block_search import BlockSearch
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.failures import Complaints, Failures
from trtllm_memshare.trtllm.pytorch.kill_switch import KillSwitch
from trtllm_memshare.trtllm.pytorch.requests import KnownRequests
from trtllm_memshare.trtllm.pytorch.row_map import RowMap
from trtllm_memshare.trtllm.pytorch.searcher import Pending, Searcher
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap


class Sharing:
    """Searches, decides and shares for the requests of one manager.

    Args:
      backend: of the manager.
      config: settings of the search.
      boundaries: of the model's tokenizer.
      search: compares rows of the backend's pool.
      agreement: of tensor-parallel ranks, each of which runs its own copy of this; None = there is one rank.
      complain: told of what sharing excludes and only shows while serving.
      description: of the manager and the settings, for error reports.
      switch: lets a person stop new sharing while the server runs.

    Attributes:
      requests: what is known of the requests.
      manager: this project's, over virtual blocks. ``policy``: decides.
      failures: errors that were caught; ``failures.is_off``: nothing new is shared any more.
      seconds: host time spent so far, waits for distances included. ``search_seconds``: of the comparisons.
      num_tables: block tables that were rearranged or looked at.
    """

    def __init__(
        self,
        backend: CacheBackend,
        config: MemShareConfig,
        boundaries: BoundaryTokens,
        search: BlockSearch,
        agreement: RankAgreement | None,
        complain: Complaints,
        description: str,
        switch: KillSwitch | None = None,
    ) -> None:
        self._backend, self._config, self._ranks = backend, config, agreement
        size = backend.pool.shape[4]
        self.manager = KVCacheManager(
            # Pages of the reuse tree belong to several requests, virtual blocks to one each.
            num_blocks=backend.pool.shape[0] * (1 if backend.protects_prompt_only else 4) + backend.max_batch_size,
            num_layers=backend.pool.shape[1],
            tokens_per_block=size,
            max_blocks_per_seq=backend.max_blocks_per_seq,
            max_batch_size=backend.max_batch_size,
            config=config,
            make_matcher=make_matcher_factory(config, size, boundaries),
        )
        self.policy = SharingPolicy(config)
        self.failures = Failures(description)
        self._complain, self._switch = complain, switch or KillSwitch(None)
        self._rows = RowMap(backend.max_batch_size, backend.max_blocks_per_seq, backend.pool.device)
        tokens_at_once = max(config.search_interval, size // 2)
        self.requests = KnownRequests(
            self.manager, tokens_at_once, backend.max_batch_size, backend.protects_prompt_only, complain.say
        )
        self.tail = TailSwap(backend, tokens_at_once, self._wait_for_table)
        self._searcher = Searcher(self.manager, self.requests, search, self.tail, config)
        self._pending: Pending | None = None
        self._lost: dict[int, Any] = {}  # requests whose rows cannot be vouched for, not ended yet
        self._stream: torch.cuda.Stream | None = None
        self._table_copied: torch.cuda.Event | None = None
        self._step = 0
        self._last_meeting = -1
        self._disagreed = self._all_ranks_are_off = False
        self.num_tables = 0
        self.seconds = self.search_seconds = 0.0

    @property
    def pool(self) -> torch.Tensor:
        """The live pool, see ``CacheBackend.pool``."""
        return self._backend.pool

    def begin_step(self, generation_requests: Sequence[Any]) -> None:
        """Applies the last search and, every few steps, starts the next; raises nothing.

        Args:
          generation_requests: TensorRT-LLM's ``LlmRequest`` objects of this iteration that are past their prompt.
        """
        started = time.perf_counter()
        try:
            if not self.failures.is_off and self._table_is_ours(generation_requests):
                self._advance(generation_requests)
        except Exception as error:  # TensorRT-LLM's loop would end with it
            self._disagreed = isinstance(error, RankDisagreementError)
            self._fail("a step of sharing", error)
        if self.failures.is_off and self._ranks is not None:
            self._meet_ranks_switched_off(self._ranks)
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
        try:
            self._rows.gather(table, request_ids)
        except Exception as error:  # every active request would fail with it
            for row, request_id in enumerate(request_ids):
                if request_id in self._rows:
                    self._lose(request_id)
                    table[:, row] = table[:, row, :, self._own_page(request_id)].unsqueeze(-1)
            self._fail("the rearrangement of rows", error)
        if table.is_cuda:
            self._stream = torch.cuda.current_stream(table.device)
            self._table_copied = self._table_copied or torch.cuda.Event()
            self._table_copied.record(self._stream)
        self.seconds += time.perf_counter() - started

    def shares(self, request_id: int) -> bool:
        """True if pages of the request hold what other tokens read too."""
        return request_id in self._rows

    def forget(self, request: Any) -> None:
        """Lets go of a request whose resources are freed; raises nothing."""
        self._rows.forget(request.py_request_id)
        self._lost.pop(request.py_request_id, None)
        try:
            self.requests.forget(request)
        except Exception as error:
            self._fail("the end of a request", error)

    def _advance(self, generation_requests: Sequence[Any]) -> None:
        is_needed = self.manager.pool.num_used >= self._config.min_pool_use * self.pool.shape[0]
        searches = is_needed and self._step % self._config.search_interval == 0
        self.requests.take_in(generation_requests)
        applies = self._pending is not None if self._ranks is None else self._is_meeting()
        if not applies and not searches:
            return
        active = {r.py_request_id for r in generation_requests}
        with self._forward_stream():
            if applies:
                self._apply(active)
            if searches:
                self._pending = self._searcher.start(active)

    def _apply(self, active: Container[int]) -> None:
        """Carries out what the last search found, on every rank in the same iteration."""
        (candidates, distances), self._pending = self._pending or ([], None), None
        sums = None
        if distances is not None:
            sums, seconds = distances.read()
            self.search_seconds += seconds
        if self._ranks is None:
            decisions = self._decide(candidates, sums)
        else:
            # Each rank schedules on its own count of free blocks: one that differed in a decision would break all.
            state = self.manager.pool.generation.tobytes()
            self._last_meeting = self._step
            decisions = self._ranks.decide(candidates, sums, state, self._decide)
        kept = {id(c) for c in self._searcher.only_active([d.candidate for d in decisions], active)}
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
        problems = [p for p in (self._give_up(i, blocks) for i, blocks in retired.items()) if p is not None]
        if problems:
            raise problems[0]

    def _decide(self, candidates: list[Candidate], sums: np.ndarray | None) -> list[Decision]:
        """On one rank, or on the first: nothing while a person has switched new sharing off."""
        if not self._switch.is_off(self._step):
            return self.policy.decide(candidates, sums)
        for candidate in candidates:
            self.manager.offer_again(candidate)
        return []

    def _give_up(self, request_id: int, blocks: list[int]) -> Exception | None:
        """Gives the pages of retired blocks back, and sets the row that goes with it; both, or the request is lost.

        Returns:
          Why it is lost, None if all is well: what was decided for other requests has to be carried out all the same.
        """
        known = self.requests[request_id]
        try:
            self.tail.give_up(known, blocks)
            origins = self.manager.origin_blocks(request_id)
            self._rows.set_row(request_id, known.pages.row(origins, self._backend.max_blocks_per_seq))
        except Exception as error:
            self._lose(request_id)
            return error
        return None

    def _lose(self, request_id: int) -> None:
        """Marks a request whose row cannot be vouched for; until it ends, it reads and writes its own last page."""
        self._lost[request_id] = self.requests[request_id].request
        self._rows.set_row(request_id, np.full(self._backend.max_blocks_per_seq, self._own_page(request_id)))

    def _own_page(self, request_id: int) -> int:
        """The last position of a request's list: a page that nobody else reads."""
        return max(0, len(self._backend.pages(request_id)) - 1)

    def _fail(self, where: str, error: Exception) -> None:
        """Stops new sharing; on one rank, ends what cannot be vouched for. Several ranks do that where they meet."""
        self.failures.stop(where, error)
        self._pending = None
        if self._ranks is None:
            self._end_lost(str(error))

    def _end_lost(self, why: str) -> None:
        lost, self._lost = self._lost, {}
        self.failures.end_requests(lost.values(), why)

    def _is_meeting(self) -> bool:
        """Whether all ranks exchange something in this iteration, whatever has happened to each of them."""
        interval = self._config.search_interval
        return self._step % interval == 1 % interval

    def _meet_ranks_switched_off(self, ranks: RankAgreement) -> None:
        """This rank shares nothing new: then nor do the others, and a request that one has lost ends on all of them."""
        if not self._is_meeting():
            return
        try:
            if self._last_meeting != self._step and not self._all_ranks_are_off:
                self._last_meeting = self._step
                with suppress(RankDisagreementError):  # that is what it is for: the others learn of it
                    ranks.decide([], None, f"switched off on rank {ranks.rank}".encode(), self._decide)
            elif not self._all_ranks_are_off and not self._disagreed:
                return  # the meeting went well, and something failed after it: the others learn at the next
            self._all_ranks_are_off = True
            given_up = {k.request_id: k.pages.num_given_up for k in self.requests}
            views = ranks.exchange((list(self._lost), given_up))
            for lost, pages in views:
                for request_id in {*lost, *(i for i in pages if pages[i] != given_up.get(i))}:
                    if self.requests.get(request_id) is not None:
                        self._lose(request_id)
            self._end_lost("a rank could not vouch for it")
        except Exception as error:
            self.failures.stop("the exchange between ranks", error)

    def _table_is_ours(self, generation_requests: Sequence[Any]) -> bool:
        """Whether rows can be rearranged: a request that generates has had a table for its prompt."""
        if self.num_tables == 0 and any(not getattr(r, "is_dummy_request", False) for r in generation_requests):
            self._complain.say(
                "sharing needs the attention backend TRTLLM, got one that does not write its block table through the "
                "KV cache manager (set attn_backend: TRTLLM)"
            )
            self.failures.is_off = True
        return not self.failures.is_off

    def _wait_for_table(self) -> None:
        """The last copy of the manager's pinned rows has been read."""
        if self._table_copied is not None:
            self._table_copied.synchronize()

    def _forward_stream(self) -> AbstractContextManager[Any]:
        """The stream that the last table was written on: the forward passes', whatever the manager calls its own."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
