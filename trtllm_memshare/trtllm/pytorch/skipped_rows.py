"""Rows of the block table without the entries of pages given up, for attention that is given shorter sequences.

Keys carry their rotation, so attention over the entries that are left, with a length that is shorter by the others, is
attention over what was kept: exactly, where a null page only comes close. Nothing is read for what was given up, and
the model needs no null pages (``lengths.py``: what TensorRT-LLM has to be told for that)::

    entries of the text     0  1  2  -  -  5  6        tokens  100, blocks of 16: the last one holds 4
    row                     0  1  2  5  6  .  .        length   68
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend


class SkippedRows:
    """Stands where ``NullRows`` stands for rows that name null pages.

    Args:
      backend: of the manager.

    Attributes:
      pages: for this project's own manager: one virtual block stands for whatever was given up, at any position.
      num_pages: of TensorRT-LLM's pool that are taken: none.
    """

    num_pages = 0

    def __init__(self, backend: CacheBackend) -> None:
        self.pages = NullPages([0], [0, backend.max_blocks_per_seq * backend.pool.shape[4] + 1])

    def place(self, row: np.ndarray, table: np.ndarray, is_null: np.ndarray) -> int:
        """Moves the entries that are left to the front, in order; see ``NullRows.place``."""
        kept = np.delete(row, is_null.nonzero()[0])
        row[: len(kept)] = kept
        row[len(kept) :] = 0  # beyond the length, so never read
        return len(row) - len(kept)
