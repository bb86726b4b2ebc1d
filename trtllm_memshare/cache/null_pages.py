"""Null pages in the block tables: physical blocks that no query attends to, and how entries come to point at them.

The runner writes a page for each band of positions into the pool at start (``engine.null_page`` says what is in it). A
table entry that points at one is forgotten by any attention kernel, with lengths and positions unchanged::

    table of the request   ... X ...   ->   ... null page of the band ...     X has one reference less

vLLM reserves one null block whose count is not maintained. Ours are such an exception too: never free, never
allocated, never shared, never full, their count always 0; ``BlockPool.check_integrity`` knows them by name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.cache.sequence import Sequence
from trtllm_memshare.search.config import MemShareConfig


class NullPages:
    """One physical block for each band of positions.

    With bands ``[0, 4096, 8192]`` and blocks ``[0, 1]`` a query at position 4095 needs its request's null entries to
    point at block 0, one at position 4096 at block 1.

    Args:
      blocks: the physical blocks, one a band, in order of position.
      bands: where bands begin, in tokens, and behind them where the last one ends: one more than blocks, from 0 on.

    Raises:
      ValueError: blocks that repeat, or bands that do not ascend from 0 or do not fit the blocks.
    """

    def __init__(self, blocks: Seq[int], bands: Seq[int]) -> None:
        self.blocks, self.bands = [int(b) for b in blocks], [int(b) for b in bands]
        ascend = self.bands[:1] == [0] and all(a < b for a, b in zip(self.bands, self.bands[1:], strict=False))
        if not self.blocks or len(self.bands) != len(self.blocks) + 1 or not ascend:
            raise ValueError(
                f"null pages need bands that ascend from 0 and one block for each, got bands {self.bands} and blocks "
                f"{self.blocks}"
            )
        if len(set(self.blocks)) != len(self.blocks) or min(self.blocks) < 0:
            raise ValueError(f"null pages need distinct blocks of the pool, got {self.blocks}")

    def block_at(self, position: int) -> int:
        """The page that serves a query at ``position``.

        Raises:
          ValueError: no band holds the position.
        """
        if not 0 <= position < self.bands[-1]:
            raise ValueError(f"null pages are made for positions below {self.bands[-1]}, got {position}")
        return self.blocks[bisect_right(self.bands, position) - 1]

    def end_of_band(self, position: int) -> int:
        """First position after the band of ``position``: a chunk of queries that reads null entries ends there."""
        return self.bands[self.blocks.index(self.block_at(position)) + 1]


def forget_blocks(
    sequence: Sequence, table: np.ndarray, logical_blocks: np.ndarray, pool: BlockPool, become: int
) -> int:
    """Gives up blocks of a request: whatever pointed at them, or rested on their rows, is forgotten.

    Aliases of such a block go with it, since moving one of two references frees nothing. The caller has chosen full,
    generated blocks; an entry that was given up before, by whatever way, is passed over.

    Args:
      sequence: modified.
      table: int32 ``[max_blocks_per_seq]``, its row of the block table; modified.
      logical_blocks: int ``[n]``, places in the row.
      pool: references are released.
      become: what the entries become: a null page or ``NO_BLOCK``.

    Returns:
      Blocks that became free.

    Raises:
      ValueError: a block that holds prompt tokens, or one that is not full yet.
    """
    size = pool.tokens_per_block
    first, full = sequence.first_generated_block, sequence.num_computed // size
    if len(logical_blocks) and (logical_blocks.min() < first or logical_blocks.max() >= full):
        outside = (logical_blocks < first) | (logical_blocks >= full)
        raise ValueError(
            f"request {sequence.request_id} can give up its full generated blocks {first} to {full - 1}, got "
            f"{np.unique(logical_blocks[outside]).tolist()}"
        )
    row = table[: sequence.num_blocks]
    rows = sequence.token_rows[: sequence.num_blocks * size]
    goes = np.zeros(sequence.num_blocks, bool)
    goes[logical_blocks] = True
    goes &= ~sequence.retired[: sequence.num_blocks]
    entries = goes.nonzero()[0]
    entries = entries[~is_null(row[entries], pool)]
    if not len(entries):
        return 0
    if sequence.has_stand_ins:
        named = np.zeros(pool.num_blocks + 1, bool)  # the last one is for entries without a block, NO_BLOCK
        named[row[entries]] = True
        entries = named[row].nonzero()[0]
        rows[named[rows // size]] = -1  # of a row that is -1 already it does not matter what is read
    else:  # only a page's own entry names its block, and only its own tokens rest there
        rows.reshape(-1, size)[entries] = -1
    freed = pool.release(row[entries])
    row[entries] = become
    sequence.retired[entries] = True
    if sequence.donors:
        for page in entries.tolist():
            sequence.donors.pop(page, None)
    sequence.num_retired += freed
    return freed


def null_entry(sequence: Sequence, null_pages: NullPages | None, config: MemShareConfig) -> int:
    """What entries of a request become that are forgotten now.

    Under pressure with aliases a page that finds no donor is forgotten too; if there are no null pages the runner
    skips entries.

    Raises:
      ValueError: there are no null pages to point at, and entries cannot be without a block.
    """
    if config.retired_becomes == "dropped" or (config.pressure and null_pages is None):
        return NO_BLOCK
    if null_pages is None:
        raise ValueError("blocks can be retired to null pages only where the runner has written some, got none")
    return null_pages.block_at(sequence.num_tokens - 1)


def follow_bands(sequence: Sequence, table: np.ndarray, length: int, null_pages: NullPages, pool: BlockPool) -> int:
    """Lets a request's null entries point at the page of the band of its newest query; returns how many moved.

    Args:
      sequence: read only.
      table: int32 ``[max_blocks_per_seq]``, its row of the block table; modified.
      length: tokens in the cache after the step.
    """
    target = null_pages.block_at(length - 1)
    row = table[: sequence.num_blocks]
    moves = is_null(row, pool) & (row != NO_BLOCK) & (row != target)
    row[moves] = target
    return int(moves.sum())


def is_null(entries: np.ndarray, pool: BlockPool) -> np.ndarray:
    """Which entries of a table hold nothing that attention sees: at a null page, or at no block; bool, same shape."""
    return (entries == NO_BLOCK) | pool.is_null[entries]
