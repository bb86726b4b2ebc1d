"""Sharing for one KV cache manager of TensorRT-LLM: what is decided when, and that nothing of it ends the server.

What is shared or given up is decided by this project's own code, over virtual blocks: one for each page that
TensorRT-LLM holds, never moved, whatever becomes of the page. Decisions are carried out by tail_swap.py, and
table_rows.py says what the rows of the block table read then.

Order in one iteration, all on the stream of the forward passes::

    prepare_resources(n):  cross bands | apply what search n-1 decided | give pages up if memory is short | search |
                           TensorRT-LLM adds a token (main's V2: has added it)
    forward(n):            block table written, rows rearranged, kernels read and write
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
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
from trtllm_memshare.trtllm.pytorch.admission import AdmissionReserve
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.block_tables import BlockTables
from trtllm_memshare.trtllm.pytorch.failures import Failures
from trtllm_memshare.trtllm.pytorch.forward_stream import ForwardStream
from trtllm_memshare.trtllm.pytorch.giving_up import GivingUp
from trtllm_memshare.trtllm.pytorch.kill_switch import KillSwitch
from trtllm_memshare.trtllm.pytorch.lost_requests import LostRequests
from trtllm_memshare.trtllm.pytorch.null_rows import NullRows
from trtllm_memshare.trtllm.pytorch.pauses import Pauses
from trtllm_memshare.trtllm.pytorch.pressure import Choice, Pressure
from trtllm_memshare.trtllm.pytorch.rank_meetings import RankMeetings
from trtllm_memshare.trtllm.pytorch.requests import ActiveRequests, KnownRequests
from trtllm_memshare.trtllm.pytorch.searcher import Pending, Searcher
from trtllm_memshare.trtllm.pytorch.skipped_rows import SkippedRows
from trtllm_memshare.trtllm.pytorch.table_rows import TableRows
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap
from trtllm_memshare.trtllm.pytorch.wishes import Wishes


class Sharing:
    """Searches, decides and shares for the requests of one manager.

    Args:
      backend: of the manager.
      config: settings of the search.
      boundaries: of the model's tokenizer.
      search: compares rows of the backend's pool.
      agreement: of tensor-parallel ranks, each of which runs its own copy of this; None = there is one rank.
      say: told once of what sharing excludes and only shows while serving.
      failures: counts errors.
      switch: lets a person stop new sharing while the server runs.
      null_rows: how rows forget what is given up; None = nothing is given up for need.
      reserve: see ``Pressure``.

    Attributes:
      requests: what is known of the requests.
      manager: this project's, over virtual blocks. ``policy``, ``pressure``: decide.
      pauses: those that TensorRT-LLM made. ``giving_up``: carries decisions out.
      failures: errors that were caught; ``failures.is_off``: nothing new is shared any more.
      lost: requests whose rows cannot be vouched for, not ended yet.
      tables: the block tables.
      search_seconds: host time spent on the comparisons, waits for distances included.
    """

    def __init__(
        self,
        backend: CacheBackend,
        config: MemShareConfig,
        boundaries: BoundaryTokens,
        search: BlockSearch,
        agreement: RankAgreement | None,
        say: Callable[[str], None],
        failures: Failures,
        switch: KillSwitch,
        null_rows: NullRows | SkippedRows | None = None,
        reserve: AdmissionReserve | None = None,
    ) -> None:
        self._backend, self._config, self._say, self._switch = backend, config, say, switch
        self.failures, self._stream = failures, ForwardStream()
        size, reserved = backend.pool.shape[4], 0 if null_rows is None else len(null_rows.pages.blocks)
        self.manager = KVCacheManager(
            num_blocks=backend.max_held_blocks + backend.max_batch_size + reserved,
            num_layers=backend.pool.shape[1],
            tokens_per_block=size,
            max_blocks_per_seq=backend.max_blocks_per_seq,
            max_batch_size=backend.max_batch_size,
            # What a paused request had given up goes again when TensorRT-LLM has computed it whole (giving_up.py).
            config=config.model_copy(update={"pressure": False}),
            make_matcher=make_matcher_factory(config, size, boundaries),
            null_pages=None if null_rows is None else null_rows.pages,
        )
        self.policy = SharingPolicy(config)
        tokens_at_once = max(config.search_interval, size // 2)
        self.requests = KnownRequests(
            self.manager,
            tokens_at_once,
            backend.max_batch_size,
            backend.protects_prompt_only,
            say,
            Wishes(config.min_kept),
        )
        self._rows = TableRows(backend, self.manager, self.requests, null_rows)
        self.lost = LostRequests(self.requests, self._rows, failures)
        self.tables = BlockTables(self._rows, self.lost, self._stream, self._fail)
        self.tail = TailSwap(backend, tokens_at_once, self._stream.wait_for_table, self.lost.lose)
        self.giving_up = GivingUp(self.manager, self.requests, self.tail, self._rows, config.shares, self.lost.lose)
        self._searcher = Searcher(self.manager, self.requests, search, self.tail, config)
        self.pressure = (
            Pressure(backend, self.manager, self.requests, self.tail, config, null_rows.num_pages, reserve)
            if config.pressure and null_rows is not None
            else None
        )
        self._meetings = None if agreement is None else RankMeetings(agreement, config.search_interval)
        self.pauses = Pauses(backend.is_suspended)
        self._pending: Pending | None = None
        self._first_is_off = False  # the first rank's switch, as of the last meeting: ranks act on one and the same
        self._batch = ActiveRequests()
        self._step = 0
        self._seconds = self.search_seconds = 0.0

    @property
    def pool(self) -> torch.Tensor:
        """The live pool, see ``CacheBackend.pool``."""
        return self._backend.pool

    @property
    def seconds(self) -> float:
        """Host time spent so far."""
        return self._seconds + self.tables.seconds

    def begin_step(self, generation_requests: Sequence[Any], num_incoming: int = 0) -> None:
        """Applies the last search and, every few steps, starts the next; raises nothing.

        Args:
          generation_requests: TensorRT-LLM's ``LlmRequest`` objects of this iteration that are past their prompt.
          num_incoming: pages that prompts of this iteration are about to take.
        """
        started, disagreed = time.perf_counter(), False
        try:
            active = self._batch.by_id(generation_requests)
            if not self.failures.is_off:
                self.tables.look(active)
            self.pauses.look(active)
            self._rows.cross(self._step, self.lost.lose)
            if not self.failures.is_off and self._is_ready(generation_requests, num_incoming):
                self._advance(active)
                if self.pressure is not None and self._switch.is_off(self._step):
                    self.pressure.release()  # nothing goes for those that it keeps out
                elif self.pressure is not None and self._config.shares:
                    self.pressure.admit(num_incoming)
        except Exception as error:  # TensorRT-LLM's loop would end with it
            disagreed = isinstance(error, RankDisagreementError)
            self._fail("a step of sharing", error)
        if self.failures.is_off and self._meetings is not None:
            self.lost.meet(self._meetings, self._step, disagreed, generation_requests)
        self._step += 1
        self._seconds += time.perf_counter() - started

    def shares(self, request_id: int) -> bool:
        """True if pages of the request are not where its text says."""
        return request_id in self._rows

    def forget(self, request: Any) -> None:
        """Lets go of a request whose resources are freed; raises nothing."""
        request_id = request.py_request_id
        self._batch.clear()
        try:
            is_dummy = getattr(request, "is_dummy_request", False)
            self.pauses.freed(request_id, is_dummy or getattr(request.state, "name", "") == "GENERATION_COMPLETE")
            self.giving_up.remember(request)
            is_known = self.requests.get(request_id) is not None
            self.requests.forget(request)
            if self.pressure is not None:
                self.pressure.forget(request, is_known, is_last=not any(True for _ in self.requests))
        except Exception as error:
            self._fail("the end of a request", error)
        self._rows.forget(request_id)
        self.lost.forget(request_id)

    def _is_ready(self, generation_requests: Sequence[Any], num_incoming: int) -> bool:
        """Whether rows can be rearranged: a request that generates has had a table for its prompt."""
        if all(getattr(r, "is_dummy_request", False) for r in generation_requests):
            return True  # warm-up: TensorRT-LLM expects its manager empty
        if self.tables.num == 0 or (self._rows.skips and self._config.shares and not self.tables.num_fitted):
            self._say(
                "sharing needs the attention backend TRTLLM, got one that does not write its block table through the "
                "KV cache manager, or takes its lengths from elsewhere (set attn_backend: TRTLLM)"
            )
            self.failures.is_off = True
            return False
        size = self.manager.tokens_per_block

        def promised() -> int:  # who opens a page in this iteration: see ``Pressure.choose``
            return num_incoming + sum((1 - r.max_beam_num_tokens) % size <= 1 for r in generation_requests)

        with self._stream.enter():
            return self._rows.take_null_pages(promised, was_idle=not any(True for _ in self.requests))

    def _advance(self, active: Mapping[int, Any]) -> None:
        interval = self._config.search_interval
        is_needed = self.manager.pool.num_used >= self._config.min_pool_use * self.pool.shape[0]
        searches = self._config.searches and is_needed and self._step % interval == 0
        self.requests.take_in(active, self._step)
        if self.pressure is not None:
            self.pressure.begin(active)
        meets = self._meetings is not None and self._meetings.is_meeting(self._step)
        with self._stream.enter():
            if not (self._switch.is_off(self._step) if self._meetings is None else self._first_is_off):
                self.giving_up.retire_again(self._step)
            if meets if self._meetings is not None else self._pending is not None or self.pressure is not None:
                self._decide_and_apply(active)
            if searches:
                self._pending = self._searcher.start(active)

    def _decide_and_apply(self, active: Container[int]) -> None:
        """Carries out what the last search found and what memory asks for, on every rank in the same iteration."""
        (candidates, distances), self._pending = self._pending or ([], None), None
        sums = None
        if distances is not None:
            sums, seconds = distances.read()
            self.search_seconds += seconds
        if self._meetings is None:
            decisions = self._decide(candidates, sums) if candidates else []
            choice = self._choose()
        else:
            # Each rank schedules on its own count of free blocks: one that differed in a decision would break all.
            state = self.manager.pool.generation.tobytes()
            self._meetings.begin(self._step)
            decisions = self._meetings.ranks.decide(candidates, sums, state, self._decide)
            choice, self._first_is_off = self._meetings.choose(self._choose_and_look)
        self._apply(decisions, active)
        self.giving_up.retire(choice, self._step)

    def _apply(self, decisions: list[Decision], active: Container[int]) -> None:
        kept = {id(c) for c in self._searcher.only_active([d.candidate for d in decisions], active)}
        if not (decisions := [d for d in decisions if id(d.candidate) in kept]):
            return
        if not self._config.shares:
            self.manager.count_shadow(decisions)
            return
        self.manager.apply(decisions)
        retired = defaultdict[int, list[int]](list)
        for candidate in (d.candidate for d in decisions):
            if self.manager.is_retired(candidate.request_id, candidate.logical):
                retired[candidate.request_id].append(candidate.logical)
        self.giving_up.hand_back(list(retired.items()), self._step)

    def _decide(self, candidates: list[Candidate], sums: np.ndarray | None) -> list[Decision]:
        """On one rank, or on the first: nothing while a person has switched new sharing off."""
        if not self._switch.is_off(self._step):
            return self.policy.decide(candidates, sums)
        for candidate in candidates:
            self.manager.offer_again(candidate)
        return []

    def _choose(self) -> Choice:
        if self.pressure is None or self._switch.is_off(self._step):
            return []
        return self.pressure.choose(1 if self._meetings is None else self._config.search_interval)

    def _choose_and_look(self) -> tuple[Choice, bool]:
        """What the first rank says to all: its choice, and whether a person has switched new sharing off."""
        return self._choose(), self._switch.is_off(self._step)

    def _fail(self, where: str, error: Exception) -> None:
        """Stops new sharing; on one rank, ends what cannot be vouched for. Several ranks do that where they meet."""
        self.failures.stop(where, error)
        self._pending = None
        if self.pressure is not None:
            with suppress(Exception):  # what is held only keeps requests waiting
                self.pressure.release()
        if self._meetings is None:
            self.lost.end(str(error))
