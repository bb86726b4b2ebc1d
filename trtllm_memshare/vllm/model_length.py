"""``--max-model-len auto``: vLLM chooses a length that fills its pool, in which null pages take blocks.

vLLM's frontend is told the length once there is a scheduler, so it may become shorter until then. Workers keep the
longer one, by which their tables are only wider than need be.
"""

from __future__ import annotations

from typing import Any

_AUTO = -1  # what vLLM makes of "auto"


def fit_model_length(config: Any, cache: Any, num_null_pages: int) -> bool:
    """Makes ``max_model_len`` shorter until one such request fits beside null pages, where vLLM chose it.

    Args:
      config: vLLM's ``VllmConfig``; modified.
      cache: its ``KVCacheConfig``, with the pool's blocks and groups.

    Returns:
      Whether it is shorter now. One that the user set stays, and so does one where not even a token fits.
    """
    model = config.model_config
    if getattr(model, "original_max_model_len", None) != _AUTO:
        return False
    chosen, usable = model.max_model_len, cache.num_blocks - 1 - num_null_pages
    fits, fits_not = 0, chosen + 1
    while fits_not - fits > 1:
        model.max_model_len = (fits + fits_not) // 2
        if _blocks_of_longest(config, cache) <= usable:
            fits = model.max_model_len
        else:
            fits_not = model.max_model_len
    model.max_model_len = fits or chosen
    return 0 < fits < chosen


def _blocks_of_longest(config: Any, cache: Any) -> int:
    """Blocks of one request of ``max_model_len``, as vLLM counts them at its start."""
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    return sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)
