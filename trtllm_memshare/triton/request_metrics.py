"""What became of requests: outcomes and latencies, counted by prometheus-client.

Triton's own counters say nothing of them: for a model that answers later it counts every request as a success that took
as long as handing it over.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.events import QueueFullError

if TYPE_CHECKING:
    from trtllm_memshare.serving.request import RequestResult
    from trtllm_memshare.triton.token_requests import TokenRequest

OUTCOMES = ("completed", "cancelled", "refused", "queue_full", "failed")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000)


class OutcomeCounter:
    """Counts requests by how they ended; each is counted by the one process that ended it.

    Args:
      registry: where the counter is registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()
        self._requests = Counter("memshare_requests", "Requests by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)

    def count(self, outcome: str) -> None:
        """One more request that ended so."""
        self._requests.labels(outcome).inc()

    def count_error(self, error: BaseException) -> None:
        """One more request that ended with an error."""
        self.count(outcome_of(error))


class RequestMetrics(OutcomeCounter):
    """Outcomes and latencies.

    Args:
      registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._queue = histogram("memshare_queue_seconds", "From arrival to a place in the batch", _SECONDS)
        self._first = histogram("memshare_time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._token = histogram(
            "memshare_time_per_output_token_seconds", "Mean time per token after the first", _TOKEN_SECONDS
        )
        self._latency = histogram("memshare_request_seconds", "From arrival to the last token", _SECONDS)
        self._inputs = histogram("nv_llm_input_token_len", "Prompt tokens of a request", _TOKENS)
        self._outputs = histogram("nv_llm_output_token_len", "Generated tokens of a sequence", _TOKENS)

    def watch(self) -> Outcome:
        """Counts one request: how the ``with`` block ends is how the request ended."""
        return Outcome(self)

    def observe(self, request: TokenRequest, results: list[RequestResult]) -> None:
        """Latencies of a request that was answered, one set for each sequence."""
        self._inputs.observe(len(request.input_ids))
        for result in results:
            stats = result.stats
            self._outputs.observe(stats.num_output_tokens)
            self._queue.observe(stats.queue_s)
            self._latency.observe(stats.latency_s)
            if stats.num_output_tokens:
                self._first.observe(stats.ttft_s)
            if stats.num_output_tokens > 1:
                self._token.observe(stats.tpot_s)


class Outcome:
    """See ``RequestMetrics.watch``."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics, self._outcome, self._has_failed = metrics, "failed", False

    def end(self, request: TokenRequest, results: list[RequestResult], cancelled: bool) -> None:
        """The request was answered to its end, or was ``cancelled`` before it."""
        self._outcome = "cancelled" if cancelled else "completed"
        self._metrics.observe(request, results)

    def fail(self) -> None:
        """It counts as failed, however its block ends."""
        self._has_failed = True

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        outcome = self._outcome if error is None else outcome_of(error)
        self._metrics.count("failed" if self._has_failed else outcome)


def outcome_of(error: BaseException) -> str:
    """What a request that ended with ``error`` counts as."""
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, UserError):
        return "refused"
    left = isinstance(error, (GeneratorExit, asyncio.CancelledError))  # its client has gone away
    return "cancelled" if left else "failed"
