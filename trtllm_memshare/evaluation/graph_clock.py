"""How much of a decode step is the model on the GPU: events around the replay of its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trtllm_memshare.runners.torch.decode_graph import CudaGraph


def _new_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


class GraphClock:
    """Makes graphs for a ``TorchRunner`` that note when each replay begins and ends on the stream.

    The step's input is copied before and its tokens are drawn after, so that neither counts; the graph's launch does,
    where the stream stands idle until then. A replay comes from the runner's step, in which the pool's device is the
    current one: so its stream is the one that both events are recorded on.

    Args:
      new_graph: makes what is timed; for tests without a GPU, as ``new_event``.
      new_event: makes an event.
    """

    def __init__(self, new_graph: Callable[[], Any] = CudaGraph, new_event: Callable[[], Any] = _new_event) -> None:
        self._make_graph, self._make_event = new_graph, new_event
        self._marks: list[tuple[Any, Any]] = []

    def new_graph(self) -> Any:
        """An empty graph, for the runner's argument of that name."""
        return _TimedGraph(self._make_graph(), self.timed)

    def timed(self, replay: Callable[[], None]) -> None:
        """Replays between two events."""
        begun, ended = self._make_event(), self._make_event()
        begun.record()
        replay()
        ended.record()
        self._marks.append((begun, ended))

    def take(self) -> list[float]:
        """Milliseconds of each replay since the last call; waits for the last of them."""
        marks, self._marks = self._marks, []
        if marks:
            marks[-1][1].synchronize()
        return [begun.elapsed_time(ended) for begun, ended in marks]


class _TimedGraph:
    def __init__(self, graph: Any, timed: Callable[[Callable[[], None]], None]) -> None:
        self._graph, self._timed = graph, timed

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See ``CudaGraph``."""
        captured: torch.Tensor = self._graph.capture(run)
        return captured

    def replay(self) -> None:
        self._timed(self._graph.replay)
