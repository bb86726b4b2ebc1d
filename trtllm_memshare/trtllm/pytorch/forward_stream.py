"""The stream of the forward passes, as the block tables show it, and when the last table had been read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class ForwardStream:
    """Whatever the manager calls its own stream: tables are written on that of the forward passes."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def table_written(self, table: torch.Tensor) -> None:
        """Notes the stream on which a table has just been filled and rearranged."""
        if table.is_cuda:
            self._stream = torch.cuda.current_stream(table.device)
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record(self._stream)

    def wait_for_table(self) -> None:
        """Returns when the device has read the manager's pinned rows for the last table."""
        if self._copied is not None:
            self._copied.synchronize()

    def enter(self) -> AbstractContextManager[Any]:
        """Makes it the current stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
