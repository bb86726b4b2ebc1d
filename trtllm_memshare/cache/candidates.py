"""Turns stage 1's matches of one sequence into candidate pairs of physical rows."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.sequence import Sequence
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate


def find_candidates(
    sequence: Sequence, table: np.ndarray, pool: BlockPool, limit: int, config: MemShareConfig
) -> list[Candidate]:
    """Candidates of one sequence, oldest block first.

    A ready block is passed over, and offered again next time, while it is protected, its copy is too new, no donor is
    full yet or ``limit`` cut off some of its counterparts; it is settled when it is offered or can never be retired.

    Args:
      sequence: past its prompt; its matcher's list of ready blocks is modified.
      table: int32 ``[max_blocks_per_seq]``, its row of the block table.
      pool: the pool, read only.
      limit: most candidates to return: what is left of ``max_pairs``.
      config: for ``settled_tokens`` and ``max_pairs``. A block with more counterparts than a whole search can take is
        judged by its first ones: waiting for room that never comes, it would hold up every block behind it.
    """
    matcher, found = sequence.matcher, list[Candidate]()
    if matcher is None:
        return found
    size = pool.tokens_per_block
    ready = matcher.ready_blocks()
    if not ready:
        return found
    end = min(matcher.protected_from(), sequence.num_computed)
    slots = np.arange(size, dtype=np.int32)
    for logical in ready:
        if len(found) >= limit:
            break
        if logical < sequence.first_generated_block or sequence.retired[logical]:
            matcher.settle(logical)
            continue
        if (logical + 1) * size > end:
            continue
        block, waits, first = int(table[logical]), False, len(found)
        for positions in matcher.counterparts(logical):
            if len(found) >= limit:
                waits = waits or len(found) - first < config.max_pairs
                break
            if positions.max() + config.settled_tokens >= sequence.num_computed:
                waits = True
                continue
            kept_rows = sequence.token_rows[positions]
            if kept_rows.min() < 0:
                continue  # a counterpart was forgotten: it stands in for nothing any more
            kept_blocks = kept_rows // size
            donor = _choose_donor(kept_blocks, block, pool)
            if donor is None:
                waits = waits or not bool(pool.is_full[kept_blocks].all())
                continue
            found.append(
                Candidate(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    logical=logical,
                    block=block,
                    block_generation=int(pool.generation[block]),
                    donor=donor,
                    retired_rows=block * size + slots,
                    kept_rows=kept_rows,
                    kept_generations=pool.generation[kept_blocks],
                )
            )
        if not waits:
            matcher.settle(logical)
    return found


def _choose_donor(kept_blocks: np.ndarray, block: int, pool: BlockPool) -> int | None:
    """The full block that holds most of the counterparts; None if there is none or the block itself is among them.

    At a shift that is no multiple of the block size the counterparts of one block lie in two. Giving each retired
    block the donor with most of its counterparts hands out the donors of a run in order, each once.
    """
    first, last = int(kept_blocks[0]), int(kept_blocks[-1])
    if (kept_blocks == block).any():
        return None
    choices = {b: int((kept_blocks == b).sum()) for b in {first, last, *kept_blocks.tolist()} if pool.is_full[b]}
    return max(choices, key=lambda b: (choices[b], b == first)) if choices else None
