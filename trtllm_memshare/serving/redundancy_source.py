"""Redundancy of pages for our own executor: how closely each token is met by a later one that the request still has.

Signatures are V of three layers, which carries no rotation to undo. Pages are looked at when pressure asks, and once
each, so a pool with room costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.stand_ins import NO_DONORS
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.nearest_earlier import NearestEarlier
from trtllm_memshare.search.need import find_need
from trtllm_memshare.search.page_signer import make_page_signer
from trtllm_memshare.search.signature_index import SignatureIndex, Span
from trtllm_memshare.search.signatures import fields_of_pool, make_projection
from trtllm_memshare.serving.page_facts import PageSource


class ValueRedundancy:
    """Of the generated pages of every request in flight.

    Args:
      manager: the cache, read only.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the runner's.
    """

    fact = "redundancy"

    def __init__(self, manager: KVCacheManager, pool: torch.Tensor) -> None:
        self._manager = manager
        projection = make_projection(pool.shape[1], pool.shape[3], pool.shape[5])
        no_rotation = torch.empty(0)  # V has none to undo
        self._signer = make_page_signer(fields_of_pool(pool, projection), no_rotation, projection)
        self._index = SignatureIndex(manager.tokens_per_block, device=pool.device)

    def catch_up(self, request_ids: list[int]) -> None:
        """See ``PageSource``; reads what was filled since, for all requests together."""
        spans = list[Span]()
        for request_id in request_ids:
            first, full, table = self._manager.generated_pages(request_id)
            first = max(first, self._index.num_pages(request_id))
            if first < full:
                spans.append((request_id, np.arange(first, full, dtype=np.int32), table[first:full]))
        self._index.catch_up(spans, self._sign)

    def measure(self, request_id: int, pages: np.ndarray, limit: int) -> np.ndarray:
        """See ``PageSource``: the mean over a page's tokens of the largest cosine with a later token."""
        return self._index.redundancy(request_id)[pages]

    def donors(self, request_id: int) -> Mapping[int, int]:
        """See ``PageSource``: what repeats a page need not be one page."""
        return NO_DONORS

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """See ``PageSource``."""
        self._index.forget(request_id, pages)

    def forget(self, request_id: int) -> None:
        """See ``PageSource``."""
        self._index.drop(request_id)

    def _sign(self, blocks: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(blocks)
        return self._signer.page_signatures(index, torch.zeros_like(index))


def open_source(
    config: MemShareConfig, manager: KVCacheManager, runner: Runner, is_ranked: bool = False
) -> PageSource | None:
    """What reads the pool for the need of the settings; None if that reads nothing of it.

    Raises:
      UserError: the runner does not show its pool, or whole pages are asked for and each of several ranks has a part.
    """
    read = {"redundancy", "distance"} & set(find_need(config.need).facts)
    if not read:
        return None
    pool = getattr(runner, "pool", None)
    if not isinstance(pool, torch.Tensor):
        raise UserError(
            f"need {config.need} reads K and V of pages, got a runner that does not show its pool (use the torch "
            f"runner, or set need=age, need=random or need=surprisal)"
        )
    if "distance" not in read:
        return ValueRedundancy(manager, pool)
    if is_ranked:
        raise UserError(
            f"need {config.need} compares whole pages, got several ranks that hold parts of them (take redundancy, "
            f"surprisal, age or random)"
        )
    return NearestEarlier(manager, pool, config.max_aliases)
