"""Which pages each generation request reads, for decode attention that takes lists of pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.runners.protocol import StepBatch


@dataclass(frozen=True)
class PageLists:
    """Pages of the generation requests, in FlashInfer's CSR form; the last page of a request may be partial.

    Attributes:
      indptr: int32 ``[batch + 1]``.
      indices: int32 ``[indptr[-1]]``, physical blocks.
      log_counts: float32 ``[indptr[-1]]``, ln m where a page is listed once for m entries that name it; else 0.
      last_page_len: int32 ``[batch]``, valid tokens of the last page.
    """

    indptr: np.ndarray
    indices: np.ndarray
    log_counts: np.ndarray
    last_page_len: np.ndarray

    def padded(self, batch: int) -> PageLists:
        """The same with the first request repeated up to ``batch`` requests."""
        missing, first = batch - len(self.last_page_len), slice(self.indptr[1])
        steps = len(self.indices[first]) * np.arange(1, missing + 1, dtype=np.int32)
        return PageLists(
            np.concatenate([self.indptr, self.indptr[-1] + steps]),
            np.concatenate([self.indices, np.tile(self.indices[first], missing)]),
            np.concatenate([self.log_counts, np.tile(self.log_counts[first], missing)]),
            np.concatenate([self.last_page_len, np.repeat(self.last_page_len[:1], missing)]),
        )


def list_pages(batch: StepBatch, num_layers: int, tokens_per_block: int, fold: bool = False) -> PageLists:
    """Page lists of the generation requests of a batch.

    Order does not matter to attention, except that the partial page comes last, as it does in the table. Entries
    without a block are left out.

    Args:
      num_layers, tokens_per_block: of the pool.
      fold: list a page once however often a table names it, with its logarithm; False lists it as often, as
        TensorRT-LLM's kernels and FlashInfer read it. Without ``count_aliases`` it is listed once and counts once.
    """
    first = batch.num_contexts
    lengths = batch.sequence_lengths[first:]
    keys = batch.block_offsets[0, first:, 0].astype(np.int64)
    last = (lengths - 1) // tokens_per_block
    blocks = np.where(keys == NULL_OFFSET, -1, keys // (2 * num_layers))
    present = (np.arange(keys.shape[1]) <= last[:, None]) & (blocks >= 0)
    log_counts = np.zeros(blocks.shape, np.float32)
    if fold or not batch.count_aliases:
        for row in _rows_with_aliases(blocks, present):
            there = np.flatnonzero(present[row])
            # The last of equal entries stays, so that the partial page keeps its place.
            _, places, counts = np.unique(blocks[row, there][::-1], return_index=True, return_counts=True)
            kept = there[::-1][places]
            present[row] = False
            present[row, kept] = True
            if batch.count_aliases:
                log_counts[row, kept] = np.log(counts)
    indptr = np.concatenate([[0], present.sum(1).cumsum()]).astype(np.int32)
    filled = ((lengths - 1) % tokens_per_block + 1).astype(np.int32)
    return PageLists(indptr, blocks[present].astype(np.int32), log_counts[present], filled)


def _rows_with_aliases(blocks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Rows in which a block stands more than once: few, and sorting small integers is quick."""
    ordered = np.sort(np.where(present, blocks, -1).astype(np.int32), axis=1)
    return np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))
