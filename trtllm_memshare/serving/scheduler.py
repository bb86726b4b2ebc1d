"""In-flight batching: which requests take part in the next step, and who waits when blocks run out.

Two capacity policies under TensorRT-LLM's names. ``MAX_UTILIZATION`` admits what fits now and, when a running request
finds no block, pauses the youngest one, which later recomputes its context. ``GUARANTEED_NO_EVICT`` admits only what
can run to its longest possible end. Under pressure both count what requests hold when they have given up all that
they may: GUARANTEED_NO_EVICT to their ends, MAX_UTILIZATION some tokens ahead (``search.floors``). Otherwise
both count what a request still needs in logical blocks, so blocks that sharing frees admit requests under both;
TensorRT-LLM's own scheduler gains under ``MAX_UTILIZATION`` only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.serving.request import Phase, RequestState

MAX_UTILIZATION = "MAX_UTILIZATION"
GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
POLICIES = (MAX_UTILIZATION, GUARANTEED_NO_EVICT)


@dataclass
class Schedule:
    """One step: context chunks as (request, tokens of the chunk), then generation requests."""

    contexts: list[tuple[RequestState, int]] = field(default_factory=list)
    generations: list[RequestState] = field(default_factory=list)

    @property
    def states(self) -> list[RequestState]:
        """All of them, in the order of the batch."""
        return [state for state, _ in self.contexts] + self.generations


class Relief(Protocol):
    """What frees blocks before anybody is paused or left waiting: ``serving.pressure``."""

    def before_step(self, running: Sequence[RequestState]) -> None:
        """Makes room for the next token of the running requests."""

    def free_for_running(self, num_blocks: int, running: Sequence[RequestState]) -> bool:
        """Frees blocks for a request that goes on; False if there are no more to be had."""

    def free_for_waiting(self, num_blocks: int, running: Sequence[RequestState]) -> bool:
        """Frees blocks for a request to be admitted: all of them, or none and False."""

    def fits(self, state: RequestState, running: Sequence[RequestState], is_certain: bool) -> bool:
        """Whether a request can be admitted without a pause: ever if ``is_certain``, else for some tokens."""


class Scheduler:
    """Owns the order of requests; the manager owns the blocks.

    Args:
      manager: the cache.
      policy: ``MAX_UTILIZATION`` or ``GUARANTEED_NO_EVICT``.
      max_batch_size: most requests in flight.
      max_num_tokens: most tokens of one step, which bounds the context chunks.
      chunk_unit_size: context chunks but the last are a multiple of it; TensorRT-LLM's name and rule.
      relief: frees blocks under pressure; None = a request that finds none is paused.

    Attributes:
      failed: requests that could not be added to the cache, with what was raised; whoever answers them clears it.

    Raises:
      UserError: unknown policy, no request in flight, or steps that could hold no chunk of a context.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        policy: str,
        max_batch_size: int,
        max_num_tokens: int,
        chunk_unit_size: int = 1,
        relief: Relief | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise UserError(f"unknown scheduler policy {policy} ({nearest(policy, POLICIES)})")
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size} (8 requests in flight: 8)")
        if max_num_tokens < chunk_unit_size:
            raise UserError(
                f"max_num_tokens must be at least {chunk_unit_size}, the unit of a context's chunks, got "
                f"{max_num_tokens} (raise --max-num-tokens)"
            )
        self._relief = relief
        self._chunk_unit_size = chunk_unit_size
        self._manager = manager
        self._policy = policy
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []  # in order of arrival
        self.num_pauses = 0
        self.num_recomputed_tokens = 0
        self.failed: list[tuple[RequestState, Exception]] = []

    def add(self, state: RequestState) -> None:
        self.waiting.append(state)

    def schedule(self) -> Schedule:
        """Makes room for the next token of running requests, admits waiting ones, and cuts context chunks."""
        if self._relief is not None:
            self._relief.before_step(self.running)
        self._extend_generations()
        self._admit()
        step = Schedule()
        step.generations = [s for s in self.running if s.phase is Phase.GENERATION]
        budget = self._max_num_tokens - len(step.generations)
        for state in self.running:
            if state.phase is Phase.CONTEXT and budget > 0:
                remaining = self._manager.room_for_chunk(state.request_id)
                chunk = remaining if remaining <= budget else budget - budget % self._chunk_unit_size
                if chunk == 0:
                    break  # what is left of the step is less than a unit
                step.contexts.append((state, chunk))
                budget -= chunk
        return step

    def finish(self, state: RequestState) -> None:
        """Takes a request that ended off the running list; the caller removes it from the cache."""
        self.running.remove(state)

    def _extend_generations(self) -> None:
        index = 0
        while index < len(self.running):
            state = self.running[index]
            if state.phase is Phase.GENERATION:
                while not self._manager.append_tokens(state.request_id, state.tokens[-1:]):
                    if self._relief is not None and self._relief.free_for_running(1, self.running):
                        continue
                    victim = self.running[-1]
                    self._pause(victim)
                    if victim is state:
                        break
            index += 1

    def _pause(self, state: RequestState) -> None:
        self.running.remove(state)
        self._manager.pause_sequence(state.request_id)
        self.num_recomputed_tokens += state.num_computed
        state.phase, state.num_computed = Phase.WAITING, 0
        state.num_pauses += 1
        self.num_pauses += 1
        self.waiting.appendleft(state)  # victims are the youngest first, so the queue stays in order of arrival

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_batch_size:
            state = self.waiting[0]  # it stays there until it is in the cache: an error must not lose it
            if not self._has_room(state):
                if self.running or (needed := self._blocks_to_go_on(state)) <= self._manager.num_free_blocks:
                    return
                # It was to outgrow the pool by giving pages up, an error left that out, and it was paused alone.
                blocks = f"it needs {needed} blocks to go on, the pool has {self._manager.num_free_blocks}"
                self._refuse(RuntimeError(f"{blocks}, and nobody is left who could give pages up"))
                continue
            try:
                added = self._manager.add_sequence(
                    state.request_id,
                    np.asarray(state.tokens, np.int32),
                    len(state.prompt),
                    state.group if state.params.memshare else None,
                    state.params.memshare,
                )
            except Exception as error:  # MemoryError, say: this request's, and no other's
                self._refuse(error)
                continue
            if not added:
                return
            self.waiting.popleft()
            state.phase = Phase.CONTEXT
            if state.scheduled_at is None:
                state.scheduled_at = time.perf_counter()
            self.running.append(state)

    def _refuse(self, error: Exception) -> None:
        """Takes the first waiting request out; whoever reads ``failed`` answers it."""
        state = self.waiting.popleft()
        self._manager.abandon(state.request_id)
        self.failed.append((state, error))

    def _blocks_to_go_on(self, state: RequestState) -> int:
        return self._manager.blocks_to_add(state.request_id, len(state.tokens) + 1)

    def _has_room(self, state: RequestState) -> bool:
        """Whether a request can be admitted now; under pressure, after others have given up pages for it."""
        manager, relief, running = self._manager, self._relief, self.running
        is_certain = self._policy == GUARANTEED_NO_EVICT
        if relief is not None:
            if not relief.fits(state, running, is_certain):
                return False
            needed = self._blocks_to_go_on(state)
        elif is_certain:
            owed = sum(manager.blocks_for(s.max_tokens) - manager.logical_blocks(s.request_id) for s in running)
            needed = manager.blocks_for(state.max_tokens) + owed
        else:
            # One block of headroom for each running request: all of them, and the new one, then get at least a
            # block's worth of tokens further before anybody is paused again.
            needed = self._blocks_to_go_on(state) + len(running)
        short = needed - manager.num_free_blocks
        return short <= 0 or (relief is not None and relief.free_for_waiting(short, running))
