"""The state of the cache, and what may be asked of it: nothing here changes anything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.null_pages import NullPages, is_null
from trtllm_memshare.cache.offsets import NO_BLOCK, encode_block_offsets
from trtllm_memshare.cache.resume import blocks_at_return
from trtllm_memshare.cache.sequence import Parked, Sequence


class CacheState:
    """Block tables of all sequences over one pool. ``KVCacheManager`` alone changes them.

    Args:
      num_blocks: physical blocks of the pool.
      num_layers: layers that one block spans.
      tokens_per_block: tokens of one block.
      max_blocks_per_seq: width of the block table.
      max_batch_size: most sequences at once.
      null_pages: blocks of the pool that the runner has written so that no query attends to them, or None.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        tokens_per_block: int,
        max_blocks_per_seq: int,
        max_batch_size: int,
        null_pages: NullPages | None,
    ) -> None:
        self.pool = BlockPool(num_blocks, tokens_per_block)
        self.null_pages = null_pages
        if null_pages is not None:
            self.pool.reserve(null_pages.blocks)
        self.num_layers = num_layers
        self.tokens_per_block = tokens_per_block
        self.max_blocks_per_seq = max_blocks_per_seq
        self._tables = np.full((max_batch_size, max_blocks_per_seq), NO_BLOCK, np.int32)
        self._sequences: dict[int, Sequence] = {}
        self._parked: dict[int, Parked] = {}  # paused requests

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that many tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.tokens_per_block)

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    def logical_blocks(self, request_id: int) -> int:
        """Table entries of a sequence, shared or not."""
        return self._sequences[request_id].num_blocks

    def blocks_to_add(self, request_id: int, num_tokens: int) -> int:
        """Blocks that ``add_sequence`` takes for a request of so many tokens; one that was paused comes back shared."""
        parked = self._parked.get(request_id)
        return blocks_at_return(num_tokens, 0 if parked is None else len(parked.retired), self.tokens_per_block)

    def room_for_chunk(self, request_id: int) -> int:
        """Tokens that the next context chunk of a request may have at most.

        All that are left, but for a request that came back with pages given up: what its blocks have room for, and not
        beyond the band of positions that its null entries serve.
        """
        sequence = self._sequences[request_id]
        end = sequence.num_tokens
        if self.null_pages is not None and sequence.retired.any():
            end = min(end, self.null_pages.end_of_band(sequence.num_computed))
        return end - sequence.num_computed

    def fills_last_block(self, request_id: int) -> bool:
        """Whether the next token of a request takes a block."""
        return self._sequences[request_id].num_tokens % self.tokens_per_block == 0

    def page_counts(self, request_id: int) -> tuple[int, int]:
        """Full pages of generated tokens, and how many of them were given up; zeros for a request in its context."""
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.is_generating:
            return 0, 0
        first, full = sequence.first_generated_block, sequence.num_computed // self.tokens_per_block
        return max(0, full - first), int(np.count_nonzero(sequence.retired[first : max(first, full)]))

    def num_given_up(self, request_id: int) -> int:
        """Pages that a request has given up now, while its context is computed again too; 0 if it is not here."""
        sequence = self._sequences.get(request_id)
        return 0 if sequence is None else int(np.count_nonzero(sequence.retired))

    def num_given_up_for_good(self, request_id: int) -> int:
        """The same with those that a paused request will be without once its context is computed again."""
        parked, sequence = self._parked.get(request_id), self._sequences.get(request_id)
        if sequence is None:
            return 0 if parked is None else len(parked.retired)
        return int(np.count_nonzero(sequence.retired | sequence.to_retire))

    def generated_pages(self, request_id: int) -> tuple[int, int, np.ndarray]:
        """The first page of generated tokens, the end of the full ones, and the request's row of the block table."""
        sequence = self._sequences[request_id]
        full = max(sequence.first_generated_block, sequence.num_computed // self.tokens_per_block)
        return sequence.first_generated_block, full, self._tables[sequence.slot, : sequence.num_blocks].copy()

    def resident_full_blocks(self, request_id: int) -> np.ndarray:
        """Distinct full blocks that a sequence's table names, int32 ``[n]``."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return np.zeros(0, np.int32)
        row = np.unique(self._tables[sequence.slot, : sequence.num_blocks])
        row = row[row != NO_BLOCK]
        return row[self.pool.is_full[row]]

    def origin_blocks(self, request_id: int) -> np.ndarray:
        """The logical block whose K and V each entry of a sequence's table reads, int32 ``[num_blocks]``; -1: none.

        The identity before anything is shared; under ``scope: group`` a donor's own position in its request.
        """
        sequence = self._sequences[request_id]
        blocks = self._tables[sequence.slot, : sequence.num_blocks]
        return np.where(is_null(blocks, self.pool), -1, self.pool.origin_position[blocks] // self.tokens_per_block)

    def is_retired(self, request_id: int, logical_block: int) -> bool:
        """True if the block's own physical block was given up; False for a request that is not in the cache."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and bool(sequence.retired[logical_block])

    def donors(self, request_id: int) -> dict[int, int]:
        """Pages given up under pressure, and the logical block that is read in place of each; not forgotten ones."""
        sequence = self._sequences[request_id]
        return {page: donor for page, donor in sequence.donors.items() if sequence.retired[page]}

    def block_table(self, request_id: int) -> np.ndarray:
        """Physical block of each logical one, int32 ``[num_blocks]``; a copy.

        A null page where it was forgotten, ``NO_BLOCK`` where it was dropped.
        """
        sequence = self._sequences[request_id]
        return self._tables[sequence.slot, : sequence.num_blocks].copy()

    def generating_sequences(self) -> list[tuple[int, int, int]]:
        """(request id, first generated block, tokens computed) of each sequence that is past its prompt."""
        return [
            (s.request_id, s.first_generated_block, s.num_computed) for s in self._sequences.values() if s.is_generating
        ]

    def block_offsets(self, request_ids: Seq[int]) -> np.ndarray:
        """TensorRT-LLM's ``kv_cache_block_offsets``: int32 ``[1, batch, 2, M]``, M = longest of the batch."""
        slots = [self._sequences[i].slot for i in request_ids]
        width = max((self._sequences[i].num_blocks for i in request_ids), default=0)
        return encode_block_offsets(self._tables[slots, :width], self.num_layers)

    def state_digest(self) -> bytes:
        """Digest of tables, what was given up, and the pool's blocks: equal on ranks that did the same."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self._tables, self.pool.ref_count, self.pool.generation, self.pool.is_full):
            digest.update(array.tobytes())
        for sequence in self._sequences.values():
            digest.update(sequence.retired.tobytes())
        return digest.digest()

    def check_integrity(self) -> None:
        """Compares tables and pool; the property tests call it after every operation.

        Raises:
          RuntimeError: naming the broken invariant and its numbers.
        """
        references = np.zeros(self.pool.num_blocks, np.int64)
        for sequence in self._sequences.values():
            row = self._tables[sequence.slot, : sequence.num_blocks]
            np.add.at(references, row[row != NO_BLOCK], 1)
        for sequence in self._sequences.values():
            unwritten = self._tables[
                sequence.slot, sequence.num_computed // self.tokens_per_block : sequence.num_blocks
            ]
            if (references[unwritten] != 1).any() or self.pool.is_null[unwritten].any():
                raise RuntimeError(
                    f"blocks {unwritten.tolist()} of request {sequence.request_id} are being written, "
                    f"with {references[unwritten].tolist()} references, null pages: "
                    f"{self.pool.is_null[unwritten].tolist()}"
                )
            self._check_pages(sequence)
            row = self._tables[sequence.slot]
            pairs = [(p, d) for p, d in sequence.donors.items() if sequence.retired[p]]
            if any(row[p] != row[d] or sequence.retired[d] for p, d in pairs):
                raise RuntimeError(
                    f"pages of request {sequence.request_id} are not read in place of those that were given up: "
                    f"(page, donor) {pairs} in table {row[: sequence.num_blocks].tolist()}"
                )
            if sequence.matcher is not None:
                matched = sequence.matcher.num_tokens + len(sequence.unmatched)
                known = max(sequence.num_tokens, sequence.num_context_tokens)
                if matched != known:
                    raise RuntimeError(
                        f"stage 1 of request {sequence.request_id} has {matched} tokens, the cache {known}: its "
                        f"positions would name other tokens"
                    )
        self.pool.check_integrity(references)

    def _check_pages(self, sequence: Sequence) -> None:
        """What a request's entries, its pages given up and its rows say of one another::

        pages      | prompt | generated, full        | being written |
        retired      no       yes: forgotten, or read elsewhere in the table; no: its own     no
        is_full      yes      yes                      no

        Not which band's null page an entry names: entries follow before a step, and may lag behind between two.
        """
        size, count = self.tokens_per_block, sequence.num_blocks
        first, full = sequence.first_generated_block, sequence.num_computed // size
        row, retired = self._tables[sequence.slot, :count], sequence.retired[:count]
        null = is_null(row, self.pool)
        pages = np.arange(len(sequence.retired))
        outside = pages[sequence.retired & ((pages < first) | (pages >= min(full, count)))]
        kept, rows = row[~retired], sequence.token_rows[: count * size].reshape(count, size)
        wrong = {
            "given up, but no full generated pages": outside,
            "without a block, but not given up": pages[:count][null & ~retired],
            "given up, but held all the same": pages[:count][retired & ~null & ~np.isin(row, kept)],
            "full by their block and not by what is computed": pages[:count][
                ~null & (self.pool.is_full[row] != (pages[:count] < full))
            ],
            "not at the rows of their own block": pages[:count][~retired & (rows // size != row[:, None]).any(1)],
            # An experiment's eviction leaves rows as they are: nothing reads those of an entry without a block.
            "at rows of blocks that are not in the table": pages[:count][
                (row != NO_BLOCK) & ~((rows == -1) | np.isin(rows // size, row[~null])).all(1)
            ],
        }
        broken = {what: found.tolist() for what, found in wrong.items() if len(found)}
        if broken:
            raise RuntimeError(
                f"pages of request {sequence.request_id} contradict one another: {broken}, {sequence.num_computed} "
                f"of {sequence.num_tokens} tokens computed, first generated page {first}, table {row.tolist()}, given "
                f"up {np.flatnonzero(sequence.retired).tolist()}"
            )
