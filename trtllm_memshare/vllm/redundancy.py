"""Reports that tell the scheduler of pages: KV redundancy by signatures, and surprisal, on the worker.

Pages are indexed when the scheduler asks, and the answer rides back on the step's output. With tensor parallelism a
rank sees its own KV heads, and the rank that reports speaks for all.
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.signature_index import SignatureIndex
from trtllm_memshare.vllm.cache_signatures import PageSignatures
from trtllm_memshare.vllm.page_report import PageReport
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.update import MemShareUpdate


class PageReports:
    """An index of signatures, fed when the scheduler asks, and surprisal as it was sampled.

    Args:
      signatures, surprisal: where the facts that the need reads come from, None = it does not read them.
    """

    def __init__(self, signatures: PageSignatures | None, surprisal: SampledSurprisal | None, block_size: int) -> None:
        self._signatures, self._surprisal, self._block_size = signatures, surprisal, block_size
        self._index = None if signatures is None else SignatureIndex(block_size, device=signatures.device)

    def answer(
        self, update: MemShareUpdate, block_ids: dict[str, np.ndarray], ended: set[str]
    ) -> dict[str, PageReport]:
        """Reports of the requests of which something changed, by id; surprisal of the pages that are asked about now.

        Args:
          update: names full pages to take in, and pages that are retired.
          block_ids: tables of the requests that were asked about, before the update is applied.
          ended: requests that are no more.
        """
        asked = {name: pages for name, pages in update.asked.items() if name in block_ids}
        surprisal = {name: self._sampled(block_ids[name], pages) for name, pages in asked.items()}
        redundancy = self._redundancy(asked, update.null_entries, block_ids, ended)
        return {
            name: PageReport(redundancy.get(name), surprisal.get(name))
            for name in sorted(asked.keys() | redundancy.keys())
        }

    def _sampled(self, block_ids: np.ndarray, pages: list[int]) -> np.ndarray | None:
        if self._surprisal is None:
            return None
        known = np.full(pages[-1] + 1, np.nan, np.float32)
        known[pages] = self._surprisal.of_pages(block_ids, pages)
        return known

    def _redundancy(
        self,
        asked: dict[str, list[int]],
        null_entries: dict[str, dict[int, int]],
        block_ids: dict[str, np.ndarray],
        ended: set[str],
    ) -> dict[str, np.ndarray]:
        index = self._index
        if self._signatures is None or index is None:
            return {}
        for request_id in ended:
            index.drop(request_id)
        spans = [
            (request_id, np.array(pages, np.int32), block_ids[request_id][pages]) for request_id, pages in asked.items()
        ]
        index.catch_up(spans, self._signatures.of_blocks)
        changed = [*asked]
        for request_id, entries in null_entries.items():
            if index.num_pages(request_id):
                index.forget(request_id, np.fromiter(entries, np.int32))
                changed += [request_id] * (request_id not in asked)
        return {request_id: index.redundancy(request_id) for request_id in changed}
