"""The row of the block table of each request that shares: what it reads, and what it falls back to when all is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.trtllm.pytorch.agenda import Agenda
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.null_rows import NullRows
from trtllm_memshare.trtllm.pytorch.requests import KnownRequests
from trtllm_memshare.trtllm.pytorch.row_map import RowMap
from trtllm_memshare.trtllm.pytorch.skipped_rows import SkippedRows


class TableRows:
    """Rows of one manager's table.

    Args:
      backend: of TensorRT-LLM's manager.
      manager: this project's, over virtual blocks.
      requests: what is known of TensorRT-LLM's.
      null_rows: how rows forget what was given up; None = nothing is.

    Attributes:
      skips: rows are shorter than the text, so that ``shorter`` has to be asked before each table.
    """

    def __init__(
        self,
        backend: CacheBackend,
        manager: KVCacheManager,
        requests: KnownRequests,
        null_rows: NullRows | SkippedRows | None,
    ) -> None:
        self._backend, self._manager, self._requests, self._null = backend, manager, requests, null_rows
        self._map = RowMap(backend.max_batch_size, backend.max_blocks_per_seq, backend.pool.device)
        self._crossings = Agenda()  # of bands: when the newest token may reach the next one
        self._width = backend.max_blocks_per_seq
        self.skips = isinstance(null_rows, SkippedRows)
        self._shorter: dict[int, int] = {}  # tokens
        self._asked: list[int] | None = None  # whose lengths, since the last table

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._map

    def take_null_pages(self, promised: Callable[[], int], was_idle: bool) -> bool:
        """Takes the null pages if that has not been done yet; False while there is no room for them.

        Args:
          promised: counts what ``NullRows.take`` leaves; asked only if they are yet to be taken.
          was_idle: nobody generated until now, so that what the pool held may be gone.
        """
        if self._null is None or isinstance(self._null, SkippedRows):
            return True
        if self._null.entries is None:
            if not self._null.take(promised()):
                return False
            self._map.null_entries = self._null.entries
        elif was_idle:
            self._null.write_again()
        return True

    def set(self, request_id: int, step: int) -> None:
        """Sets a request's row to what the cache holds for it; it holds from the next table on.

        Args:
          request_id: a known request.
          step: number of this iteration, from which the crossing of its band is reckoned.
        """
        known = self._requests[request_id]
        if self._null is not None:
            # With the overlap scheduler the newest query is one position further than the host knows. Without it the
            # next band is entered a position early, which turns nothing.
            position = min(known.request.max_beam_num_tokens, self._null.pages.bands[-1] - 1)
            self._manager.cross_bands([request_id], [position + 1])
        table = self._manager.block_table(request_id)
        is_null = self._manager.pool.is_null[table]
        origins = np.where(is_null, 0, self._manager.origin_blocks(request_id))
        row = known.pages.row(origins, self._width)
        if self._null is not None and is_null.any():
            if entries := self._null.place(row, table, is_null):
                self._shorter[request_id] = entries * self._manager.tokens_per_block
            self._crossings.expect(request_id, step + max(1, self._null.pages.end_of_band(position) - position))
        self._map.set_row(request_id, row)

    def cross(self, step: int, lose: Callable[[int], None]) -> None:
        """Moves null entries of requests whose newest token enters another band in this iteration.

        Args:
          lose: told of a request whose row cannot be vouched for.

        Raises:
          Exception: the first problem of any request, after all of them have crossed.
        """
        problem = None
        for request_id in self._crossings.due(step):
            if self._requests.get(request_id) is not None:
                try:
                    self.set(request_id, step)
                except Exception as error:  # nobody expects the others again, and they would read the band before
                    problem = problem or error
                    lose(request_id)
        if problem is not None:
            raise problem

    def set_own_page(self, request_id: int) -> None:
        """Lets a request that is lost read and write the last page of its own list, until it ends."""
        self._crossings.forget(request_id)
        self._shorter.pop(request_id, None)
        self._map.set_row(request_id, np.full(self._width, self._own_page(request_id)))

    def unread(self) -> list[int]:
        """See ``RowMap.unread``."""
        return self._map.unread()

    def forget(self, request_id: int) -> None:
        self._crossings.forget(request_id)
        self._shorter.pop(request_id, None)
        self._map.forget(request_id)

    def shorter(self, request_ids: Sequence[int]) -> list[int] | None:
        """By how many tokens rows of the next table are shorter than their requests' text; None = all are as long."""
        self._asked = list(request_ids)
        return [self._shorter.get(request_id, 0) for request_id in request_ids] if self._shorter else None

    def shortened(self) -> frozenset[int]:
        """Requests whose rows are shorter than their text."""
        return frozenset(self._shorter)

    def gather(self, table: torch.Tensor, request_ids: Sequence[int]) -> None:
        """See ``RowMap.gather``.

        Raises:
          RuntimeError: a row is shorter than its text and nobody asked by how much the rows of this table are.
        """
        asked, self._asked = self._asked, None
        if self._shorter and asked != list(request_ids) and any(i in self._shorter for i in request_ids):
            raise RuntimeError("a block table was written without the lengths of its rows")
        self._map.gather(table, request_ids)

    def overwrite(self, table: torch.Tensor, row: int, request_id: int) -> None:
        """Does for one row of a table what ``set_own_page`` does for those to come; modifies ``table``."""
        table[:, row] = table[:, row, :, self._own_page(request_id)].unsqueeze(-1)

    def _own_page(self, request_id: int) -> int:
        """The last position of a request's list: a page that nobody else reads."""
        return max(0, len(self._backend.pages(request_id)) - 1)
