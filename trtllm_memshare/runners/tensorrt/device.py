"""The seam between the runner and CUDA: memory, copies, marks and graphs on one stream, through torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

ALIGNMENT = 256
"""Bytes that TensorRT wants the address of every tensor to be a multiple of (NvInferRuntime.h, setTensorAddress)."""


class Mark(Protocol):
    """A point of the stream."""

    def wait(self) -> None:
        """Returns when everything enqueued before it has run."""

    def seconds_since(self, earlier: Any) -> float:
        """Device time between two marks that have passed."""


class Graph(Protocol):
    """Work recorded once and enqueued again as a whole."""

    def capture(self, run: Callable[[], None]) -> None:
        """Records what ``run`` enqueues, without running it."""

    def replay(self) -> None:
        """Enqueues it."""


class Device(Protocol):
    """A device with one stream of the runner's own; copies are enqueued, never waited for.

    ``stream``: the handle for ``execute_async_v3``. ``compute_capability``: such as (9, 0).
    """

    description: str
    stream: int
    compute_capability: tuple[int, int]

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in device memory."""

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros in host memory that the device can copy from and to while the host goes on."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy between contiguous tensors of one size."""

    def mark(self) -> Mark:
        """Marks this point of the stream."""

    def begin(self) -> None:
        """What is enqueued from here on runs after the caller's own work on torch's current stream."""

    def end(self) -> None:
        """The caller's work from here on runs after what was enqueued."""

    def new_graph(self) -> Graph:
        """An empty graph."""


class CudaDevice:
    """The current CUDA device. See ``Device``; a stream beside torch's own, since TensorRT synchronises on stream 0."""

    def __init__(self, index: int | None = None) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.compute_capability = torch.cuda.get_device_capability(self._device)
        self.description = torch.cuda.get_device_name(self._device)
        self._stream = torch.cuda.Stream(self._device)
        self.stream = int(self._stream.cuda_stream)

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=self._device)  # the allocator aligns to 512 bytes
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return tensor

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).pin_memory()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> _CudaMark:
        return _CudaMark(self._stream)

    def begin(self) -> None:
        torch.cuda.set_device(self._device)  # TensorRT takes the thread's device, and a new thread's is 0
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def new_graph(self) -> _CudaGraph:
        return _CudaGraph(self._stream)


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: _CudaMark) -> float:
        return earlier._event.elapsed_time(self._event) * 1e-3


class _CudaGraph:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), stream

    def capture(self, run: Callable[[], None]) -> None:
        # Other threads of this process may allocate meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


def check_alignment(name: str, address: int) -> int:
    """``address``; raises RuntimeError if TensorRT would refuse it."""
    if address % ALIGNMENT:
        raise RuntimeError(f"{name} lies at {address:#x}, expected a multiple of {ALIGNMENT}")
    return address
