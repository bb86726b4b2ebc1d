"""TensorRT-LLM's block-table encoding (``KVCacheIndex`` of the primary pool).

An entry counts in units of one layer's K (or V) block, layer 0 of the block: ``block * num_layers * 2 + field``, with
field 0 for K and 1 for V. The kernel adds ``layer * 2``. With 4 layers, V of block 3 is entry 3 * 4 * 2 + 1 = 25.
"""

from __future__ import annotations

import numpy as np

NULL_OFFSET = np.iinfo(np.int32).max
"""Entry of a logical block that has no physical block: never written, or evicted by a control."""

NO_BLOCK = -1
"""The same, as a block id in a manager's own table."""


def encode_block_offsets(block_ids: np.ndarray, num_layers: int) -> np.ndarray:
    """Table entries of physical blocks.

    Args:
      block_ids: int32 ``[batch, max_blocks_per_seq]``, ``NO_BLOCK`` where there is none.
      num_layers: layers of the pool.

    Returns:
      int32 ``[1, batch, 2, max_blocks_per_seq]``: one pool, field 0 = K, field 1 = V.
    """
    entries = block_ids.astype(np.int32)[:, None, :] * (num_layers * 2) + np.arange(2, dtype=np.int32)[None, :, None]
    return np.where(block_ids[:, None, :] == NO_BLOCK, np.int32(NULL_OFFSET), entries)[None]


def decode_block_offsets(offsets: np.ndarray, num_layers: int) -> np.ndarray:
    """Inverse of ``encode_block_offsets``: int32 ``[batch, max_blocks_per_seq]`` physical block ids."""
    keys = offsets[0, :, 0]
    return np.where(keys == NULL_OFFSET, np.int32(NO_BLOCK), keys // (num_layers * 2))


def hide_blocks(offsets: np.ndarray, blocks: list[int], num_layers: int) -> np.ndarray:
    """A block table without the entries of some blocks, for runners that skip what is not there.

    Args:
      offsets: int32 ``[1, batch, 2, max_blocks_per_seq]``, as ``encode_block_offsets`` makes them.
      blocks: physical blocks, e.g. null pages.
      num_layers: layers of the pool.

    Returns:
      The same shape, ``NULL_OFFSET`` in place of those entries.
    """
    hidden = np.isin(offsets[:, :, :1], np.array(blocks, np.int32) * (num_layers * 2))
    return np.where(hidden, np.int32(NULL_OFFSET), offsets)
