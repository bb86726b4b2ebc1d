"""Rearranges rows of the block table on the device, behind the manager's own copy (TensorRT-LLM calls it each step).

The manager writes the positions of its list from left to right. A request that shares reads them in another order, some
several times: ``row[..., positions]``. The gather knows nothing of the encoding of entries, needs no pinned memory of
the manager's, and runs on the stream that fills the table, before a CUDA graph replays on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class RowMap:
    """One row of positions for each request that shares.

    Args:
      max_requests: most requests that share at once.
      width: entries of a table's row.
      device: of the table.

    Attributes:
      null_entries: int32 ``[num_pools, 2, num_bands]``, entries of the null pages, which positions from ``width`` on
        name; None = there are none.
    """

    def __init__(self, max_requests: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros((max_requests, width), dtype=torch.int32, device=device)
        self._changed: dict[int, np.ndarray] = {}  # by slot, until the next table
        self._slots: dict[int, int] = {}
        self._free = list(range(max_requests - 1, -1, -1))
        self.null_entries: torch.Tensor | None = None

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._slots

    def set_row(self, request_id: int, positions: np.ndarray) -> None:
        """Sets a request's positions, int ``[width]``; they hold from the next table on."""
        slot = self._slots.get(request_id)
        if slot is None:
            slot = self._slots[request_id] = self._free.pop()
        self._changed[slot] = positions

    def forget(self, request_id: int) -> None:
        """Gives the request's row back; one that has none passes."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._changed.pop(slot, None)
            self._free.append(slot)

    def gather(self, table: torch.Tensor, request_ids: Sequence[int]) -> int:
        """Rearranges the rows of requests that share; ids that are not known pass through.

        Args:
          table: int32 ``[num_pools, >= len(request_ids), 2, >= width]``, filled by the manager; modified.
          request_ids: of the table's first rows.

        Returns:
          How many rows were rearranged.
        """
        if not self._slots:
            return 0
        self._flush()
        slots = self._slots
        pairs = [(row, slots[i]) for row, i in enumerate(request_ids) if i in slots]
        if not pairs:
            return 0
        index = _on_device(torch.tensor(pairs, dtype=torch.int64), table.device)
        rows, width = index[:, 0], self._rows.shape[1]
        positions = self._rows[index[:, 1]].long()
        old = table[:, rows, :, :width]
        readable = old
        if self.null_entries is not None:
            null = self.null_entries[:, None].expand(-1, len(rows), -1, -1)
            readable = torch.cat([old, null], 3)
        table[:, rows, :, :width] = readable.gather(3, positions[None, :, None, :].expand(old.shape))
        return len(pairs)

    def _flush(self) -> None:
        """One copy to the device for all rows that changed since the last table."""
        if not self._changed:
            return
        slots = torch.tensor(list(self._changed), dtype=torch.int64)
        rows = torch.from_numpy(np.stack(list(self._changed.values())).astype(np.int32))
        self._rows.index_copy_(0, _on_device(slots, self._rows.device), _on_device(rows, self._rows.device))
        self._changed.clear()


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy through pinned memory, which torch keeps until the stream has read it: nothing here waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
