"""Packs what the scheduler chose into the runner's batch."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.serving.scheduler import Schedule


def make_batch(
    schedule: Schedule,
    manager: KVCacheManager,
    pairs: PairBatch | None,
    config: MemShareConfig,
    observe_attention: bool,
) -> StepBatch:
    """Context chunks first, then generation requests, in the order of ``schedule.states``.

    Null entries of requests that cross a band of positions in this step are moved before tables are read.

    Args:
      pairs: rows to compare in the step, None = none or later.
      config: what a table entry counts for, see ``StepBatch``.
      observe_attention: see ``StepBatch``.
    """
    states = schedule.states
    chunks = [c for _, c in schedule.contexts] + [1] * len(schedule.generations)
    starts = [s.num_computed for s, _ in schedule.contexts] + [len(s.tokens) - 1 for s in schedule.generations]
    spans = list(zip(states, starts, chunks, strict=True))
    request_ids, lengths = [s.request_id for s in states], np.array([b + c for _, b, c in spans], np.int32)
    manager.cross_bands(request_ids, lengths)
    return StepBatch(
        input_ids=np.fromiter((t for s, b, c in spans for t in s.tokens[b : b + c]), np.int32, sum(chunks)),
        position_ids=np.fromiter((p for _, b, c in spans for p in range(b, b + c)), np.int32, sum(chunks)),
        num_contexts=len(schedule.contexts),
        chunk_lengths=np.array(chunks, np.int32),
        sequence_lengths=lengths,
        block_offsets=manager.block_offsets(request_ids),
        pairs=pairs,
        count_aliases=config.count_aliases,
        read_null=config.read_null,
        observe_attention=observe_attention,
        context_lengths=np.array(
            [c for _, c in schedule.contexts] + [s.context_length for s in schedule.generations], np.int32
        ),
    )
