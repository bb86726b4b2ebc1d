"""Applies decisions: the one place where an entry of a block table is rewritten.

A remap retires a physical block X in favour of a donor D::

    table of the request   ... X ... D ...      ->   ... D ... D ...     X is free, D has one more reference
    rows of X's tokens     X:0 .. X:15          ->   their counterparts, in D or in D's neighbour

All entries of the request that point at X move together, since moving one of two frees nothing. Tokens that rested on
rows of X are handed on to the rows that stand in for those, and the distances add up; a chain longer than
``max_distance`` is refused, so that a token's stand-in cannot drift away from it copy by copy.

Under ``scope: group`` a block can have readers in several requests. Each leaves it on its own, for what suits its own
text, as it would alone; the last to leave frees it.

``retired_becomes`` says what entries of X become where D is in the request's own table already: a second entry at D (an
alias, counted twice in attention), the null page, or nothing. Tokens are handed on to their counterparts all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.cache.sequence import Sequence
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate, Decision

OnRemap = Callable[[Decision], None]
"""Hears of each decision right after it was applied: its donor holds the references then."""
OnRefusal = Callable[[Decision, str], None]
"""Hears of each decision that was turned down, and why."""

WORTH_ANOTHER_LOOK = ("stale", "donor_in_batch")
"""Reasons that pass: another decision of the same batch came first."""


class Remapper:
    """Checks and applies decisions.

    Attributes:
      refused: counts of decisions turned down, by reason.
      on_remap, on_refusal: who wants to hear of decisions, or None.
    """

    def __init__(
        self, pool: BlockPool, tables: np.ndarray, config: MemShareConfig, null_pages: NullPages | None = None
    ) -> None:
        if config.retired_becomes == "null" and config.shares and null_pages is None:
            raise ValueError("retired_becomes null needs null pages that the runner has written, got none")
        self._pool = pool
        self._null_pages = null_pages
        self._tables = tables
        self._config = config
        self.refused: Counter[str] = Counter()
        self.on_remap: OnRemap | None = None
        self.on_refusal: OnRefusal | None = None

    def apply(self, decisions: list[Decision], sequences: Mapping[int, Sequence]) -> int:
        """Applies decisions in order of distance; returns the number of blocks freed."""
        freed, donors = 0, set[int]()
        for holder in sequences.values() if decisions else ():
            holder.givable = None  # of those too that hold the same blocks
        for decision in sorted(decisions, key=lambda d: d.distance):
            candidate = decision.candidate
            sequence = sequences.get(candidate.request_id)
            reason = self._why_not(decision, sequence, sequences, donors)
            if reason is not None or sequence is None:
                self.refused[reason or "stale"] += 1
                if reason in WORTH_ANOTHER_LOOK and sequence is not None:
                    self.offer_again(candidate, sequence)
                if self.on_refusal is not None:
                    self.on_refusal(decision, reason or "stale")
                continue
            freed += self._remap(candidate, decision.distance, sequence)
            donors.update((candidate.kept_rows // self._pool.tokens_per_block).tolist(), (candidate.donor,))
            if self.on_remap is not None:
                self.on_remap(decision)
        return freed

    def _why_not(
        self, decision: Decision, sequence: Sequence | None, sequences: Mapping[int, Sequence], donors: set[int]
    ) -> str | None:
        """The reason to refuse a decision, or None."""
        candidate, pool, size = decision.candidate, self._pool, self._pool.tokens_per_block
        kept_blocks = candidate.kept_rows // size
        if (
            sequence is None
            or sequence.epoch != candidate.epoch
            or pool.generation[candidate.block] != candidate.block_generation
            or (pool.generation[kept_blocks] != candidate.kept_generations).any()
        ):
            return "stale"
        if candidate.block in donors:
            return "donor_in_batch"
        table = self._tables[sequence.slot, : sequence.num_blocks]
        if table[candidate.logical] != candidate.block or sequence.retired[candidate.logical]:
            return "not_owned"
        if candidate.logical < sequence.first_generated_block:
            return "prompt"
        if not pool.is_full[candidate.block] or not pool.is_full[candidate.donor]:
            return "not_full"
        if candidate.donor == candidate.block or (kept_blocks == candidate.block).any():
            return "self"
        aliases = int(((table == candidate.donor) | (table == candidate.block)).sum())
        if aliases > self._config.max_aliases and self._become(candidate.donor, table, sequence) == candidate.donor:
            return "max_aliases"
        if not self._config.accept_all:
            drift = float(pool.drift[candidate.retired_rows].max())
            if not drift + decision.distance <= self._config.max_distance:
                return "drift"
        if np.isin([candidate.donor, *set(kept_blocks.tolist())], table).all():
            return None
        return self._why_not_across(candidate, sequence, sequences, kept_blocks)

    def _why_not_across(
        self, candidate: Candidate, sequence: Sequence, sequences: Mapping[int, Sequence], kept_blocks: np.ndarray
    ) -> str | None:
        """Further conditions on a donor that the request does not read yet."""
        if self._config.scope != "group" or sequence.group is None:
            return "other_request"
        peers = [s for s in sequences.values() if s.group == sequence.group and s is not sequence]
        if not any((self._tables[s.slot, : s.num_blocks] == candidate.donor).any() for s in peers):
            return "other_group"
        # A donor ahead of the reader would show it rotations of positions that it has not reached.
        if self._pool.origin_position[candidate.donor] + self._pool.tokens_per_block > sequence.num_tokens:
            return "beyond_reader"
        # The reader holds references to the donor alone: counterparts in its neighbours could be freed by their owner.
        return None if (kept_blocks == candidate.donor).all() else "out_of_phase"

    def offer_again(self, candidate: Candidate, sequence: Sequence) -> None:
        """Puts a block whose surroundings changed back on stage 1's list."""
        unchanged = self._pool.generation[candidate.block] == candidate.block_generation
        if sequence.matcher is not None and sequence.epoch == candidate.epoch and unchanged:
            sequence.matcher.restore(candidate.logical)

    def _remap(self, candidate: Candidate, distance: float, sequence: Sequence) -> bool:
        """Moves the request's references; True if the block was freed."""
        pool, size = self._pool, self._pool.tokens_per_block
        block, kept = candidate.block, candidate.kept_rows
        inherited = pool.drift[candidate.retired_rows] + np.float32(distance)
        np.maximum.at(pool.drift, kept, inherited)
        table = self._tables[sequence.slot, : sequence.num_blocks]
        # A block that another sample wrote stands in as if it were the request's own, which may repeat itself later.
        sequence.retired[candidate.logical] = bool((table == candidate.donor).any())
        sequence.has_stand_ins = True
        entries = table == block
        become = self._become(candidate.donor, table, sequence)
        table[entries] = become
        rows = sequence.token_rows[: sequence.num_blocks * size]
        moved = np.flatnonzero(rows // size == block)
        rows[moved] = kept[rows[moved] % size]
        if become == candidate.donor:
            freed = pool.move_references(block, candidate.donor, int(entries.sum()))
        else:
            freed = bool(pool.release(np.full(int(entries.sum()), block)))
        sequence.num_retired += freed
        return freed

    def _become(self, donor: int, table: np.ndarray, sequence: Sequence) -> int:
        """What entries become that give way to ``donor``: without it in the table nothing would hold their text."""
        becomes = self._config.retired_becomes
        if becomes == "alias" or not (table == donor).any():
            return donor
        if becomes == "dropped" or self._null_pages is None:
            return NO_BLOCK
        return self._null_pages.block_at(sequence.num_tokens - 1)
