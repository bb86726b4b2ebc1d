"""A small manager with open settings, and the text that the tests of the cache write into it."""

from __future__ import annotations

import numpy as np
from effective_settings import make_effective

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.steps import BoundaryTokens

SIZE = 8
BODY = np.random.default_rng(1).integers(2, 60, 6 * SIZE).tolist()
TAIL = np.random.default_rng(9).integers(2, 60, 32).tolist()  # no repeat of anything
_BOUNDARIES = BoundaryTokens.from_texts(["\n", ". ", *(f"w{i}" for i in range(60))])
_OPEN = {"protected_tokens": 4, "protected_steps": 0, "min_run_tokens": 8, "shingle_tokens": 4, "max_aliases": 4}


def make_manager(
    direction="keep-latest", num_blocks=40, null_pages=None, preset="aligned", **changes
) -> KVCacheManager:
    config = make_effective(preset, direction=direction, **{**_OPEN, **changes})
    factory = make_matcher_factory(config, SIZE, _BOUNDARIES)
    return KVCacheManager(num_blocks, 2, SIZE, 24, 6, config, factory, null_pages)
