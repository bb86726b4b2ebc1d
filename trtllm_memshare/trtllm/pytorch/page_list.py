"""Where the page of each logical block of a request sits in the KV cache manager's list.

TensorRT-LLM frees a sequence's last pages only. To give up a page in the middle, the last one moves into its place::

    list      P0  P1  G2  G3  G4  G5       blocks 2 and 3 are given up: two positions at the end must go
    holes             2   3
    movers                    4   5        pages beyond the new end that are still needed
    list      P0  P1  G4  G5               G4 is copied over G2's page, G5 over G3's; then the manager drops two

Sources lie beyond the new end and targets before it, so that one batch of copies needs no order.
"""

from __future__ import annotations

import numpy as np


class PageList:
    """Positions of one request's pages; a logical block whose page was given up has none.

    Attributes:
      position: logical block -> position in the manager's list, -1 once given up.
      block_at: position -> logical block that its page was written for.
    """

    def __init__(self) -> None:
        self.position: list[int] = []
        self.block_at: list[int] = []

    @property
    def num_blocks(self) -> int:
        """Logical blocks, given up or not."""
        return len(self.position)

    @property
    def num_pages(self) -> int:
        """Pages that the manager's list must have."""
        return len(self.block_at)

    @property
    def num_given_up(self) -> int:
        return len(self.position) - len(self.block_at)

    def extend(self, num_blocks: int) -> None:
        """Takes over the pages that the manager appended: its list grows at the end as logical blocks begin."""
        new = range(len(self.position), num_blocks)
        self.position.extend(range(len(self.block_at), len(self.block_at) + len(new)))
        self.block_at.extend(new)

    def give_up(self, blocks: list[int]) -> list[tuple[int, int]]:
        """Drops pages of logical blocks.

        Args:
          blocks: distinct, with a page.

        Returns:
          (from, to) positions of pages to copy before the manager drops its last ``len(blocks)`` pages.

        Raises:
          RuntimeError: a block without a page.
        """
        holes = sorted(self.position[block] for block in blocks)
        if -1 in holes or len(set(holes)) != len(holes):
            raise RuntimeError(f"blocks {blocks} must be distinct and have pages, their positions are {holes}")
        end = len(self.block_at) - len(blocks)
        gone = set(holes)
        movers = [p for p in range(end, len(self.block_at)) if p not in gone]
        moves = list(zip(movers, (h for h in holes if h < end), strict=True))
        for block in blocks:
            self.position[block] = -1
        for source, target in moves:
            block = self.block_at[source]
            self.block_at[target], self.position[block] = block, target
        del self.block_at[end:]
        return moves

    def row(self, origins: np.ndarray, width: int) -> np.ndarray:
        """Position in the manager's list that each entry of the block table reads, int64 ``[width]``.

        Args:
          origins: int ``[n]``, the logical block whose page serves each of the first n blocks; none was given up.
          width: of the table. Pages that are not there yet will be appended, so their positions are known.
        """
        own = np.arange(width, dtype=np.int64) - self.num_given_up
        own[: self.num_blocks] = self.position
        row = own.copy()
        row[: len(origins)] = own[origins]
        return row
