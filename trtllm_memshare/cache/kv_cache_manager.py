"""The only one that changes block tables: a sequence's life, its remaps, what it gives up (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import numpy as np

from trtllm_memshare.cache.candidates import find_candidates
from trtllm_memshare.cache.givable import givable_pages
from trtllm_memshare.cache.group_candidates import GroupCandidates
from trtllm_memshare.cache.growth import take_blocks
from trtllm_memshare.cache.null_pages import NullPages, follow_bands, forget_blocks, null_entry
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.cache.remap import OnRefusal, OnRemap, Remapper
from trtllm_memshare.cache.resume import matcher_at_return, pages_to_retire, retired_pages
from trtllm_memshare.cache.sequence import CacheStats, GivablePages, Parked, Sequence, SharingRecord
from trtllm_memshare.cache.stand_ins import NO_DONORS, let_stand_in
from trtllm_memshare.cache.state import CacheState
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate, Decision, Matcher


class KVCacheManager(CacheState):
    """The only one that changes block tables. See ``CacheState`` for what may be asked.

    Args: as ``CacheState``'s, and
      config: protections and limits of sharing.
      make_matcher: makes stage 1 for a new request of that many prompt tokens; None when nothing is searched.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        tokens_per_block: int,
        max_blocks_per_seq: int,
        max_batch_size: int,
        config: MemShareConfig,
        make_matcher: Callable[[int], Matcher] | None = None,
        null_pages: NullPages | None = None,
    ) -> None:
        super().__init__(num_blocks, num_layers, tokens_per_block, max_blocks_per_seq, max_batch_size, null_pages)
        self.config = config
        self._make_matcher = make_matcher
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._groups: dict[tuple[int, bytes], GroupCandidates] = {}
        self._remapper = Remapper(self.pool, self._tables, config, null_pages)
        self._stats = CacheStats(num_blocks=num_blocks)

    def add_sequence(
        self,
        request_id: int,
        token_ids: np.ndarray,
        num_prompt_tokens: int | None = None,
        group: int | None = None,
        shares: bool = True,
    ) -> bool:
        """Takes blocks for all of ``token_ids``, unshared; False if the pool or the batch has no room now.

        A request that was paused under pressure takes those of the pages it had not given up, see ``cache.resume``:
        ``room_for_chunk`` says how far they reach.

        Args:
          request_id: a new request, or one that was paused.
          token_ids: int32 ``[n]``, prompt and, after a pause, what was generated.
          num_prompt_tokens: how many of them are prompt (default: all); blocks with prompt tokens are never retired.
          group: a number that samples of one prompt carry, who may share with each other under ``scope: group``;
            other prompts with the same number stay apart. None = shares with nobody.
          shares: False keeps the request's cache whole.

        Raises:
          ValueError: the request is in the cache already, or longer than the block table.
        """
        num_tokens = len(token_ids)
        num_blocks = self.blocks_to_add(request_id, num_tokens)
        if request_id in self._sequences:
            raise ValueError(f"request {request_id} is in the cache already")
        if (needed := self.blocks_for(num_tokens)) > self.max_blocks_per_seq:
            raise ValueError(f"request {request_id} needs {needed} blocks, a table has {self.max_blocks_per_seq}")
        if not self._free_slots or num_blocks > self.pool.num_free:
            return False
        num_prompt_tokens = num_tokens if num_prompt_tokens is None else num_prompt_tokens
        parked = self._parked.pop(request_id, None) or Parked()
        make = self._make_matcher if shares else None
        matcher = matcher_at_return(parked, token_ids, num_prompt_tokens, make)
        sequence = Sequence(
            request_id=request_id,
            slot=self._free_slots[-1],
            group=None if group is None else (group, token_ids[:num_prompt_tokens].tobytes()),
            num_prompt_tokens=num_prompt_tokens,
            first_generated_block=self.blocks_for(num_prompt_tokens),
            token_rows=np.full(self.max_blocks_per_seq * self.tokens_per_block, -1, np.int32),
            retired=np.zeros(self.max_blocks_per_seq, bool),
            to_retire=np.zeros(self.max_blocks_per_seq, bool),
            matcher=matcher,
            epoch=parked.epoch,
            comes_back=len(parked.retired) > 0,
            num_context_tokens=num_tokens,
            donors=parked.donors,
        )
        sequence.to_retire[parked.retired] = True
        self._free_slots.pop()  # nothing that could fail stands between this line and the next
        self._sequences[request_id] = sequence
        if self.config.scope == "group" and sequence.group is not None and matcher is not None:
            self._groups.setdefault(sequence.group, GroupCandidates(self.pool, self._tables, self.config))
        self._extend(sequence, min(num_tokens, num_blocks * self.tokens_per_block))
        return True

    def append_tokens(self, request_id: int, token_ids: Seq[int]) -> bool:
        """Makes room for the next tokens; False, with nothing changed, if the pool has no block for them."""
        sequence = self._sequences[request_id]
        if not self._extend(sequence, sequence.num_tokens + len(token_ids)):
            return False
        if sequence.matcher is not None:
            sequence.unmatched.extend(token_ids)
        return True

    def mark_computed(self, request_id: int, num_computed: int) -> None:
        """Records that K and V of the first ``num_computed`` tokens are written."""
        sequence = self._sequences[request_id]
        first, last = sequence.num_computed // self.tokens_per_block, num_computed // self.tokens_per_block
        if last > first:
            blocks = slice(first, last) if last > first + 1 else first
            self.pool.is_full[self._tables[sequence.slot, blocks]] = True
        sequence.num_computed = num_computed
        if sequence.comes_back and sequence.to_retire.any():
            self._retire_again(sequence)

    def givable_pages(self, request_id: int, find_repeats: bool = True) -> GivablePages:
        """What a request could give up, see ``cache.givable``; nothing while its context is computed."""
        sequence = self._sequences[request_id]
        return givable_pages(sequence, self._tables[sequence.slot], self.pool, find_repeats)

    def match(self, request_id: int) -> None:
        """Lets stage 1 look at a request's new tokens now, so that ``candidates`` finds less to do at once."""
        sequence = self._sequences[request_id]
        if sequence.is_matcher_due and sequence.matcher is not None:
            sequence.feed_matcher()
            sequence.matcher.ready_blocks()

    def candidates(self) -> list[Candidate]:
        """Blocks that could be retired now, at most ``max_pairs``, over sequences that are past their prompt."""
        found: list[Candidate] = []
        for sequence in self._sequences.values():
            if sequence.matcher is None or not sequence.is_generating:
                continue
            if sequence.group is None and not sequence.is_matcher_due:
                continue  # most, most of the time
            room = self.config.max_pairs - len(found)
            if room <= 0:
                break
            sequence.feed_matcher()
            found.extend(find_candidates(sequence, self._tables[sequence.slot], self.pool, room, self.config))
            if sequence.group in self._groups:
                self._groups[sequence.group].look_at(sequence)
        for group in self._groups.values():
            found.extend(group.find(self._sequences, self.config.max_pairs - len(found)))
        return found

    def apply(self, decisions: list[Decision]) -> int:
        """Remaps what the decisions ask for, between two steps; returns the number of blocks freed.

        A decision whose blocks or request have changed since the search is dropped and counted under ``stale``.
        """
        freed = self._remapper.apply(decisions, self._sequences)
        self._stats.shared += freed
        return freed

    def retire(self, request_id: int, logical_blocks: np.ndarray, donors: Mapping[int, int] = NO_DONORS) -> int:
        """Gives up full, generated blocks of a request, between two steps; returns how many became free.

        Their entries, and those of their aliases, point at their donors from then on (see ``let_stand_in``); without
        one at the null page of the request's band, or at nothing where the runner skips entries.

        Raises:
          ValueError: a block with prompt tokens or one that is not full; or there are no null pages to point at.
        """
        sequence = self._sequences[request_id]
        sequence.givable = None
        table, become = self._tables[sequence.slot], null_entry(sequence, self.null_pages, self.config)
        shared = let_stand_in(sequence, table, logical_blocks, donors, self.pool)
        forgotten = forget_blocks(sequence, table, logical_blocks, self.pool, become)
        self._stats.shared += shared
        self._stats.forgotten += forgotten
        return shared + forgotten

    def cross_bands(self, request_ids: Seq[int], sequence_lengths: Seq[int] | np.ndarray) -> int:
        """Moves null entries on to the page of the band that the next step's queries are in; returns how many moved.

        To be called before the step's ``block_offsets``.

        Args:
          request_ids: of the step.
          sequence_lengths: tokens that each of them has in the cache after the step.
        """
        if self.null_pages is None or len(self.null_pages.blocks) == 1:
            return 0
        moved = 0
        for request_id, length in zip(request_ids, sequence_lengths, strict=True):
            sequence = self._sequences[request_id]
            if sequence.retired.any():
                table = self._tables[sequence.slot]
                moved += follow_bands(sequence, table, int(length), self.null_pages, self.pool)
        return moved

    def offer_again(self, candidate: Candidate) -> None:
        """Puts a candidate that could not be looked at back on stage 1's list, unless its request has changed."""
        sequence = self._sequences.get(candidate.request_id)
        if sequence is not None:
            self._remapper.offer_again(candidate, sequence)

    def watch_remaps(self, applied: OnRemap, refused: OnRefusal | None = None) -> None:
        """Lets somebody hear of each decision that was applied, and of each that was not."""
        self._remapper.on_remap, self._remapper.on_refusal = applied, refused

    def count_shadow(self, decisions: Seq[object]) -> None:
        """Counts what would have been shared or given up, for shadow mode; changes nothing else."""
        self._stats.shadowed += len(decisions)

    def evict_blocks(self, request_id: int, logical_blocks: np.ndarray) -> None:
        """Drops blocks with nothing in their place: for the controls that evict."""
        sequence = self._sequences[request_id]
        sequence.givable = None
        blocks = self._tables[sequence.slot, logical_blocks]
        self.pool.release(blocks[blocks != NO_BLOCK])
        self._tables[sequence.slot, logical_blocks] = NO_BLOCK
        sequence.num_retired += int((~sequence.retired[logical_blocks]).sum())
        sequence.retired[logical_blocks] = True

    def remove_sequence(self, request_id: int) -> SharingRecord:
        """Drops all references of a finished or cancelled request; co-owners keep theirs."""
        sequence = self._drop(request_id)
        full_blocks = sequence.num_computed // self.tokens_per_block
        generated_blocks = max(0, full_blocks - sequence.first_generated_block)
        record = SharingRecord(sequence.num_retired, generated_blocks, sequence.peak_blocks)
        self._stats.retired_at_end += record.retired_blocks
        self._stats.generated += record.generated_blocks
        return record

    def pause_sequence(self, request_id: int) -> None:
        """Drops all references but keeps stage 1's state; ``add_sequence`` with the same id resumes it."""
        sequence = self._drop(request_id)
        sequence.feed_matcher()
        retired = retired_pages(sequence) if self.config.pressure else np.zeros(0, np.int64)
        self._parked[request_id] = Parked(sequence.matcher, sequence.epoch + 1, retired, sequence.donors)

    def forget_paused(self, request_id: int) -> None:
        """Lets go of a paused request that will not come back."""
        self._parked.pop(request_id, None)

    def abandon(self, request_id: int) -> None:
        """Takes back whatever a call of ``add_sequence`` that raised has left."""
        if request_id in self._sequences:
            self._drop(request_id)
        self.forget_paused(request_id)

    def stats(self) -> CacheStats:
        """Counters and gauges as of now."""
        entries, counted = sum(s.num_blocks for s in list(self._sequences.values())), int(self.pool.ref_count.sum())
        self._stats.used_blocks = self.pool.num_used
        self._stats.aliased_entries = counted - self.pool.num_used
        self._stats.null_entries = entries - counted
        self._stats.refused = dict(self._remapper.refused)
        return self._stats

    def _retire_again(self, sequence: Sequence) -> None:
        """Gives up what a request that came back had given up, and lets the blocks carry its next pages at once."""
        pages = pages_to_retire(sequence, self.tokens_per_block)
        freed = self.retire(sequence.request_id, pages, sequence.donors) if len(pages) else 0
        self._stats.retired_again += freed
        blocks = sequence.num_blocks + freed
        room = min(sequence.num_context_tokens, blocks * self.tokens_per_block)
        self._extend(sequence, max(sequence.num_tokens, room))

    def _extend(self, sequence: Sequence, num_tokens: int) -> bool:
        stop = self.blocks_for(num_tokens)
        if stop > sequence.num_blocks:
            if stop > self.max_blocks_per_seq:
                raise ValueError(
                    f"request {sequence.request_id} needs {stop} blocks, a table has {self.max_blocks_per_seq}"
                )
            if not take_blocks(sequence, self._tables[sequence.slot], stop, self.pool):
                return False
            self._stats.peak_used_blocks = max(self._stats.peak_used_blocks, self.pool.num_used)
        sequence.num_tokens = num_tokens
        return True

    def _drop(self, request_id: int) -> Sequence:
        sequence = self._sequences.pop(request_id)
        row = self._tables[sequence.slot, : sequence.num_blocks]
        self.pool.release(row[row != NO_BLOCK])
        row[:] = NO_BLOCK
        self._free_slots.append(sequence.slot)
        if sequence.group in self._groups:
            self._groups[sequence.group].forget(request_id)
            if all(s.group != sequence.group for s in self._sequences.values()):
                del self._groups[sequence.group]
        return sequence
