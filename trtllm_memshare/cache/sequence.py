"""What the manager knows of one sequence beside its row of the block table."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trtllm_memshare.search.types import Matcher


@dataclass(frozen=True)
class GivablePages:
    """Pages of one request that may go, and the counts that its floor is worked out from.

    Attributes:
      pages: int32 ``[n]``, ascending logical pages: full, generated, not protected, referred to by no other request,
        and not given up before.
      repeated: bool ``[n]``, whether every token of the page stands once more, later, in what the request keeps.
      num_repeated: how many do.
      num_generated: full pages of generated tokens, those given up included.
      num_retired: how many of them were given up.
    """

    pages: np.ndarray
    repeated: np.ndarray
    num_repeated: int
    num_generated: int
    num_retired: int

    def most(self, room: int) -> int:
        """How many may go: all that stand again, and others while there is room, see ``floor_room``."""
        return max(self.num_repeated, min(room, len(self.pages)))


@dataclass
class Sequence:
    """Host-side state of one request in the cache.

    Positions, with ``c`` = num_computed and ``n`` = num_tokens::

        | prompt blocks: never retired | generated, in full blocks | partial |
        0 ..................... first_generated_block * tokens_per_block ... c .. n
                                                        rows written: [0, c)

    Attributes:
      slot: row of the manager's block table.
      epoch: raised at each pause, so that decisions of an earlier life are recognised.
      num_tokens: tokens that have room in the cache.
      num_computed: tokens whose K and V have been written.
      group: the caller's number and the prompt, of samples that may share with each other; None = alone.
      token_rows: int32 ``[max_seq_len]``, where each token's K and V, or those standing in for them, lie; -1 where
        nothing does: not written yet, or forgotten.
      retired: bool ``[max_blocks_per_seq]``, logical blocks that were given up: another one of the request stands in
        for them, or they are forgotten.
      to_retire: bool ``[max_blocks_per_seq]``, blocks that were given up before a pause and go again once computed.
      comes_back: it was paused with blocks given up.
      donors: of blocks given up under pressure, those before a pause included: the logical block that is read in place
        of each; one that is not named is forgotten.
      has_stand_ins: some entry names, or some token rests on, a block that another page was written into.
      num_context_tokens: tokens that came as context in this life; all have room at once unless it came back.
      num_retired: blocks that were freed when the request gave up its references.
      peak_blocks: most blocks that it held at once, those given up left out.
      num_offered_to_group: first logical blocks that the samples of its group have been shown.
      unmatched: tokens that stage 1 has not been given yet.
      givable: what could go when it was last looked for, and as of what; None = something has gone since.
    """

    request_id: int
    slot: int
    group: tuple[int, bytes] | None
    num_prompt_tokens: int
    first_generated_block: int
    token_rows: np.ndarray
    retired: np.ndarray
    to_retire: np.ndarray
    matcher: Matcher | None
    epoch: int = 0
    comes_back: bool = False
    has_stand_ins: bool = False
    num_context_tokens: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    num_blocks: int = 0
    num_retired: int = 0
    peak_blocks: int = 0
    num_offered_to_group: int = 0
    unmatched: list[int] = field(default_factory=list)
    donors: dict[int, int] = field(default_factory=dict)
    givable: tuple[tuple[int, bool], GivablePages] | None = None

    @property
    def is_generating(self) -> bool:
        """Whether all that came as context is computed, and at most one token is not."""
        return self.num_computed >= max(self.num_tokens - 1, self.num_context_tokens)

    @property
    def is_matcher_due(self) -> bool:
        """Whether stage 1 has anything to look at or to offer."""
        return self.matcher is not None and self.matcher.is_due(len(self.unmatched))

    def feed_matcher(self) -> None:
        """Hands stage 1 the tokens it has not seen: a few at a time cost less than one by one."""
        if self.matcher is not None and self.unmatched:
            self.matcher.append(np.array(self.unmatched, np.int32))
            self.unmatched.clear()


@dataclass(frozen=True)
class Parked:
    """What outlives a pause.

    Attributes:
      matcher: stage 1's state.
      epoch: of the next life.
      retired: int ``[n]``, pages to give up again.
      donors: see ``Sequence``.
    """

    matcher: Matcher | None = None
    epoch: int = 0
    retired: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    donors: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SharingRecord:
    """What sharing did for one request in its last life: counts of blocks. ``peak_blocks``: most held at once."""

    retired_blocks: int
    generated_blocks: int
    peak_blocks: int = 0


NOTHING_SHARED = SharingRecord(0, 0)


@dataclass
class CacheStats:
    """Counters since the manager was made, and gauges. Counts of blocks unless the name says otherwise.

    Attributes:
      num_blocks: of the pool; null pages are among them, and not among the used ones.
      shared: blocks freed because something stands in for them.
      forgotten: blocks freed with nothing in their place.
      retired_again: those of them that a request gave up once more when it came back from a pause.
      null_entries: entries of tables that point at a null page or, where the runner skips entries, at nothing.
    """

    num_blocks: int = 0
    used_blocks: int = 0
    peak_used_blocks: int = 0
    aliased_entries: int = 0
    null_entries: int = 0
    forgotten: int = 0
    shared: int = 0
    retired_again: int = 0
    shadowed: int = 0
    generated: int = 0
    retired_at_end: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def shared_block_fraction(self) -> float:
        """Blocks freed by sharing / blocks filled by generation, over finished requests (their last life)."""
        return self.retired_at_end / self.generated if self.generated else 0.0
