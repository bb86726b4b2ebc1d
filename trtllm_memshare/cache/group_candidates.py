"""Candidates between samples of one prompt: blocks that hold the same text in the same phase.

A sample's table can name a block of another sample, but not that block's neighbours: it has one entry for each of its
own blocks. A run of text that lies at another phase would need one more. So only blocks whose tokens agree slot by slot
are looked for, which one table of texts finds, without a search. Samples that have not parted yet agree everywhere.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.sequence import Sequence
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate


@dataclass(frozen=True, slots=True)
class _Place:
    """A logical block of a request."""

    request_id: int
    logical: int


class GroupCandidates:
    """Of one group.

    Args:
      pool: read only.
      tables: int32 ``[max_batch_size, max_blocks_per_seq]``, read only.
      config: ``min_run_tokens`` must agree up to the end of a block. With ``keep-latest`` the copy that was written
        further on in its text stays, with ``keep-earliest`` the other; at equal places the one that was there first.
    """

    def __init__(self, pool: BlockPool, tables: np.ndarray, config: MemShareConfig) -> None:
        self._pool, self._tables = pool, tables
        self._keeps_latest = config.direction == "keep-latest"
        self._run_tokens = max(config.min_run_tokens, pool.tokens_per_block)
        self._places: defaultdict[bytes, dict[int, _Place]] = defaultdict(dict)  # the latest of each request
        self._waiting: deque[tuple[_Place, _Place]] = deque()  # (gives up its memory, stands in)

    def look_at(self, sequence: Sequence, sequences: Mapping[int, Sequence]) -> None:
        """Takes note of the generated blocks that were filled since the last call, and of their earlier copies."""
        size = self._pool.tokens_per_block
        assert sequence.matcher is not None
        for logical in range(sequence.num_offered_to_group, sequence.num_computed // size):
            if logical < sequence.first_generated_block:
                continue
            end = (logical + 1) * size
            text = sequence.matcher.tokens(max(0, end - self._run_tokens), end).tobytes()
            place = _Place(sequence.request_id, logical)
            known = self._places[text]
            others = [p for p in known.values() if p.request_id != sequence.request_id]
            other = next((p for p in others if self._block_at(p, sequences) is not None), None)
            if other is not None:
                gains = logical - other.logical if self._keeps_latest else other.logical - logical
                self._waiting.append((other, place) if gains > 0 else (place, other))
            known[sequence.request_id] = place
        sequence.num_offered_to_group = sequence.num_computed // size

    def find(self, sequences: Mapping[int, Sequence], limit: int) -> list[Candidate]:
        """Pairs that can be decided on now, at most ``limit``; those that have to wait are kept for later calls."""
        found: list[Candidate] = []
        for _ in range(len(self._waiting)):
            if len(found) >= limit:
                break
            pair = self._waiting.popleft()
            reader = sequences.get(pair[0].request_id)
            if reader is not None and self._must_wait(pair, reader):
                self._waiting.append(pair)
                continue
            block, donor = (self._block_at(place, sequences) for place in pair)
            if reader is not None and block is not None and donor is not None and block != donor:
                found.append(self._candidate(reader, pair[0].logical, block, donor))
        return found

    def _block_at(self, place: _Place, sequences: Mapping[int, Sequence]) -> int | None:
        """The full block in which the tokens of a place rest slot by slot; None if there is none any more."""
        sequence = sequences.get(place.request_id)
        if sequence is None:
            return None
        size = self._pool.tokens_per_block
        block = int(self._tables[sequence.slot, place.logical])
        rows = sequence.token_rows[place.logical * size : (place.logical + 1) * size]
        return block if self._pool.is_full[block] and (rows == block * size + np.arange(size)).all() else None

    def _must_wait(self, pair: tuple[_Place, _Place], reader: Sequence) -> bool:
        """Recent text is protected; a copy ahead of the reader would show it positions that it has not reached."""
        size = self._pool.tokens_per_block
        assert reader.matcher is not None
        end = min(reader.matcher.protected_from(), reader.num_computed)
        return (pair[0].logical + 1) * size > end or (pair[1].logical + 1) * size > reader.num_tokens

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
