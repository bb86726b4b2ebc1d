"""The executor behind the models: takes requests, answers as tokens come.

All of it runs on one asyncio loop; the executor computes in a thread of its own.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestHandle, RequestResult
from trtllm_memshare.triton.events import QueueFullError, TokenEvent
from trtllm_memshare.triton.loop import TokenStream
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import MAX_GROUP, Limits, TokenRequest, parse_token_request


class ExecutorService:
    """Runs requests within the limits of the deployment.

    Args:
      executor: running.
      limits: of the deployment.
      stop_token_ids: the model's.
      tokens_per_block: of the pool.
      exclude_input: see ``parse_token_request``.
      metrics: told of every request and how it ended.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        stop_token_ids: tuple[int, ...],
        tokens_per_block: int,
        exclude_input: bool,
        metrics: RequestMetrics,
    ) -> None:
        self._executor, self.limits, self._metrics = executor, limits, metrics
        self._stop_token_ids, self._tokens_per_block, self._exclude_input = (
            stop_token_ids, tokens_per_block, exclude_input)  # fmt: skip
        self._num_active, self._satisfied, self._failed = 0, set[RequestHandle](), set[str]()
        self._by_label: defaultdict[str, set[RequestHandle]] = defaultdict(set)
        self._own_groups = itertools.count(MAX_GROUP + 1)

    def parse(self, tensors: RequestTensors) -> TokenRequest:
        """One prompt's inputs as a request.

        Raises:
          UserError: see ``parse_token_request``; or the settings of the engine know neither groups nor pressure.
        """
        request = parse_token_request(tensors, self.limits, self._stop_token_ids, self._exclude_input)
        if request.group is not None and self._executor.config.scope != "group":
            raise UserError(
                f"memshare_group needs an engine whose memshare.json has scope group, got scope "
                f"{self._executor.config.scope} (build the engine with that setting, or leave memshare_group out)"
            )
        if request.params.min_kept is not None and not self._executor.config.pressure:
            raise UserError(
                f"memshare_min_kept needs an engine whose memshare.json has preset pressure, got preset "
                f"{self._executor.config.preset} (build the engine with that preset, or leave memshare_min_kept out)"
            )
        return request

    async def answer(self, tensors: RequestTensors, label: str = "") -> AsyncGenerator[TokenEvent, None]:
        """Events of one prompt. Leaving early cancels it.

        Args:
          tensors: inputs of the model `tensorrt_llm`.
          label: what ``stop`` will know it by; several requests may have the same, empty = none.

        Raises:
          QueueFullError: too many requests are in the system.
          UserError: see ``parse`` and ``Executor.submit``.
          RuntimeError: the executor stopped.
        """
        with self._metrics.watch() as outcome:
            request = self.parse(tensors)
            handles = list[RequestHandle]()
            try:
                stream = TokenStream(request.streaming)
                self._submit(request, stream, handles, label)
                async for event in self._events(request, stream, handles):
                    yield event
                left = any(h.result().finish_reason == "cancelled" and h not in self._satisfied for h in handles)
                outcome.end(request, [h.result() for h in handles], left)
            finally:
                if label in self._failed:
                    self._failed.discard(label)
                    outcome.fail()
                self._num_active -= len(handles)
                self._satisfied.difference_update(handles)
                for handle in handles:
                    self._by_label[label].discard(handle)
                    if not handle.future.done():
                        handle.cancel()
                if not self._by_label[label]:
                    del self._by_label[label]

    def stop(self, label: str) -> None:
        """Ends every request of a label at its next step."""
        for handle in self._by_label.get(label, ()) if label else ():
            handle.cancel()

    def cancel(self, label: str, sequence_index: int) -> None:
        """Ends one sequence of the one request that has this label; a request that ended is ignored.

        Its reader has all it wants, a text before a stop word: for the metrics that is no cancelled request.
        """
        handles = self._by_label.get(label, ())
        if handle := next(iter(sorted(handles, key=lambda h: h.request_id)[sequence_index:]), None):
            self._satisfied.add(handle)
            handle.cancel()

    def fail(self, label: str) -> None:
        """The one request that has this label is about to be left for an error of its reader, not by its client."""
        if label in self._by_label:
            self._failed.add(label)

    def _submit(self, request: TokenRequest, stream: TokenStream, handles: list[RequestHandle], label: str) -> None:
        limit, count = self.limits.max_requests, request.num_sequences
        if count > limit:
            raise UserError(
                f"num_return_sequences must be at most {limit}, the requests that this server holds, got {count} "
                f"(ask for fewer)"
            )
        if self._num_active + count > limit:
            raise QueueFullError(
                f"the queue is full: {limit} requests are in the system, the limit of max_queue_size plus the engine's "
                f"batch size (try again later)"
            )
        group = request.group
        if group is None and count > 1 and self._executor.config.scope == "group":
            group = next(self._own_groups)  # several answers to one prompt are what sharing between requests is for
        for index in range(count):
            params = request.params.with_seed(request.params.seed + index)
            handle = self._executor.submit(request.input_ids, params, group, stream.listener)
            handles.append(handle)
            self._num_active += 1
            self._by_label[label].add(handle)

    async def _events(
        self, request: TokenRequest, stream: TokenStream, handles: list[RequestHandle]
    ) -> AsyncGenerator[TokenEvent, None]:
        arrived = time.time_ns()
        held = [list(request.input_ids) if request.echo_input else [] for _ in handles]
        num_logged = [0] * len(handles)
        running = set(range(len(handles)))
        while running:
            await stream.wait()
            for index in sorted(running):
                handle = handles[index]
                tokens, ended = handle.drain()
                held[index] += tokens
                if not ended and not (request.streaming and held[index]):
                    continue
                result = handle.result() if ended else None  # raises if the executor stopped
                running -= {index} if ended else set()
                until = len(handle.log_probs) if ended else num_logged[index] + len(tokens)
                yield TokenEvent(
                    held[index],
                    index,
                    result.finish_reason if result else "",
                    not running,
                    handle.log_probs[num_logged[index] : until],
                    self._figures(request, result, arrived) if result else {},
                )
                held[index], num_logged[index] = [], until

    def _figures(self, request: TokenRequest, result: RequestResult, arrived: int) -> dict[str, int]:
        """Counts, and times in nanoseconds since the epoch, under TensorRT-LLM's names."""
        stats = result.stats
        counts = {}
        if request.num_input_tokens or request.perf_metrics:
            counts["num_input_tokens"] = stats.num_prompt_tokens
        if request.num_output_tokens or request.perf_metrics:
            counts["num_output_tokens"] = stats.num_output_tokens
        if not request.perf_metrics:
            return counts
        allocated = -(-(stats.num_prompt_tokens + stats.num_output_tokens) // self._tokens_per_block)
        return {
            **counts,
            "kv_cache_alloc_new_blocks": allocated,
            "kv_cache_reused_blocks": 0,
            "kv_cache_alloc_total_blocks": allocated,
            "memshare_retired_pages": stats.sharing.retired_blocks,
            "memshare_peak_pages": stats.sharing.peak_blocks,
            "memshare_num_pauses": stats.num_pauses,
            "total_accepted_draft_tokens": 0,
            "total_draft_tokens": 0,
            "arrival_time_ns": arrived,
            "first_scheduled_time_ns": arrived + int(stats.queue_s * 1e9),
            "first_token_time_ns": arrived + int(stats.ttft_s * 1e9),
            "last_token_time_ns": arrived + int(stats.latency_s * 1e9),
        }


class LocalCall:
    """A ``Call`` of an ``ExecutorService`` in this process.

    Args:
      service: what answers.
      tensors: inputs of the model `tensorrt_llm`.
    """

    def __init__(self, service: ExecutorService, tensors: RequestTensors) -> None:
        self._service, self._tensors = service, tensors
        self._label = f"local {id(self)}"

    def events(self) -> AsyncGenerator[TokenEvent, None]:
        return self._service.answer(self._tensors, self._label)

    def cancel(self, sequence_index: int) -> None:
        self._service.cancel(self._label, sequence_index)

    def fail(self) -> None:
        self._service.fail(self._label)
