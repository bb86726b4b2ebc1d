"""Which earlier page of its request is nearest to each page: what the published method gives up, under pressure.

Whole generated pages against whole ones, as ``search.nearest_page`` says. Pages are compared when pressure asks, and
each with those that are there then, so a pool with room costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from trtllm_memshare.search.nearest_page import page_distances
from trtllm_memshare.search.page_pairs import PagePairs


class KnowsPages(Protocol):
    """Where a request's pages lie in the pool."""

    def generated_pages(self, request_id: int) -> tuple[int, int, np.ndarray]:
        """The first page of generated tokens, the end of the full ones, and the pool's block of every page, int.

        What stands for a page that was given up is not looked at.
        """


class NearestEarlier:
    """A ``PageSource`` of distances, and of the donors that go with them.

    Args:
      manager: the cache, read only.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the runner's.
      max_aliases: most entries that may point at one page.
    """

    fact = "distance"

    def __init__(self, manager: KnowsPages, pool: torch.Tensor, max_aliases: int) -> None:
        self._manager, self._pool, self._max_aliases = manager, pool, max_aliases
        self._requests: dict[int, PagePairs] = {}
        self._num_seen: dict[int, int] = {}  # pages before this one were looked at

    def catch_up(self, request_ids: list[int]) -> None:
        """See ``PageSource``."""
        for request_id in request_ids:
            first, full, table = self._manager.generated_pages(request_id)
            known = self._requests.get(request_id)
            if known is None or known.first != first or self._num_seen[request_id] > full:  # new, or it began anew
                known = self._requests[request_id] = PagePairs(first, self._max_aliases)
                self._num_seen[request_id] = first
            new = np.arange(self._num_seen[request_id], full)
            if len(new):
                there = known.there(full)
                rows, columns = (torch.from_numpy(table[pages]) for pages in (new, there))
                known.learn(new, there, self._distances(rows, columns))
                self._num_seen[request_id] = full

    def measure(self, request_id: int, pages: np.ndarray, limit: int) -> np.ndarray:
        """See ``PageSource``: float32 ``[len(pages)]``, inf for a page that would find no donor.

        Args:
          pages: all that may go, so that an earlier page which is there is among them.
        """
        return self._requests[request_id].measure(pages, limit)

    def donors(self, request_id: int) -> Mapping[int, int]:
        """The page that is read in place of each that would go, by page, in the order in which they go."""
        return self._requests[request_id].donors()

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """See ``PageSource``."""
        known = self._requests[request_id]
        known.retired(pages, known.donors())

    def forget(self, request_id: int) -> None:
        """See ``PageSource``."""
        self._requests.pop(request_id, None)
        self._num_seen.pop(request_id, None)

    @torch.inference_mode()
    def _distances(self, new_blocks: torch.Tensor, old_blocks: torch.Tensor) -> np.ndarray:
        return page_distances(self._pool, new_blocks, old_blocks).cpu().numpy()
