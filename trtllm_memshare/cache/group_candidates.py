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

_Text = tuple[int, bytes]
"""A logical block and the token ids that end with it."""


class GroupCandidates:
    """Of one group. Of two copies that of the earlier writer stays.

    Args:
      pool: read only.
      tables: int32 ``[max_batch_size, max_blocks_per_seq]``, read only.
      config: so many of its ``min_run_tokens`` must agree up to the end of a block.
    """

    def __init__(self, pool: BlockPool, tables: np.ndarray, config: MemShareConfig) -> None:
        self._pool, self._tables = pool, tables
        self._run_tokens = max(config.min_run_tokens, pool.tokens_per_block)
        self._writers: defaultdict[_Text, list[int]] = defaultdict(list)  # requests, the first writer first
        self._written: defaultdict[int, list[_Text]] = defaultdict(list)  # by request
        self._waiting: defaultdict[int, deque[_Text]] = defaultdict(deque)  # by request, in order

    def look_at(self, sequence: Sequence) -> None:
        """Takes note of the generated blocks that were filled since the last call."""
        size, request_id = self._pool.tokens_per_block, sequence.request_id
        assert sequence.matcher is not None
        first, stop = max(sequence.num_offered_to_group, sequence.first_generated_block), sequence.num_computed // size
        for logical in range(first, stop):
            end = (logical + 1) * size
            text = logical, sequence.matcher.tokens(max(0, end - self._run_tokens), end).tobytes()
            self._writers[text].append(request_id)
            self._written[request_id].append(text)
            self._waiting[request_id].append(text)
        sequence.num_offered_to_group = stop

    def forget(self, request_id: int) -> None:
        """Takes out a request that gave its blocks back."""
        self._waiting.pop(request_id, None)
        for text in self._written.pop(request_id, ()):
            self._writers[text].remove(request_id)
            if not self._writers[text]:
                del self._writers[text]

    def find(self, sequences: Mapping[int, Sequence], limit: int) -> list[Candidate]:
        """Pairs to decide on, at most ``limit``. Each block is offered once, when it is protected no more."""
        found: list[Candidate] = []
        for request_id, waiting in self._waiting.items():
            reader = sequences[request_id]
            assert reader.matcher is not None
            end = min(reader.matcher.protected_from(), reader.num_computed) // self._pool.tokens_per_block
            while waiting and waiting[0][0] < end and len(found) < limit:
                text = waiting.popleft()
                block, donor = self._block_at(reader, text[0]), self._earlier_copy(request_id, text, sequences)
                if block is not None and donor is not None and block != donor:
                    found.append(self._candidate(reader, text[0], block, donor))
        return found

    def _earlier_copy(self, request_id: int, text: _Text, sequences: Mapping[int, Sequence]) -> int | None:
        """The block of the first writer of a text that still has it in place, if that is not the request itself."""
        for writer in self._writers[text]:
            if writer == request_id:
                return None
            block = self._block_at(sequences[writer], text[0])
            if block is not None:
                return block
        return None

    def _block_at(self, sequence: Sequence, logical: int) -> int | None:
        """The full block in which a logical block's tokens rest slot by slot; None if there is none any more."""
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
