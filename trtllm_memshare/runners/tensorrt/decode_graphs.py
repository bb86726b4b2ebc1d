"""CUDA graphs of pure decode steps through an engine.

Attention plugins read ``host_past_key_value_lengths`` while a step is enqueued, so a graph keeps the values of its
capture. As TensorRT-LLM does, they are set to the longest length rounded up: the kernels then launch enough thread
blocks for every step up to there, and those without work leave at once.

TensorRT's guide calls a graph undefined once the context that it was captured from is changed. So each graph has a
context of its own, which costs its activation memory; graphs are therefore made only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.tensorrt.bindings import rope_mode
from trtllm_memshare.runners.tensorrt.device import Device, Graph
from trtllm_memshare.runners.tensorrt.step_inputs import graph_kv_length
from trtllm_memshare.trtllm.engine.spec import EngineSpec

MAX_GRAPHS = 64
"""Most graphs, each with its context; steps that would need another run without one."""

BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))
"""Batch sizes that graphs are captured for; a batch is padded up to the next one."""


class DecodeGraphs:
    """Captures a graph for a batch size and rounded KV length when it is first met, then replays it.

    Args:
      device: records and replays.
      spec: of the engine, whose largest batch is the last bucket.
      new_context: makes an execution context for steps of that many tokens.
    """

    def __init__(self, device: Device, spec: EngineSpec, new_context: Callable[[int], Any]) -> None:
        self._device, self._spec, self._new_context = device, spec, new_context
        self._captured: dict[tuple[int, int, str], tuple[Graph, Any]] = {}

    def takes(self, batch: StepBatch) -> bool:
        """Whether a step is pure decode, small enough, and has a graph or may have one."""
        if batch.num_contexts or len(batch.chunk_lengths) > min(BUCKETS[-1], self._spec.max_batch_size):
            return False
        return len(self._captured) < MAX_GRAPHS or self._key(batch, self.bucket(batch)) in self._captured

    def _key(self, batch: StepBatch, bucket: int) -> tuple[int, int, str]:
        return bucket, graph_kv_length(batch, self._spec), rope_mode(batch)

    def bucket(self, batch: StepBatch) -> int:
        """The batch size that a batch is padded to."""
        return min(next(b for b in BUCKETS if b >= len(batch.chunk_lengths)), self._spec.max_batch_size)

    def run(self, batch: StepBatch, past_lengths: np.ndarray, enqueue: Callable[[Any], None]) -> None:
        """Replays the batch's graph. The first time the step runs as it is, and is then captured for later ones.

        TensorRT wants one plain enqueue at new shapes before it is captured.

        Args:
          batch: padded.
          past_lengths: int32 ``[batch]``, the step's ``host_past_key_value_lengths``; overwritten.
          enqueue: binds a context to the step and enqueues it.
        """
        key = self._key(batch, len(batch.chunk_lengths))
        if key in self._captured:
            self._captured[key][0].replay()
            return
        past_lengths[:] = key[1]
        context = self._new_context(key[0])
        enqueue(context)
        graph = self._device.new_graph()
        graph.capture(lambda: enqueue(context))
        self._captured[key] = (graph, context)
