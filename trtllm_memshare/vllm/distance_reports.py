"""Distances of whole pages, on the worker, and the reports that tell the scheduler of them.

Pages are compared when the scheduler asks, each with those that are there then, and the answer rides back on the step's
output. With tensor parallelism a rank sees its own KV heads, and the rank that reports speaks for all.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trtllm_memshare.vllm.page_report import PageDistances, PageReport
from trtllm_memshare.vllm.update import MemShareUpdate


class ComparesBlocks(Protocol):
    """Compares blocks of vLLM's pool; see ``CachePages``."""

    def distances(self, new_blocks: list[int], old_blocks: list[int]) -> np.ndarray:
        """float32 ``[new, old]``."""


class DistanceReports:
    """Which pages of each request were compared and are there still. Answers as ``PageReports`` does."""

    def __init__(self, blocks: ComparesBlocks) -> None:
        self._blocks = blocks
        self._pages: dict[str, list[int]] = {}

    def answer(
        self, update: MemShareUpdate, block_ids: dict[str, np.ndarray], ended: set[str]
    ) -> dict[str, PageReport]:
        """Reports of the requests that were asked about, by id.

        Args:
          update: names full pages to take in, and pages that are retired.
          block_ids: tables of the requests that were asked about, before the update is applied.
          ended: requests that are no more.
        """
        for request_id in ended:
            self._pages.pop(request_id, None)
        reports = {}
        for request_id in update.asked.keys() & block_ids.keys():
            new, table = update.asked[request_id], block_ids[request_id]
            # After a pause the scheduler asks about all of them anew.
            there = [page for page in self._pages.get(request_id, []) if page < new[0]] + new
            distance = self._blocks.distances(table[new].tolist(), table[there].tolist())
            reports[request_id] = PageReport(distances=PageDistances(np.array(new), np.array(there), distance))
            self._pages[request_id] = there
        for request_id, entries in update.null_entries.items():
            if request_id in self._pages:
                self._pages[request_id] = [page for page in self._pages[request_id] if page not in entries]
        return reports
