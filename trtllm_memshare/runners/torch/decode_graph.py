"""CUDA graphs of pure decode steps: one launch instead of a few thousand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch.attention import PagedStep
from trtllm_memshare.runners.torch.page_lists import PageLists
from trtllm_memshare.runners.torch.paged_decode import PagedDecode

BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))
"""Batch sizes that graphs are captured for; a batch is padded up to the next one."""


@dataclass
class _Captured:
    """One bucket: inputs at fixed addresses, the graph, its logits."""

    decode: PagedDecode
    step: PagedStep
    input_ids: torch.Tensor  # int64 [1, bucket]
    position_ids: torch.Tensor  # int64 [1, bucket]
    write_rows: torch.Tensor  # int64 [2, bucket, num_kv_heads]
    graph: Any
    logits: torch.Tensor  # [bucket, vocab_size]


class DecodeGraphs:
    """Captures a graph for a bucket when it is first met, then replays it.

    Padding repeats the first request, token, addresses and all: it writes the same values to the same rows, so no
    block has to be kept free for it.

    Args:
      forward: runs the model: ``(input_ids, position_ids, step) -> logits [batch, vocab_size]``.
      make_decode: makes the decode attention of a bucket.
      pool: the KV pool.
      dtype: of the model's activations.
      new_graph: makes an empty graph with ``capture`` and ``replay``; for tests without a GPU.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor, PagedStep], torch.Tensor],
        make_decode: Callable[[int], PagedDecode],
        pool: torch.Tensor,
        dtype: torch.dtype,
        new_graph: Callable[[], Any] | None = None,
    ) -> None:
        self._forward, self._make_decode, self._pool, self._dtype = forward, make_decode, pool, dtype
        self._new_graph = new_graph or CudaGraph
        self._captured: dict[int, _Captured] = {}

    def takes(self, batch: StepBatch) -> bool:
        """Whether a step is pure decode and small enough."""
        return batch.num_contexts == 0 and len(batch.chunk_lengths) <= BUCKETS[-1]

    def run(self, batch: StepBatch, write_rows: np.ndarray, pages: PageLists, scaling: float) -> torch.Tensor:
        """Logits ``[batch, vocab_size]`` of a decode step; valid until the next one.

        Args:
          batch: the step, without context requests.
          write_rows: int64 ``[2, batch, num_kv_heads]``, as ``StepPlan.write_rows``.
          pages: what each request reads.
          scaling: factor on the attention logits.
        """
        count = len(batch.chunk_lengths)
        bucket = next(b for b in BUCKETS if b >= count)
        found = self._captured.get(bucket)
        captured = found or self._allocate(bucket)
        pad = bucket - count
        for target, values in (
            (captured.input_ids, batch.input_ids[None]),
            (captured.position_ids, batch.position_ids[None]),
            (captured.write_rows, write_rows),
        ):
            target.copy_(torch.from_numpy(np.concatenate([values, np.repeat(values[:, :1], pad, axis=1)], axis=1)))
        captured.decode.plan(pages.padded(bucket), scaling)
        if found is None:
            self._capture(bucket, captured)
        captured.graph.replay()
        return captured.logits[:count]

    def _allocate(self, bucket: int) -> _Captured:
        device, num_kv_heads = self._pool.device, self._pool.shape[3]
        ids, positions = (torch.zeros((1, bucket), dtype=torch.int64, device=device) for _ in range(2))
        rows = torch.zeros((2, bucket, num_kv_heads), dtype=torch.int64, device=device)
        decode = self._make_decode(bucket)
        step = PagedStep.for_decode(self._pool, rows, decode, self._dtype)
        return _Captured(decode, step, ids, positions, rows, self._new_graph(), torch.empty(0))

    def _capture(self, bucket: int, captured: _Captured) -> None:
        """Runs once to warm up, which already writes this step's K and V, then records."""

        def run() -> torch.Tensor:
            return self._forward(captured.input_ids, captured.position_ids, captured.step)

        captured.logits = captured.graph.capture(run)
        self._captured[bucket] = captured


class CudaGraph:
    """``torch.cuda.CUDAGraph`` behind the two calls that are needed; both want its device to be the current one."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Warms up on a side stream, as capture wants it, then records; returns the output at its fixed address."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads of this process may allocate meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()
