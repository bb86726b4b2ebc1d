"""Rearranges rows of the block table on the device, behind the manager's own copy (TensorRT-LLM calls it each step).

The manager writes the positions of its list from left to right. A request that shares reads them in another order, some
several times: ``row[..., positions]``. The gather knows nothing of the encoding of entries, needs no pinned memory of
the manager's, and runs on the stream that fills the table, before a CUDA graph replays on it.

Which entry goes where changes when a row is set or other requests run, not in every step: the index is kept. A step
is two copies and one gather::

    table row r        | width entries |  ->  | width entries | entries of the null pages |  ->  index  ->  table row r
                        as written by it       ``_scratch``, row r of those that share
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
    """

    def __init__(self, max_requests: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros((max_requests, width), dtype=torch.int32, device=device)
        self._changed: dict[int, np.ndarray] = {}  # by slot, until the next table
        self._slots: dict[int, int] = {}
        self._free = list(range(max_requests - 1, -1, -1))
        self._null_entries: torch.Tensor | None = None
        self._ids: list[int] | None = None  # of the table that the index was made for; None = it has to be made
        self._place: dict[int, int] = {}  # slot -> which of the rows that share, in the index
        self._table_rows = self._begins = self._index = torch.zeros(0, dtype=torch.int64, device=device)
        self._are_first = False  # the rows that share are the table's first ones
        self._scratch = torch.zeros(0, dtype=torch.int32, device=device)

    @property
    def null_entries(self) -> torch.Tensor | None:
        """int32 ``[num_pools, 2, num_bands]``, entries that positions from ``width`` on name; None = there are none."""
        return self._null_entries

    @null_entries.setter
    def null_entries(self, entries: torch.Tensor | None) -> None:
        self._null_entries, self._ids = entries, None

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._slots

    def set_row(self, request_id: int, positions: np.ndarray) -> None:
        """Sets a request's positions, int ``[width]``; they hold from the next table on."""
        slot = self._slots.get(request_id)
        if slot is None:
            slot = self._slots[request_id] = self._free.pop()
            self._ids = None
        self._changed[slot] = positions

    def unread(self) -> list[int]:
        """Requests whose rows have changed since the last table."""
        return [request_id for request_id, slot in self._slots.items() if slot in self._changed]

    def forget(self, request_id: int) -> None:
        """Gives the request's row back; one that has none passes."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._changed.pop(slot, None)
            self._free.append(slot)
            self._ids = None

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
        ids, width = list(request_ids), self._rows.shape[1]
        changed = self._flush()
        if ids != self._ids:
            self._make_index(ids, table.shape[0])
            self._ids = ids
        elif renewed := [slot for slot in changed if slot in self._place]:
            self._renew_index(renewed)
        count = len(self._table_rows)
        if not count:
            return 0
        for pool, scratch in zip(table[..., :width], self._scratch, strict=True):
            old = pool[:count] if self._are_first else pool.index_select(0, self._table_rows)
            scratch[:count, :, :width].copy_(old)
            new = scratch.view(-1).index_select(0, self._index).view(count, 2, width)
            if self._are_first:
                pool[:count].copy_(new)
            else:
                pool.index_copy_(0, self._table_rows, new)
        return count

    def _make_index(self, ids: list[int], num_pools: int) -> None:
        """Makes the index of a table with these requests in its first rows."""
        slots = self._slots
        pairs = np.array([(row, slots[i]) for row, i in enumerate(ids) if i in slots], np.int64).reshape(-1, 2)
        device, width, count = self._rows.device, self._rows.shape[1], len(pairs)
        self._are_first = bool((pairs[:, 0] == np.arange(count)).all())
        pairs_there = on_device(torch.from_numpy(pairs), device)
        self._table_rows = pairs_there[:, 0].contiguous()
        bands = 0 if self.null_entries is None else self.null_entries.shape[2]
        shape = (num_pools, len(self._rows), 2, width + bands)
        if self._scratch.shape != shape:
            self._scratch = torch.zeros(shape, dtype=torch.int32, device=device)
            if self.null_entries is not None:
                self._scratch[..., width:] = self.null_entries[:, None]
        self._place = {slot: place for place, slot in enumerate(pairs[:, 1].tolist())}
        begins = torch.arange(2 * count, dtype=torch.int32, device=device) * (width + bands)
        self._begins = begins.view(count, 2, 1)
        self._index = (self._rows.index_select(0, pairs_there[:, 1])[:, None] + self._begins).view(-1)

    def _renew_index(self, slots: list[int]) -> None:
        """Brings the index up to date for rows that have changed; the same requests share."""
        pairs = np.array([(self._place[slot], slot) for slot in slots], np.int64).reshape(-1, 2)
        pairs_there = on_device(torch.from_numpy(pairs), self._rows.device)
        rows = self._rows.index_select(0, pairs_there[:, 1])[:, None] + self._begins.index_select(0, pairs_there[:, 0])
        self._index.view(len(self._place), 2, -1).index_copy_(0, pairs_there[:, 0], rows)

    def _flush(self) -> list[int]:
        """One copy to the device for all rows that changed since the last table; returns their slots."""
        if not self._changed:
            return []
        changed = list(self._changed)
        slots = torch.tensor(changed, dtype=torch.int64)
        rows = torch.from_numpy(np.stack(list(self._changed.values())).astype(np.int32))
        self._rows.index_copy_(0, on_device(slots, self._rows.device), on_device(rows, self._rows.device))
        self._changed.clear()
        return changed


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy through pinned memory, which torch keeps until the stream has read it: nothing here waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
