"""A sequence's next blocks: from the pool into its row of the block table."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.sequence import Sequence


def take_blocks(sequence: Sequence, table: np.ndarray, stop: int, pool: BlockPool) -> bool:
    """Gives a sequence blocks of its own up to the logical block ``stop``; False, with nothing changed, without room.

    Modifies the sequence's blocks, their peak and the rows of its tokens, its table and the pool.

    Args:
      table: the sequence's row of the block table, int32 ``[max_blocks_per_seq]``.
      stop: more than the sequence has, and at most the row's width.
    """
    start, size = sequence.num_blocks, pool.tokens_per_block
    if stop - start == 1:  # a request that generates
        block = pool.allocate_one(start * size)
        if block is None:
            return False
        table[start] = block
        rows = np.arange(block * size, (block + 1) * size, dtype=np.int32)
    else:
        blocks = pool.allocate(np.arange(start * size, stop * size, size, dtype=np.int32))
        if blocks is None:
            return False
        table[start:stop] = blocks
        rows = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
    sequence.token_rows[start * size : stop * size] = rows
    sequence.num_blocks = stop
    sequence.peak_blocks = max(sequence.peak_blocks, stop - sequence.num_retired)
    return True
