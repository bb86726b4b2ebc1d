"""Which earlier page of its request is nearest to each page: what the published method gives up, under pressure.

Whole generated pages against whole ones, as ``search.nearest_page`` says. Pages are compared when pressure asks, and
each with those that are there then, so a pool with room costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.nearest_page import page_distances, pair_with_earlier


class _Pages:
    """The generated pages of one request, by their place behind the first of them, which is page ``first``.

    Attributes:
      distance: float32 ``[n, n]``, n at least the pages that were looked at; inf where nothing was compared.
      counts: int64, same length, what each page stands for, itself included; 0 = it has gone.
      num_seen: how many pages were looked at.
      pairs: what would go now, in order: page and donor.
    """

    def __init__(self, first: int) -> None:
        self.first, self.num_seen = first, 0
        self.distance = np.full((64, 64), np.inf, np.float32)
        self.counts = np.ones(64, np.int64)
        self.pairs: list[tuple[int, int]] = []

    def grow(self, num_pages: int) -> None:
        """Makes room for so many pages."""
        more = max(num_pages, 2 * len(self.counts)) - len(self.counts) if num_pages > len(self.counts) else 0
        self.distance = np.pad(self.distance, (0, more), constant_values=np.inf)
        self.counts = np.pad(self.counts, (0, more), constant_values=1)


class NearestEarlier:
    """A ``PageSource`` of distances, and of the donors that go with them.

    Args:
      manager: the cache, read only.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the runner's.
      max_aliases: most entries that may point at one page. Kept here and not read off the table, so that the choice is
        the same where pages are forgotten.
    """

    fact = "distance"

    def __init__(self, manager: KVCacheManager, pool: torch.Tensor, max_aliases: int) -> None:
        self._manager, self._pool, self._max_aliases = manager, pool, max_aliases
        self._requests: dict[int, _Pages] = {}

    def catch_up(self, request_ids: list[int]) -> None:
        """See ``PageSource``."""
        for request_id in request_ids:
            first, full, table = self._manager.generated_pages(request_id)
            known = self._requests.setdefault(request_id, _Pages(first))
            known.grow(full - first)
            new = np.arange(known.num_seen, full - first)
            there = np.flatnonzero(known.counts[: full - first])
            if len(new):
                rows, columns = (torch.from_numpy(table[first + places]) for places in (new, there))
                known.distance[np.ix_(new, there)] = self._distances(rows, columns)
                known.num_seen = full - first

    def measure(self, request_id: int, pages: np.ndarray, limit: int) -> np.ndarray:
        """See ``PageSource``: float32 ``[len(pages)]``, inf for a page that would find no donor.

        Args:
          pages: all that may go, so that an earlier page which is there is among them.
        """
        known = self._requests[request_id]
        places = pages - known.first
        distance = known.distance[np.ix_(places, places)]
        found = pair_with_earlier(distance, known.counts[places], self._max_aliases, limit)
        known.pairs = [(int(pages[page]), int(pages[other])) for page, other in found]
        nearest = np.full(len(pages), np.inf, np.float32)
        for page, other in found:
            nearest[page] = distance[page, other]
        return nearest

    def donors(self, request_id: int) -> Mapping[int, int]:
        """The page that is read in place of each that would go, by page, in the order in which they go."""
        return dict(self._requests[request_id].pairs)

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """See ``PageSource``."""
        known, gone = self._requests[request_id], set(pages.tolist())
        for page, donor in known.pairs:
            if page in gone:
                known.counts[donor - known.first] += known.counts[page - known.first]
        known.counts[pages - known.first] = 0

    def forget(self, request_id: int) -> None:
        """See ``PageSource``."""
        self._requests.pop(request_id, None)

    @torch.inference_mode()
    def _distances(self, new_blocks: torch.Tensor, old_blocks: torch.Tensor) -> np.ndarray:
        device = self._pool.device
        return page_distances(self._pool, new_blocks.to(device), old_blocks.to(device)).cpu().numpy()
