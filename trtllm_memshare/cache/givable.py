"""What a request could give up now: the cache's side of pressure, before anybody ranks anything.

A request that generates has a new page every ``tokens_per_block`` steps, and pressure asks far more often than that
when many requests are in flight. So what was found is kept until the request has a page more, or one less.
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.cache.sequence import GivablePages, Sequence
from trtllm_memshare.search.repeats import stands_again


def givable_pages(sequence: Sequence, table: np.ndarray, pool: BlockPool, find_repeats: bool) -> GivablePages:
    """What a request that is past its context could give up, as of its last full page.

    Args:
      sequence: its stage 1 gets the tokens that it has not seen, and what was found is noted.
      table: int32 ``[max_blocks_per_seq]``, its row of the block table; read only.
      pool: read only.
      find_repeats: ask stage 1 for exact repeats; it must match runs of tokens then.
    """
    as_of = sequence.num_computed // pool.tokens_per_block, find_repeats
    if sequence.givable is None or sequence.givable[0] != as_of:
        sequence.feed_matcher()
        sequence.givable = as_of, _look(sequence, table, pool, find_repeats)
    return sequence.givable[1]


def _look(sequence: Sequence, table: np.ndarray, pool: BlockPool, find_repeats: bool) -> GivablePages:
    size, first = pool.tokens_per_block, sequence.first_generated_block
    full = max(first, sequence.num_computed // size)
    num_retired = int(np.count_nonzero(sequence.retired[first:full]))
    if sequence.matcher is None:  # memory-sharing is off for this request
        return GivablePages(np.zeros(0, np.int32), np.zeros(0, bool), 0, full - first, num_retired)
    ready = sequence.matcher.ready_blocks()  # asked first: it is what brings the protected steps up to date
    end = max(first, min(sequence.matcher.protected_from(), sequence.num_computed) // size)
    blocks = table[first:end]
    may_go = ~sequence.retired[first:end]
    counts = pool.ref_count[blocks]
    if np.count_nonzero(counts > 1):  # by other requests, or by entries of this one
        row = table[: sequence.num_blocks]
        may_go &= counts == np.bincount(row[row != NO_BLOCK], minlength=pool.num_blocks)[blocks]
    places = may_go.nonzero()[0]
    pages = (places + first).astype(np.int32)
    repeated = np.zeros(end - first, bool)
    if find_repeats and ready and len(pages):
        matcher, num_computed, rows = sequence.matcher, sequence.num_computed, sequence.token_rows
        for page in ready:
            if first <= page < end and may_go[page - first]:
                repeated[page - first] = stands_again(matcher, page, size, num_computed, lambda t: rows[t] < 0)
    return GivablePages(pages, repeated[places], int(np.count_nonzero(repeated)), full - first, num_retired)
