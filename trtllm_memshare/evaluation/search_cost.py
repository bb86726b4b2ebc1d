"""Host time of stage 1 and of the decisions per new token: written text goes through the cache manager, no model runs.

Searches happen every ``search_interval`` tokens, as in the executor; KV distances are not computed, so that every
candidate is accepted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.steps import BoundaryTokens

WINDOW = 1000
"""Tokens up to each length over which the time is taken."""
_TOKENS_PER_BLOCK, _PROMPT_TOKENS = 16, 64
_WARM_UP_TOKENS = 3000


def search_times(
    config: MemShareConfig,
    stream: np.ndarray,
    boundaries: BoundaryTokens,
    lengths: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Microseconds per token over the last ``WINDOW`` tokens before each length, fewer where the request is shorter.

    Args:
      stream: token ids, int32, at least as many as the largest length.
      lengths: tokens of the request, its prompt of 64 among them.
      clock: seconds.

    Raises:
      UserError: a length that the prompt alone has.
    """
    if min(lengths) <= _PROMPT_TOKENS:
        raise UserError(f"lengths must be over {_PROMPT_TOKENS} tokens, the prompt's, got {min(lengths)}")
    blocks = -(-len(stream) // _TOKENS_PER_BLOCK)
    factory = make_matcher_factory(config, _TOKENS_PER_BLOCK, boundaries)
    manager = KVCacheManager(blocks, 1, _TOKENS_PER_BLOCK, blocks, 1, config, factory)
    policy = SharingPolicy(config.model_copy(update={"accept_all": True}))
    manager.add_sequence(0, stream[:_PROMPT_TOKENS], _PROMPT_TOKENS)
    spent, totals = 0.0, {_PROMPT_TOKENS: 0.0}
    for position in range(_PROMPT_TOKENS, len(stream)):
        manager.append_tokens(0, [int(stream[position])])
        manager.mark_computed(0, position + 1)
        if position % config.search_interval == 0:
            started = clock()
            manager.apply(policy.decide(manager.candidates(), None))
            spent += clock() - started
        totals[position + 1] = spent
    starts = [max(_PROMPT_TOKENS, length - WINDOW) for length in lengths]
    return [(totals[end] - totals[start]) / (end - start) * 1e6 for start, end in zip(starts, lengths, strict=True)]


def median_search_times(
    config: MemShareConfig, streams: Sequence[np.ndarray], boundaries: BoundaryTokens, lengths: Sequence[int]
) -> list[float]:
    """For each length the median over streams, after a warm-up that is not counted."""
    warm_up = streams[0][:_WARM_UP_TOKENS]
    search_times(config, warm_up, boundaries, [len(warm_up)])
    times = [search_times(config, stream, boundaries, lengths) for stream in streams]
    return [statistics.median(column) for column in zip(*times, strict=True)]
