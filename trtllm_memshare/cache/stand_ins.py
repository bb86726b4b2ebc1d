"""Pages that are given up under pressure while an earlier page of the request is read in their place.

    table of the request   D ... X ... X      ->   D ... D ... D      X is free, D stands for one entry more for each

The block of a page moves with all entries that name it: what the page stood for, its donor stands for from then on.
When a donor is forgotten, its aliases are forgotten with it (``null_pages.forget_blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.sequence import Sequence

NO_DONORS: Mapping[int, int] = MappingProxyType({})


def let_stand_in(
    sequence: Sequence, table: np.ndarray, logical_blocks: np.ndarray, donors: Mapping[int, int], pool: BlockPool
) -> int:
    """Points the entries of pages at those of their donors; a page that was given up before is passed over.

    Args:
      sequence: modified.
      table: int32 ``[max_blocks_per_seq]``, its row of the block table; modified.
      logical_blocks: int ``[n]``, the pages.
      donors: earlier pages of the request by page, in the order in which pages go; others than ``logical_blocks`` are
        not looked at, and pages without one stay as they are.
      pool: references move from block to block.

    Returns:
      Blocks that became free.

    Raises:
      ValueError: a donor that is no full, generated, earlier page which the request still has.
    """
    size, freed, chosen = pool.tokens_per_block, 0, set(logical_blocks.tolist())
    row, rows = table[: sequence.num_blocks], sequence.token_rows[: sequence.num_blocks * size]
    for page, donor in [(p, d) for p, d in donors.items() if p in chosen and not sequence.retired[p]]:
        is_earlier = sequence.first_generated_block <= donor < page
        if not is_earlier or sequence.retired[donor] or not pool.is_full[table[[donor, page]]].all():
            raise ValueError(
                f"a full, generated, earlier page can stand in for page {page} of request {sequence.request_id}, got "
                f"{donor}"
            )
        block, kept = int(table[page]), int(table[donor])
        moved = rows // size == block
        rows[moved] = kept * size + rows[moved] % size
        entries = row == block
        row[entries] = kept
        sequence.has_stand_ins = True
        freed += pool.move_references(block, kept, int(entries.sum()))
        sequence.retired[page] = True
        sequence.donors.update({p: donor for p, d in sequence.donors.items() if d == page})
        sequence.donors[page] = donor
    sequence.num_retired += freed
    return freed
