"""The block tables that TensorRT-LLM writes: rearranged as they are written, and missed where they are not.

A row that changed holds from the next table on, and the pages that it no longer names are free at once. So a table must
come in every iteration. Main (November 2026) prepares a batch that has not changed in a shorter way; where it was read
that writes the table all the same, but a unit test of it, perhaps of a branch, expects one only where somebody opens a
page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch

from trtllm_memshare.trtllm.pytorch.forward_stream import ForwardStream
from trtllm_memshare.trtllm.pytorch.lost_requests import LostRequests
from trtllm_memshare.trtllm.pytorch.table_rows import TableRows


class BlockTables:
    """Those of one manager.

    Args:
      rows: what they read for requests that share.
      lost: takes requests whose rows cannot be vouched for.
      stream: told of each table.
      fail: told of an error, by place.

    Attributes:
      num: tables written so far, rearranged or not. ``num_fitted``: of which lengths were asked before.
      seconds: host time spent on them.
    """

    def __init__(
        self, rows: TableRows, lost: LostRequests, stream: ForwardStream, fail: Callable[[str, Exception], None]
    ) -> None:
        self._rows, self._lost, self._stream, self._fail = rows, lost, stream, fail
        self.num = self.num_fitted = 0
        self.seconds = 0.0
        self._last_ids: tuple[int, ...] = ()
        self._last_num = 0

    def shorter(self, request_ids: Sequence[int]) -> list[int] | None:
        """By how many tokens attention's sequences are shorter than their text; None = all are as long.

        To be asked before each table is written; raises nothing.
        """
        self.num_fitted += 1
        return self._rows.shorter(request_ids)

    def fail_lengths(self, request_ids: Sequence[int], error: Exception) -> None:
        """Loses those whose lengths could not be told: each reads and writes its own last page until it ends."""
        for request_id in self._rows.shortened().intersection(request_ids):
            self._lost.lose(request_id)
        self._fail("the lengths of sequences", error)

    def rearrange(self, table: torch.Tensor, request_ids: Sequence[int]) -> None:
        """Rearranges the table that the manager has just written, on the current stream; modifies it, raises nothing.

        Args:
          table: int32 ``[num_pools, >= len(request_ids), 2, max_blocks_per_seq]``, device.
          request_ids: of its rows; those that share nothing, dummies included, stay as they are.
        """
        started = time.perf_counter()
        self.num += 1
        try:
            self._rows.gather(table, request_ids)
        except Exception as error:  # every active request would fail with it
            for row, request_id in enumerate(request_ids):
                if request_id in self._rows:
                    self._lost.lose(request_id)
                    self._rows.overwrite(table, row, request_id)
            self._fail("the rearrangement of rows", error)
        self._stream.table_written(table)
        self.seconds += time.perf_counter() - started

    def look(self, active: Collection[int]) -> None:
        """Takes an iteration's requests that generate, and loses those whose rows or lengths the last one did not have.

        Where none of the last one's is left, the forward pass may have failed before it wrote a table.

        Args:
          active: their ids.

        Raises:
          RuntimeError: one of them went through the last iteration without a table.
        """
        is_missed = 0 < self.num == self._last_num and any(i in active for i in self._last_ids)
        self._last_ids, self._last_num = tuple(active), self.num
        if is_missed:
            for request_id in {*self._rows.unread(), *self._rows.shortened()}:
                self._lost.lose(request_id)
            raise RuntimeError("TensorRT-LLM ran an iteration without writing its block table")
