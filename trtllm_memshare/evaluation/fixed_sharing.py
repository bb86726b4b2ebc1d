"""Sharing that searches or forgets by a fixed rule, so that the cost of a search or of a read page can be timed."""

from __future__ import annotations

import time

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.policy import make_pairs
from trtllm_memshare.search.types import Candidate, PairBatch
from trtllm_memshare.serving.sharing import Sharing

FULL_SEARCHES = "full-searches"
HALF_FORGOTTEN = {"half-dropped": "dropped", "half-null": "null"}
"""Variants, and what retired pages become in them."""


class CountedSharing(Sharing):
    """Counts the pairs that were compared."""

    num_pairs = 0

    def search(self, step: int) -> PairBatch | None:
        pairs = super().search(step)
        self.num_pairs += 0 if pairs is None else len(pairs)
        return pairs


class FullSearches(CountedSharing):
    """Runs stage 1 as ever, then compares ``max_pairs`` made-up pairs in place of what it found; decides nothing.

    A pair is a full block and a run across another one and its neighbour, drawn anew from the whole pool each time, so
    that its rows are in no cache.
    """

    def __init__(self, manager: KVCacheManager, config: MemShareConfig) -> None:
        super().__init__(manager, config)
        self._settings, self._rng = config, np.random.default_rng(0)

    def search(self, step: int) -> PairBatch | None:
        super().search(step)
        pool, full = self._manager.pool, np.flatnonzero(self._manager.pool.is_full[:-1])
        if step % self._settings.search_interval or not len(full):
            return None
        started = time.perf_counter()
        size, count = pool.tokens_per_block, self._settings.max_pairs
        slots = np.arange(size, dtype=np.int32)
        blocks, shifts = self._rng.choice(full, (2, count)), self._rng.integers(0, size, count)
        candidates = [
            Candidate(0, 0, 0, int(new), 0, int(old), new * size + slots, old * size + shift + slots, slots)
            for new, old, shift in zip(*blocks, shifts, strict=True)
        ]
        pairs = make_pairs(candidates, pool.origin_position, size, self._settings.undo_rope)
        self.num_pairs += len(pairs)
        self.seconds += time.perf_counter() - started
        return pairs

    def take_distances(self, distances: Distances | None) -> None:
        if distances is not None:
            sums, seconds = distances.read()
            started = time.perf_counter()
            self.policy.layer_vote(sums)
            self.seconds += seconds + time.perf_counter() - started


class HalfForgotten(CountedSharing):
    """Gives up every second full page of generated text once it is there; searches for nothing."""

    def __init__(self, manager: KVCacheManager, config: MemShareConfig) -> None:
        super().__init__(manager, config)
        self._seen: dict[int, int] = {}
        self.num_forgotten = 0

    def search(self, step: int) -> PairBatch | None:
        for request_id, *_ in self._manager.generating_sequences():
            first, full, _table = self._manager.generated_pages(request_id)
            pages = np.arange(self._seen.get(request_id, first), full)
            self._seen[request_id] = max(full, first)
            if len(pages := pages[(pages - first) % 2 == 0]):
                self.num_forgotten += self._manager.retire(request_id, pages)
        return None


def settings_of(variant: str) -> tuple[MemShareConfig, type[CountedSharing]]:
    """The settings of a variant, and what searches or forgets in it."""
    if variant in HALF_FORGOTTEN:
        become = HALF_FORGOTTEN[variant]
        return make_config("aligned", retired_becomes=become, read_null=become == "null"), HalfForgotten
    if variant in ("shadow", FULL_SEARCHES):
        return make_config("aligned", shadow=True), FullSearches if variant == FULL_SEARCHES else CountedSharing
    return make_config(variant), CountedSharing
