"""The executor: takes requests from any thread, runs steps, and gives sharing its turn between them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.sequence import SharingRecord
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.runners.protocol import ComparingRunner, Runner, StepBatch
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.serving.null_entries import settle_null_entries
from trtllm_memshare.serving.pressure import open_pressure
from trtllm_memshare.serving.request import (
    Phase,
    RequestHandle,
    RequestResult,
    RequestState,
    RequestStats,
    SamplingParams,
)
from trtllm_memshare.serving.sampling import Sampler, token_log_probs
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION, POLICIES, Schedule, Scheduler
from trtllm_memshare.serving.sharing import MakeControl, Sharing
from trtllm_memshare.serving.statistics import ExecutorStats, ExecutorStatus


class Executor:
    """In-flight batching over one runner.

    Either call ``step`` yourself until ``has_work`` is False, or use the executor as a context manager: a thread then
    runs the steps. ``submit`` is safe from any thread.

    Args:
      runner: computes steps and holds the pool.
      config: MemShare's settings.
      boundaries: step boundaries of the tokenizer.
      max_seq_len: longest request, prompt and output together, in tokens.
      max_batch_size: most requests in flight.
      max_num_tokens: most tokens of one step.
      scheduler_policy: ``MAX_UTILIZATION`` or ``GUARANTEED_NO_EVICT``.
      sampler: chooses next tokens; None = as each request's parameters say.
      agreement: with other ranks, see ``Sharing``.
      make_control: for experiments: makes the control that ``config`` names.

    Attributes:
      last_batch: of the last step that ran the model, None before the first.
      pressure: gives up pages when the pool runs short; None where the settings ask for none.
      has_failed: a step of the loop raised; the loop has ended.

    Raises:
      UserError: unknown policy, or a control in the settings without ``make_control``.
    """

    def __init__(
        self,
        runner: Runner,
        config: MemShareConfig,
        boundaries: BoundaryTokens,
        max_seq_len: int,
        max_batch_size: int = 64,
        max_num_tokens: int = 2048,
        scheduler_policy: str = MAX_UTILIZATION,
        sampler: Sampler | None = None,
        agreement: RankAgreement | None = None,
        make_control: MakeControl | None = None,
    ) -> None:
        if scheduler_policy not in POLICIES:
            raise UserError(f"unknown scheduler policy {scheduler_policy} ({nearest(scheduler_policy, POLICIES)})")
        self._runner = runner
        self._max_seq_len = max_seq_len
        self.config, null_pages = settle_null_entries(config, runner)
        config = self.config
        self.manager = KVCacheManager(
            runner.num_blocks,
            runner.num_layers,
            runner.tokens_per_block,
            -(-max_seq_len // runner.tokens_per_block),
            max_batch_size,
            config,
            make_matcher_factory(config, runner.tokens_per_block, boundaries) if config.matches else None,
            null_pages,
        )
        self.pressure = open_pressure(self.manager, config, runner, agreement)
        self._scheduler = Scheduler(
            self.manager,
            scheduler_policy,
            max_batch_size,
            max_num_tokens,
            getattr(runner, "chunk_unit_size", 1),
            self.pressure,
        )
        control = make_control(self.manager, config, runner) if make_control is not None else None
        self.sharing = Sharing(self.manager, config, agreement, control)
        # Set: stage 1 runs while the device computes the step, and its pairs are compared behind it.
        self._compare: Callable[[PairBatch], Distances] | None = (
            runner.compare if isinstance(runner, ComparingRunner) and not self.sharing.evicts else None
        )
        self._sampler = sampler or Sampler()
        self.last_batch: StepBatch | None = None
        self.has_failed = False
        self.stats = ExecutorStats()
        self._ids = itertools.count()
        self._lock = threading.Condition()
        self._submitted: deque[RequestState] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self,
        input_ids: list[int],
        params: SamplingParams = SamplingParams(),
        group: int | None = None,
        listener: Callable[[bool], None] | None = None,
    ) -> RequestHandle:
        """Queues a request.

        Args:
          group: a number that samples of one prompt have in common; under ``scope: group`` they share blocks. Requests
            with another prompt or number, or with none, share nothing with them: give no two tenants the same.
          listener: see ``RequestHandle``.

        Raises:
          UserError: an empty prompt, one that does not fit max_seq_len with its output, or a pool too small for it.
        """
        total = len(input_ids) + params.max_new_tokens
        if not input_ids or params.max_new_tokens < 1:
            raise UserError(
                f"a request needs a prompt and at least one new token, got {len(input_ids)} prompt tokens and "
                f"max_new_tokens {params.max_new_tokens}"
            )
        if total > self._max_seq_len:
            raise UserError(
                f"prompt and output must fit max_seq_len {self._max_seq_len}, got {len(input_ids)} + "
                f"{params.max_new_tokens} tokens (shorten the prompt, lower max_new_tokens, or build with a larger "
                f"--max-seq-len)"
            )
        needed, blocks = self.manager.blocks_for(total), self.manager.pool.num_usable
        if needed > blocks:
            raise UserError(
                f"the KV pool is too small for one request: {total} tokens need {needed} blocks of "
                f"{self._runner.tokens_per_block}, the pool has {blocks} (set --kv-cache-blocks {needed} or more)"
            )
        request_id = next(self._ids)
        handle = RequestHandle(request_id, listener)
        state = RequestState(request_id, list(input_ids), params, handle, group, tokens=list(input_ids))
        with self._lock:
            if self._stopping:
                raise UserError("the executor is shutting down, got a new request (submit before leaving its context)")
            self._submitted.append(state)
            self._lock.notify()
        return handle

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or in flight."""
        return bool(self._submitted or self._scheduler.waiting or self._scheduler.running)

    def status(self) -> ExecutorStatus:
        """Counts of this moment; safe from any thread, since it only reads."""
        running = list(self._scheduler.running)
        generating = sum(s.phase is Phase.GENERATION for s in running)
        pool = self.manager.pool
        return ExecutorStatus(
            num_active=len(running),
            num_waiting=len(self._submitted) + len(self._scheduler.waiting),
            num_context=len(running) - generating,
            num_context_tokens=sum(len(s.tokens) for s in running if s.phase is Phase.CONTEXT),
            num_generating=generating,
            num_pauses=self._scheduler.num_pauses,
            num_paused=sum(s.num_pauses > 0 for s in list(self._scheduler.waiting)),
            num_steps=self.stats.num_steps,
            num_finished=self.stats.num_finished,
            max_blocks=pool.num_usable,
            used_blocks=pool.num_used,
            tokens_per_block=self._runner.tokens_per_block,
            shared_blocks=self.manager.stats().shared,
            search_seconds=self.stats.search_seconds,
            num_candidates=self.sharing.policy.num_candidates,
            refused={**self.rejected, **self.manager.stats().refused},
            pressure=None if self.pressure is None else self.pressure.status(running),
        )

    @property
    def rejected(self) -> dict[str, int]:
        """Candidates that stage 2 turned down, by reason."""
        return dict(self.sharing.policy.rejected)

    def step(self) -> None:
        """One iteration: apply the last search's decisions, schedule, run, sample, finish."""
        started = time.perf_counter()
        self._take_submissions()
        self._drop_cancelled()
        self.sharing.apply()
        schedule = self._scheduler.schedule()
        if not schedule.contexts and not schedule.generations:
            return
        batch, states = self._make_batch(schedule)
        self.last_batch = batch
        output = self._runner.step(self._runner.prepare(batch))
        distances = output.block_distances
        if self._compare is not None:
            pairs = self.sharing.search(self.stats.num_steps)
            distances = None if pairs is None else self._compare(pairs)
        self._advance(schedule, states, output.logits)  # waits for the device
        self.sharing.take_distances(distances)
        self.sharing.take_attention(output.block_attention)
        seconds = self.sharing.seconds
        if self.pressure is not None:
            self.pressure.observe_attention(output.block_attention)
            seconds += self.pressure.seconds
        self.stats.record_step(started, time.perf_counter(), self.manager.pool.num_used, len(states), seconds)

    def run_until_idle(self) -> None:
        """Steps until every request has ended."""
        while self.has_work:
            self.step()

    def __enter__(self) -> Executor:
        self._thread = threading.Thread(target=self._loop, name="memshare-executor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Lets requests in flight end, then stops the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        try:
            while True:
                with self._lock:
                    while not self.has_work and not self._stopping:
                        self._lock.wait()
                if not self.has_work:
                    return
                self.step()
        except Exception as error:
            self.has_failed = True
            self._fail_all(error)
            raise

    def _fail_all(self, error: Exception) -> None:
        """An executor that stopped owes every caller an answer."""
        with self._lock:
            self._stopping = True
            states = [*self._submitted, *self._scheduler.waiting, *self._scheduler.running]
        for state in states:
            state.handle.finish(None, RuntimeError(f"the executor stopped: {error}"))

    def _take_submissions(self) -> None:
        with self._lock:
            while self._submitted:
                self._scheduler.add(self._submitted.popleft())

    def _is_cancelled(self, state: RequestState) -> bool:
        return state.handle.cancelled

    def _drop_cancelled(self) -> None:
        for state in [s for s in self._scheduler.waiting if self._is_cancelled(s)]:
            self._scheduler.waiting.remove(state)
            self.manager.forget_paused(state.request_id)
            self._end(state, "cancelled", in_cache=False)
        for state in [s for s in self._scheduler.running if self._is_cancelled(s)]:
            self._scheduler.finish(state)
            self._end(state, "cancelled", in_cache=True)

    def _make_batch(self, schedule: Schedule) -> tuple[StepBatch, list[RequestState]]:
        """Packs context chunks, then generation requests."""
        states = [s for s, _ in schedule.contexts] + schedule.generations
        chunks = [c for _, c in schedule.contexts] + [1] * len(schedule.generations)
        starts = [s.num_computed for s, _ in schedule.contexts] + [len(s.tokens) - 1 for s in schedule.generations]
        spans = list(zip(states, starts, chunks, strict=True))
        pairs = self.sharing.search(self.stats.num_steps) if self._compare is None else None
        request_ids, lengths = [s.request_id for s in states], np.array([b + c for _, b, c in spans], np.int32)
        self.manager.cross_bands(request_ids, lengths)
        observes = self.sharing.observes_attention or (self.pressure is not None and self.pressure.observes_attention)
        batch = StepBatch(
            input_ids=np.fromiter((t for s, b, c in spans for t in s.tokens[b : b + c]), np.int32, sum(chunks)),
            position_ids=np.fromiter((p for _, b, c in spans for p in range(b, b + c)), np.int32, sum(chunks)),
            num_contexts=len(schedule.contexts),
            chunk_lengths=np.array(chunks, np.int32),
            sequence_lengths=lengths,
            block_offsets=self.manager.block_offsets(request_ids),
            pairs=pairs,
            count_aliases=self.config.count_aliases,
            read_null=self.config.read_null,
            observe_attention=observes,
            context_lengths=np.array(
                [c for _, c in schedule.contexts] + [s.context_length for s in schedule.generations], np.int32
            ),
        )
        return batch, states

    def _advance(self, schedule: Schedule, states: list[RequestState], logits: torch.Tensor) -> None:
        """Moves every request of the step on by its chunk, and samples where a prompt is complete."""
        for state, chunk in schedule.contexts:
            state.num_computed += chunk
            state.context_length = state.num_computed
            self.manager.mark_computed(state.request_id, state.num_computed)
        for state in schedule.generations:
            state.num_computed = len(state.tokens)
            self.manager.mark_computed(state.request_id, state.num_computed)
        rows = [i for i, s in enumerate(states) if s.num_computed == len(s.tokens)]
        chosen = logits if len(rows) == len(states) else logits[rows]
        sampled = self._sampler.sample(chosen, [states[i] for i in rows])
        if self.pressure is not None:
            self.pressure.observe_tokens(chosen, [states[i] for i in rows], sampled)
        wanted = any(states[i].params.log_probs for i in rows)
        log_probs: Sequence[float | None] = token_log_probs(chosen, sampled) if wanted else [None] * len(rows)
        now = time.perf_counter()
        for row, token, log_prob in zip(rows, sampled, log_probs, strict=True):
            state = states[row]
            state.phase = Phase.GENERATION
            state.tokens.append(token)
            if state.first_token_at is None:
                state.first_token_at = now
            state.handle.push(token, log_prob if state.params.log_probs else None)
            if state.stops:
                self._scheduler.finish(state)
                self._end(state, "stop", in_cache=True)
            elif len(state.tokens) >= state.max_tokens:
                self._scheduler.finish(state)
                self._end(state, "length", in_cache=True)

    def _end(self, state: RequestState, reason: str, in_cache: bool) -> None:
        now = time.perf_counter()
        record = self.manager.remove_sequence(state.request_id) if in_cache else SharingRecord(0, 0)
        self._sampler.forget(state.request_id)
        if self.pressure is not None:
            self.pressure.end(state, reason)
        first = state.first_token_at if state.first_token_at is not None else now
        stats = RequestStats(
            first - state.submitted_at,
            now - state.submitted_at,
            len(state.prompt),
            state.num_generated,
            state.num_pauses,
            record,
        )
        self.stats.num_finished += 1
        self.stats.num_pauses = self._scheduler.num_pauses
        self.stats.num_recomputed_tokens = self._scheduler.num_recomputed_tokens
        state.handle.finish(
            RequestResult(
                state.request_id, state.tokens[len(state.prompt) :], reason, stats, tuple(state.handle.log_probs)
            )
        )
