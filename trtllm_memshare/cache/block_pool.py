"""Physical blocks: who is free, how many table entries point at each, and what was written where.

Only bookkeeping, in numpy on the host; the K and V values live with the runner. vLLM's block pool does not merge
duplicate blocks so that ids stay stable and tables append-only. Here a table entry may be rewritten, by
``KVCacheManager.apply`` alone, between two steps; generations are what a holder of an old id is checked by.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np


class BlockPool:
    """Reference-counted blocks.

    Attributes, one element per block:
      ref_count: int32, table entries that point at the block.
      generation: int32, raised each time the block is freed.
      origin_position: int32, position at which the block's first row was written.
      is_full: bool, every row has been written.
      is_null: bool, a null page: never free, referenced by tables without being counted, see ``reserve``.
      drift: float32 ``[num_blocks * tokens_per_block]``, per row: the largest distance, summed along its chain, of a
        token that this row stands in for.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.ref_count = np.zeros(num_blocks, np.int32)
        self.generation = np.zeros(num_blocks, np.int32)
        self.origin_position = np.zeros(num_blocks, np.int32)
        self.is_full = np.zeros(num_blocks, bool)
        self.is_null = np.zeros(num_blocks, bool)
        self.num_null = 0
        self.drift = np.zeros(num_blocks * tokens_per_block, np.float32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: the top is the end of the range
        self.num_free = num_blocks

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the null pages."""
        return self.num_blocks - self.num_null

    def reserve(self, blocks: Seq[int]) -> None:
        """Makes null pages of free blocks, for good.

        Raises:
          ValueError: a block that is not in the pool or not free.
        """
        free = self._free[: self.num_free]
        wanted = np.array(blocks, np.int32)
        if not np.isin(wanted, free).all() or len(np.unique(wanted)) != len(wanted):
            raise ValueError(f"null pages must be free blocks of a pool of {self.num_blocks}, got {wanted.tolist()}")
        kept = free[~np.isin(free, wanted)]
        self._free[: len(kept)] = kept
        self.num_free = len(kept)
        self.is_null[wanted] = True
        self.num_null += len(wanted)

    def allocate(self, origin_positions: np.ndarray) -> np.ndarray | None:
        """Takes one block per origin position, each with one reference; None if there are too few.

        Args:
          origin_positions: int32 ``[n]``, position of the first token of each block.

        Returns:
          int32 ``[n]`` block ids.
        """
        count = len(origin_positions)
        if count > self.num_free:
            return None
        blocks = self._free[self.num_free - count : self.num_free][::-1].copy()
        self.num_free -= count
        self.ref_count[blocks] = 1
        self.origin_position[blocks] = origin_positions
        self.is_full[blocks] = False
        self.drift.reshape(-1, self.tokens_per_block)[blocks] = 0.0
        return blocks

    def allocate_one(self, origin_position: int) -> int | None:
        """``allocate`` for one block, without arrays: requests that generate take one at a time."""
        if not self.num_free:
            return None
        self.num_free -= 1
        block = int(self._free[self.num_free])
        self.ref_count[block] = 1
        self.origin_position[block] = origin_position
        self.is_full[block] = False
        self.drift[block * self.tokens_per_block : (block + 1) * self.tokens_per_block] = 0.0
        return block

    def release(self, blocks: np.ndarray) -> int:
        """Drops one reference for each element of ``blocks`` (repeats count); returns how many blocks became free.

        Null pages among them are passed over.

        Raises:
          RuntimeError: a block would get a negative count.
        """
        blocks = blocks[~self.is_null[blocks]]
        np.subtract.at(self.ref_count, blocks, 1)
        counts = self.ref_count[blocks]
        if np.count_nonzero(counts < 0):
            bad = np.unique(blocks[counts < 0])
            raise RuntimeError(f"blocks {bad.tolist()} released more often than referenced")
        freed = blocks[counts == 0]
        if len(freed) > 1:
            freed = np.unique(freed)
        self._put_back(freed)
        return len(freed)

    def move_references(self, block: int, donor: int, count: int) -> bool:
        """Gives ``count`` references of ``block`` to ``donor``; True if those were the last, and ``block`` is free."""
        self.ref_count[donor] += count
        self.ref_count[block] -= count
        if self.ref_count[block] > 0:
            return False
        self._put_back(np.array([block], np.int32))
        return True

    def _put_back(self, blocks: np.ndarray) -> None:
        self.generation[blocks] += 1
        self.is_full[blocks] = False
        self._free[self.num_free : self.num_free + len(blocks)] = blocks
        self.num_free += len(blocks)

    def check_integrity(self, references: np.ndarray) -> None:
        """Compares the counts with the tables.

        Args:
          references: int ``[num_blocks]``, table entries that point at each block.

        Raises:
          RuntimeError: with all the numbers, if a count differs, a block is both free and referenced or neither, or
            a null page is free, counted or marked as full.
        """
        free = np.zeros(self.num_blocks, np.int64)
        np.add.at(free, self._free[: self.num_free], 1)
        null = np.flatnonzero(self.is_null)
        if self.ref_count[null].any() or self.is_full[null].any() or free[null].any() or len(null) != self.num_null:
            raise RuntimeError(
                f"null pages {null.tolist()} are to be neither free, counted nor full: in the free list "
                f"{free[null].tolist()} times, references {self.ref_count[null].tolist()}, full "
                f"{self.is_full[null].tolist()}, {self.num_null} were reserved"
            )
        references = np.where(self.is_null, 0, references)
        if (references != self.ref_count).any():
            wrong = np.flatnonzero(references != self.ref_count)
            raise RuntimeError(
                f"reference counts differ from the tables: blocks {wrong.tolist()}, "
                f"counted {self.ref_count[wrong].tolist()}, in tables {references[wrong].tolist()}"
            )
        places = free + (self.ref_count > 0) + self.is_null
        if (places != 1).any():
            wrong = np.flatnonzero(places != 1)
            raise RuntimeError(
                f"blocks {wrong.tolist()} are not exactly one of free and referenced: "
                f"in the free list {free[wrong].tolist()} times, references {self.ref_count[wrong].tolist()}"
            )
