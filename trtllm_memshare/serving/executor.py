"""The executor: takes requests from any thread, runs steps, and gives sharing its turn between them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.sequence import NOTHING_SHARED
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.runners.protocol import ComparingRunner, Runner, StepBatch
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.serving.executor_loop import MAX_QUEUE_SIZE, ExecutorLoop, uncollected
from trtllm_memshare.serving.failures import FailedSteps, not_finite, request_failed
from trtllm_memshare.serving.null_entries import settle_null_entries
from trtllm_memshare.serving.pressure import open_pressure
from trtllm_memshare.serving.request import Phase, RequestHandle, RequestState, SamplingParams
from trtllm_memshare.serving.sampling import NO_TOKEN, Sampler
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION, Schedule, Scheduler
from trtllm_memshare.serving.sharing import MakeControl, Sharing
from trtllm_memshare.serving.statistics import ExecutorStats, ExecutorStatus
from trtllm_memshare.serving.status import read_status
from trtllm_memshare.serving.step_batch import make_batch
from trtllm_memshare.serving.validation import check_group, check_lengths, check_listener, check_params, check_prompt


class Executor(ExecutorLoop):
    """In-flight batching over one runner.

    Call ``step`` until ``has_work`` is False, or use it as a context manager. ``submit`` is safe from any thread.

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
      max_queue_size: most requests that wait at once.
      make_control: for experiments: makes the control that ``config`` names.

    Attributes:
      last_batch: of the last step that ran the model, None before the first.
      pressure: gives up pages when the pool runs short; None where the settings ask for none.

    Raises:
      UserError: limits that cannot hold (``Scheduler``), or a control in the settings without ``make_control``.
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
        max_queue_size: int = MAX_QUEUE_SIZE,
        make_control: MakeControl | None = None,
    ) -> None:
        self._runner, self._max_seq_len, self._failed_steps = runner, max_seq_len, FailedSteps()
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
        control = None if make_control is None else make_control(self.manager, config, runner)
        self.sharing = Sharing(self.manager, config, agreement, control)
        # Set: stage 1 runs while the device computes the step, and its pairs are compared behind it.
        self._compare: Callable[[PairBatch], Distances] | None = (
            runner.compare if isinstance(runner, ComparingRunner) and not self.sharing.evicts else None
        )
        self._sampler = sampler or Sampler()
        self.last_batch: StepBatch | None = None
        self.stats = ExecutorStats()
        self._ids = itertools.count()
        super().__init__(self._scheduler, max_queue_size)

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
          UserError: a value that cannot be followed (see ``validation``), a prompt that does not fit max_seq_len with
            its output, or a pool too small for it.
          QueueFullError: too many requests wait.
        """
        input_ids = check_prompt(input_ids, self._runner.vocab_size)
        params = check_params(params, self._runner.vocab_size, self.config)
        group = check_group(group)
        check_listener(listener)
        at_floor = None if self.pressure is None else self.pressure.blocks_at_floor(len(input_ids), params)
        check_lengths(len(input_ids), params.max_new_tokens, self._max_seq_len, self.manager, at_floor)
        request_id = next(self._ids)
        handle = RequestHandle(request_id, listener, self._note_cancelled, self._steps_elsewhere)
        self._queue(RequestState(request_id, input_ids, params, handle, group, tokens=list(input_ids)))
        return handle

    def status(self) -> ExecutorStatus:
        """Counts of this moment; safe from any thread, since it only reads."""
        failed, seconds = self._failed_steps.num_failed, self.step_seconds
        return read_status(
            self._scheduler,
            len(self._submitted),
            self.manager,
            self.sharing,
            self.pressure,
            self.stats,
            failed,
            seconds,
        )

    @property
    def rejected(self) -> dict[str, int]:
        """Candidates that stage 2 turned down, by reason."""
        return dict(self.sharing.policy.rejected)

    def step(self) -> None:
        """One iteration: apply the last search's decisions, schedule, run, sample, finish."""
        started = time.perf_counter()
        looks = self._looks_for_cancelled()  # first: who is cancelled before it is taken is then found in the next step
        self._take_submissions()
        if looks:
            self._drop_cancelled()
        self.sharing.apply()
        schedule = self._scheduler.schedule()
        self._fail_admissions()
        if not schedule.contexts and not schedule.generations:
            return
        states = schedule.states
        pairs = self.sharing.search(self.stats.num_steps) if self._compare is None else None
        observes = self.sharing.observes_attention or (self.pressure is not None and self.pressure.observes_attention)
        self.last_batch = batch = make_batch(schedule, self.manager, pairs, self.config, observes)
        try:
            output = self._runner.step(self._runner.prepare(batch))
            distances = output.block_distances
            if self._compare is not None:
                pairs = self.sharing.search(self.stats.num_steps)
                distances = None if pairs is None else self._compare(pairs)
            self._advance(schedule, states, output.logits)  # waits for the device
            self._failed_steps.succeeded()
        except UserError:
            raise  # settings that this runner cannot serve with concern every request
        except Exception as error:
            self._fail_batch(states, error)
            return
        self.sharing.take_distances(distances)
        self.sharing.take_attention(output.block_attention)
        seconds = self.sharing.seconds
        if self.pressure is not None:
            self.pressure.observe_attention(output.block_attention)
            seconds += self.pressure.seconds
        self.stats.record_step(started, time.perf_counter(), self.manager.pool.num_used, len(states), seconds)

    def _fail_batch(self, states: list[RequestState], error: Exception) -> None:
        """Ends the requests of a step that failed; raises ``error`` again after too many in a row."""
        running = set(self._scheduler.running)
        for state in states:
            failed = request_failed(state.request_id, "a step that it was part of failed", error)
            if state in running:
                self._fail(state, failed)
            elif state.request_id in self._unanswered:  # it was being taken out
                self.manager.abandon(state.request_id)
                self._forget(state)
                self._answer_error(state, failed)
        self.sharing.take_distances(None)
        self._failed_steps.failed(error, len(states))

    def _fail_admissions(self) -> None:
        """Answers requests that could not be added to the cache."""
        failed, self._scheduler.failed = self._scheduler.failed, []
        for state, error in failed:
            self._forget(state)
            self._answer_error(state, request_failed(state.request_id, "it could not be added to the cache", error))

    def _fail(self, state: RequestState, error: Exception) -> None:
        """Ends one running request with an error and frees what it holds."""
        self._scheduler.finish(state)
        self.manager.remove_sequence(state.request_id)
        self._forget(state)
        self._answer_error(state, error)

    def _forget(self, state: RequestState) -> None:
        self._sampler.forget(state.request_id)
        if self.pressure is not None:
            self.pressure.forget(state.request_id, is_last=not self.has_work)

    def _answer_error(self, state: RequestState, error: Exception) -> None:
        self._count_end()
        self.stats.num_failed += self._answer(state, None, error)

    def _drop_cancelled(self) -> None:
        waiting = self._scheduler.waiting
        dropped, kept = list[RequestState](), list[RequestState]()
        for state in waiting:  # one look at each: between two, its caller could cancel it, and it would be in neither
            (dropped if self._is_cancelled(state) else kept).append(state)
        if dropped:
            waiting.clear()
            waiting.extend(kept)
        with uncollected(len(dropped)):
            for state in dropped:
                self.manager.forget_paused(state.request_id)
                self._end(state, "cancelled", in_cache=False)
        for state in [s for s in self._scheduler.running if self._is_cancelled(s)]:
            self._scheduler.finish(state)
            self._end(state, "cancelled", in_cache=True)

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
        complete = [states[i] for i in rows]
        sampled = self._sampler.sample(chosen, complete)
        log_probs_of = functools.partial(self._sampler.log_probs_of, chosen, sampled)
        known = log_probs_of() if any(s.params.log_probs for s in complete) else None
        if self.pressure is not None and self.pressure.observes_tokens:
            self.pressure.observe_tokens(complete, log_probs_of if known is None else lambda: known)
        log_probs: Sequence[float | None] = [None] * len(rows) if known is None else known.tolist()
        now = time.perf_counter()
        for state, token, log_prob in zip(complete, sampled, log_probs, strict=True):
            if token == NO_TOKEN:
                self._fail(state, self._why_no_token(state))
                continue
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

    def _why_no_token(self, state: RequestState) -> Exception:
        error = self._sampler.errors.get(state.request_id)
        if error is None:
            return not_finite(state.request_id, state.num_computed)
        return request_failed(state.request_id, "its next token could not be chosen", error)

    def _end(self, state: RequestState, reason: str, in_cache: bool) -> None:
        now = time.perf_counter()
        record = self.manager.remove_sequence(state.request_id) if in_cache else NOTHING_SHARED
        self._forget(state)
        self._count_end()
        self.stats.num_failed += self._answer(state, state.result(reason, record, now))

    def _count_end(self) -> None:
        self.stats.num_finished += 1
        self.stats.num_pauses = self._scheduler.num_pauses
        self.stats.num_recomputed_tokens = self._scheduler.num_recomputed_tokens
