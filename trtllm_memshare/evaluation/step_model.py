"""What a GPU's steps would take: a bandwidth model beside the measured times of a run.

**Modelled, not measured.** A decode step reads the weights once and every page in use once; a step with context
computes as well. A pool of any size stands for the memory that a GPU has left beside the weights, so that a run of a
small model is read as one of a large model whose pool is as tight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_memshare.serving.request import RequestHandle


@dataclass(frozen=True)
class GpuModel:
    """DeepSeek-R1-Distill-Qwen-7B in bf16 on an H200: sizes and rates from data sheets; the shares of bandwidth and
    FLOP rate that kernels reach are assumptions."""

    name: str = "R1-Distill-Qwen-7B, bf16, H200"
    weights_bytes: float = 15.2e9
    parameters: float = 7.6e9
    pool_bytes: float = 110e9
    bandwidth: float = 4.8e12 * 0.8
    flops: float = 990e12 * 0.5
    overhead_s: float = 2e-3

    def step_seconds(self, num_tokens: int, pool_use: float) -> float:
        """Time of one step.

        Args:
          num_tokens: tokens that it computes, context and generation.
          pool_use: share of the pool that requests hold, in [0, 1].
        """
        reads = (self.weights_bytes + pool_use * self.pool_bytes) / self.bandwidth
        return max(reads, 2 * self.parameters * num_tokens / self.flops) + self.overhead_s


class ModelledTimes:
    """Adds up the modelled times of steps; when each request came, had its first token and ended.

    Args:
      machine: the model of a step.
    """

    def __init__(self, machine: GpuModel) -> None:
        self._machine = machine
        self._now = 0.0
        self._submitted: dict[Hashable, float] = {}
        self._first_token: dict[Hashable, float] = {}
        self._latency: dict[Hashable, float] = {}

    def submit(self, request_id: Hashable) -> None:
        """A request has come."""
        self._submitted[request_id] = self._now

    def step(self, num_tokens: int, pool_use: float) -> None:
        """One step has run, see ``GpuModel.step_seconds``."""
        self._now += self._machine.step_seconds(num_tokens, pool_use)

    def has_token(self, request_id: Hashable) -> None:
        """A request has a token, its first one or another."""
        self._first_token.setdefault(request_id, self._now - self._submitted[request_id])

    def end(self, request_id: Hashable) -> None:
        """A request has ended, now or earlier."""
        self._latency.setdefault(request_id, self._now - self._submitted[request_id])

    def knows(self, request_id: Hashable) -> tuple[bool, bool]:
        """Whether a request has had a token, and whether it has ended."""
        return request_id in self._first_token, request_id in self._latency

    def summary(self) -> dict[str, Any]:
        """Requests per second, percentiles of latency and the mean time to the first token, in modelled seconds."""
        latencies = list(self._latency.values())
        return {
            "machine": self._machine.name,
            "request_throughput_req_s": len(latencies) / self._now,
            "p50_latency_s": float(np.percentile(latencies, 50)),
            "p99_latency_s": float(np.percentile(latencies, 99)),
            "mean_first_token_s": float(np.mean(list(self._first_token.values()))),
        }


class ModelledClock:
    """The modelled times of a run of the executor, by two kernels: one skips pages that were given up, one reads them.

    A kernel that is not changed reads the null page for each of its entries. That page may stay in the card's cache, so
    such kernels lie in between. It takes tokens out of the handles' streams, which nobody else may read.

    Args:
      machine: the model of a step.
    """

    def __init__(self, machine: GpuModel) -> None:
        self._skipped, self._read = ModelledTimes(machine), ModelledTimes(machine)
        self._num_submitted = 0

    def tick(self, num_tokens: int, pool_use: float, null_use: float, handles: Sequence[RequestHandle]) -> None:
        """One step has run.

        Args:
          num_tokens, pool_use: see ``GpuModel.step_seconds``.
          null_use: entries of tables that stand for pages given up, as a share of the pool's blocks.
          handles: of every request that was submitted so far.
        """
        both = self._skipped, self._read
        for handle in handles[self._num_submitted :]:
            for times in both:
                times.submit(handle.request_id)
        self._num_submitted = len(handles)
        self._skipped.step(num_tokens, pool_use)
        self._read.step(num_tokens, pool_use + null_use)
        for handle in handles:
            had_token, has_ended = self._skipped.knows(handle.request_id)
            if not had_token and handle.drain()[0]:
                for times in both:
                    times.has_token(handle.request_id)
            if not has_ended and handle.future.done():
                for times in both:
                    times.end(handle.request_id)

    def summaries(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """See ``ModelledTimes.summary``: of a kernel that skips, and of one that reads."""
        return self._skipped.summary(), self._read.summary()
