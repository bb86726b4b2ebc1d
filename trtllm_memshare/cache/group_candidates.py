"""Candidates between samples of one prompt: blocks that hold the same text at the same place.

A sample's table can name a block of another sample, but not that block's neighbours: it has one entry for each of its
own blocks. A run of text at another phase would need one more, and a copy at another place has another rotation with
nothing of the reader's own text there. So only equal places are looked at, which one table of texts finds, without a
search. Samples that have not parted yet agree everywhere; stage 2 judges those that met again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.sequence import Sequence
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate


class GroupCandidates:
    """Of one group. The copy that was there first stays.

    Args:
      pool: read only.
      tables: int32 ``[max_batch_size, max_blocks_per_seq]``, read only.
      config: so many of its ``min_run_tokens`` must agree up to the end of a block.
    """

    def __init__(self, pool: BlockPool, tables: np.ndarray, config: MemShareConfig) -> None:
        self._pool, self._tables = pool, tables
        self._run_tokens = max(config.min_run_tokens, pool.tokens_per_block)
        self._writers: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)  # requests by place and text
        self._waiting: deque[tuple[int, int, int]] = deque()  # (request, logical block, who wrote the same before)

    def look_at(self, sequence: Sequence, sequences: Mapping[int, Sequence]) -> None:
        """Takes note of the generated blocks that were filled since the last call, and of their earlier copies."""
        size, request_id = self._pool.tokens_per_block, sequence.request_id
        assert sequence.matcher is not None
        first, stop = max(sequence.num_offered_to_group, sequence.first_generated_block), sequence.num_computed // size
        for logical in range(first, stop):
            end = (logical + 1) * size
            text = sequence.matcher.tokens(max(0, end - self._run_tokens), end).tobytes()
            writers = self._writers[logical, text]
            other = next((w for w in writers if self._block_at(sequences.get(w), logical) is not None), None)
            if other is not None and other != request_id:
                self._waiting.append((request_id, logical, other))
            if request_id not in writers:
                writers.append(request_id)
        sequence.num_offered_to_group = stop

    def find(self, sequences: Mapping[int, Sequence], limit: int) -> list[Candidate]:
        """Pairs that can be decided on now, at most ``limit``; protected ones are kept for later calls."""
        found: list[Candidate] = []
        for _ in range(len(self._waiting)):
            if len(found) >= limit:
                break
            request_id, logical, other = self._waiting.popleft()
            reader = sequences.get(request_id)
            if reader is None or reader.matcher is None:
                continue
            if (logical + 1) * self._pool.tokens_per_block > min(reader.matcher.protected_from(), reader.num_computed):
                self._waiting.append((request_id, logical, other))
                continue
            block, donor = self._block_at(reader, logical), self._block_at(sequences.get(other), logical)
            if block is not None and donor is not None and block != donor:
                found.append(self._candidate(reader, logical, block, donor))
        return found

    def _block_at(self, sequence: Sequence | None, logical: int) -> int | None:
        """The full block in which a logical block's tokens rest slot by slot; None if there is none any more."""
        if sequence is None:
            return None
        size = self._pool.tokens_per_block
        block = int(self._tables[sequence.slot, logical])
        rows = sequence.token_rows[logical * size : (logical + 1) * size]
        return block if self._pool.is_full[block] and (rows == block * size + np.arange(size)).all() else None

    def _candidate(self, reader: Sequence, logical: int, block: int, donor: int) -> Candidate:
        pool, slots = self._pool, np.arange(self._pool.tokens_per_block, dtype=np.int32)
        return Candidate(
            request_id=reader.request_id,
            epoch=reader.epoch,
            logical=logical,
            block=block,
            block_generation=int(pool.generation[block]),
            donor=donor,
            retired_rows=block * pool.tokens_per_block + slots,
            kept_rows=donor * pool.tokens_per_block + slots,
            kept_generations=np.full(pool.tokens_per_block, pool.generation[donor]),
        )
