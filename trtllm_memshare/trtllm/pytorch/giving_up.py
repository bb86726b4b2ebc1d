"""Pages that requests give up: handed back to TensorRT-LLM's manager, with the rows of the block table to match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.trtllm.pytorch.pressure import Choice
from trtllm_memshare.trtllm.pytorch.requests import KnownRequests
from trtllm_memshare.trtllm.pytorch.table_rows import TableRows
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap


class GivingUp:
    """Carries out decisions for one manager.

    Args:
      manager: this project's, over virtual blocks.
      requests: what is known of TensorRT-LLM's.
      tail: frees pages.
      rows: of the block table.
      shares: False = count what would go, and change nothing.
      lose: told of a request whose row cannot be vouched for.

    Attributes:
      num_resumed: pages that requests gave up again when they came back from a pause.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        requests: KnownRequests,
        tail: TailSwap,
        rows: TableRows,
        shares: bool,
        lose: Callable[[int], None],
    ) -> None:
        self._manager, self._requests, self._tail, self._rows = manager, requests, tail, rows
        self._shares, self._lose = shares, lose
        self._again: dict[int, tuple[np.ndarray, Mapping[int, int]]] = {}  # what paused requests had given up, to whom
        self._counted: dict[int, set[int]] = {}  # by request: pages that shadow has counted
        self.num_resumed = 0

    def retire(self, choice: Choice, step: int) -> None:
        """Gives pages up for need: their entries name their donors' pages from then on, without one a null page.

        Raises:
          Exception: the first problem of any request, after all of them were carried out.
        """
        if not self._shares:
            for request_id, pages, _ in choice:
                counted = self._counted.setdefault(request_id, set())
                self._manager.count_shadow(list(set(pages) - counted))
                counted.update(pages)
            return
        retired = list[tuple[int, list[int]]]()
        try:
            for request_id, pages, donors in choice:
                self._manager.retire(request_id, np.array(pages, np.int32), donors)
                retired.append((request_id, pages))
        finally:  # what is retired has its row set and its pages freed, whatever became of the next one
            self.hand_back(retired, step)

    def hand_back(self, retired: Sequence[tuple[int, list[int]]], step: int) -> None:
        """Frees pages that the cache has given up, and sets the rows that go with it; both, or a request is lost.

        Args:
          retired: logical pages by request.
          step: number of this iteration.
        """
        problem = None
        for request_id, pages in retired:
            try:
                self._tail.give_up(self._requests[request_id], pages)
                self._rows.set(request_id, step)
            except Exception as error:  # what was decided for the others has to be carried out all the same
                problem = problem or error
                self._lose(request_id)
        if problem is not None:
            raise problem

    def remember(self, request: Any) -> None:
        """Notes what a request that is paused had given up; it stays given up when the request comes back."""
        request_id = request.py_request_id
        if getattr(request.state, "name", "") == "GENERATION_COMPLETE":
            self._again.pop(request_id, None)
            self._counted.pop(request_id, None)
        elif self._requests.get(request_id) is not None:
            null = np.flatnonzero(self._manager.pool.is_null[self._manager.block_table(request_id)])
            donors = self._manager.donors(request_id)
            if len(pages := np.union1d(null, np.array(list(donors), np.int64))):
                self._again[request_id] = pages, donors

    def retire_again(self, step: int) -> None:
        """Paused requests that are back give up what they had given up before."""
        for request_id in [i for i in self._again if self._requests.get(i) is not None]:
            pages, donors = self._again.pop(request_id)
            first, full, _ = self._manager.generated_pages(request_id)
            pages = pages[(pages >= first) & (pages < full)].tolist()
            again = [p for p in pages if not self._manager.is_retired(request_id, p)]  # some went while it was off
            if again:
                self.retire([(request_id, again, donors)], step)
                self.num_resumed += len(again)
