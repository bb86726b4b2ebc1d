"""Which pages of a text go, and when: the product's ranking and block tables, walked through without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.nearest_page import pair_with_earlier
from trtllm_memshare.search.pressure import PressureView, choose_pages, floor_room

NEVER = np.iinfo(np.int64).max
NO_DONOR = -1


@dataclass(frozen=True)
class Retirements:
    """What became of each page of one text.

    Attributes:
      tokens_per_block: tokens of a page.
      retired_at: int64 ``[pages]``, position of the first query that does not see the page, ``NEVER`` = all do.
      donor: int32 ``[pages]``, the page that is read in its place from then on, ``NO_DONOR`` = none.
    """

    tokens_per_block: int
    retired_at: np.ndarray
    donor: np.ndarray

    def forgotten(self) -> Retirements:
        """The same pages at the same times with nothing in their place."""
        return replace(self, donor=np.full(len(self.donor), NO_DONOR, np.int32))

    @property
    def first(self) -> int | None:
        """Position of the first query that does not see everything, None = there is none."""
        return int(self.retired_at.min()) if (self.retired_at < NEVER).any() else None

    @property
    def retired_pages(self) -> int:
        """Pages that went."""
        return int((self.retired_at < NEVER).sum())

    def weights(self, queries: np.ndarray) -> np.ndarray:
        """How often each page counts for queries at these positions, float64 ``[queries, pages]``, at least 1.

        An alias hands all that it stands for to its donor, and so on along a chain. Example: page 2 goes to 5 at
        position 100, page 5 to 9 at 200: page 5 weighs 2 from 100 on, page 9 weighs 3 from 200 on.
        """
        current = np.ones(len(self.retired_at))
        weights = np.ones((len(queries), len(self.retired_at)))
        # Of pages that go at one position those come first that others of them do not stand for yet.
        for page in np.lexsort((-self._hops(), self.retired_at)):
            if self.retired_at[page] == NEVER:
                break
            if self.donor[page] == NO_DONOR:
                continue
            current[self.donor[page]] += current[page]
            weights[queries >= self.retired_at[page], self.donor[page]] = current[self.donor[page]]
        return weights

    def _hops(self) -> np.ndarray:
        """Of each page how many donors away the one is that stands for it in the end, int64 ``[pages]``."""
        hops, at = np.zeros(len(self.donor), np.int64), self.donor
        while (at != NO_DONOR).any():  # a donor is another page each time, so no chain is longer than there are pages
            hops += at != NO_DONOR
            at = np.where(at == NO_DONOR, NO_DONOR, self.donor[at])
        return hops

    def memory_share(self, first_generated: int) -> float:
        """Generated pages held over those written, both summed over the moments at which a page is completed.

        What a page that is being written holds does not count: nearly ``tokens_share`` with short pages alone.
        """
        size, num_pages = self.tokens_per_block, len(self.retired_at)
        ends = (np.arange(first_generated, num_pages) + 1) * size
        written = np.arange(1, num_pages - first_generated + 1)
        gone = (self.retired_at[None, first_generated:] <= ends[:, None]).sum(1)
        return float((written - gone).sum() / written.sum())

    def tokens_share(self, num_prompt_tokens: int, num_tokens: int) -> float:
        """Generated tokens held over those written, both summed over all tokens of the text."""
        written = (num_tokens - num_prompt_tokens) * (num_tokens - num_prompt_tokens + 1) // 2
        gone = np.clip(num_tokens + 1 - self.retired_at, 0, None).sum() * self.tokens_per_block
        return float(1 - gone / written)


@dataclass(frozen=True)
class Moment:
    """The cache of one text just after a page was completed.

    Attributes:
      num_computed: tokens that are written.
      resident: int64 ``[n]``, generated pages that are there, this one included.
      may_go: int64 ``[m]``, those of them that are old enough to go.
    """

    num_computed: int
    resident: np.ndarray
    may_go: np.ndarray


Choice = Callable[[Moment, int], tuple[np.ndarray, np.ndarray]]
"""At most so many pages of ``may_go``, and for each the page that is read in its place or ``NO_DONOR``."""


def lowest_need(ranking: Callable[[Moment], np.ndarray]) -> Choice:
    """The pages with the lowest need, forgotten; ``ranking`` gives the need of each page of ``may_go``."""

    def choose(moment: Moment, room: int) -> tuple[np.ndarray, np.ndarray]:
        none_repeated = np.zeros(len(moment.may_go), bool)
        view = PressureView(0, moment.may_go.astype(np.int32), ranking(moment), none_repeated, room)
        pages = np.concatenate([np.zeros(0, np.int32), *(pages for _, pages in choose_pages([view], room))])
        return pages, np.full(len(pages), NO_DONOR)

    return choose


def nearest_earlier(distance: np.ndarray, max_aliases: int) -> Choice:
    """The paper's choice at a budget: the page nearest to an earlier generated page, which is read in its place.

    Args:
      distance: ``[pages, pages]``, see ``TextFacts``.
      max_aliases: most pages that one page stands in for, itself included.
    """
    counts = np.ones(len(distance), np.int64)

    def choose(moment: Moment, room: int) -> tuple[np.ndarray, np.ndarray]:
        pages = moment.may_go  # what is earlier than one of them may go too
        pairs = pair_with_earlier(distance[np.ix_(pages, pages)], counts[pages], max_aliases, room)
        going, donors = pages[np.array(pairs, np.int64).reshape(-1, 2).T]
        for page, donor in zip(going, donors, strict=True):
            counts[donor] += counts[page]
        return going, donors

    return choose


def hold_at_floor(
    num_prompt_tokens: int,
    num_tokens: int,
    tokens_per_block: int,
    min_kept: float,
    protected_tokens: int,
    choose: Choice,
) -> Retirements:
    """A request that is held at its floor throughout, as under lasting memory pressure.

    After each page that it completes, it gives up what it has above ``min_kept`` of its generated pages, never the
    prompt, never one of the last ``protected_tokens`` tokens.
    """
    num_pages = num_tokens // tokens_per_block
    config = make_config("off", retired_becomes="dropped")
    manager = KVCacheManager(num_pages + 1, 1, tokens_per_block, num_pages + 1, 1, config)
    manager.add_sequence(0, np.zeros(num_prompt_tokens, np.int32))
    retired_at = np.full(num_pages, NEVER, np.int64)
    donor = np.full(num_pages, NO_DONOR, np.int32)
    first = manager.blocks_for(num_prompt_tokens)
    if num_prompt_tokens < first * tokens_per_block:
        manager.append_tokens(0, [0] * (first * tokens_per_block - num_prompt_tokens))
    for page in range(first, num_pages):
        computed = (page + 1) * tokens_per_block
        manager.append_tokens(0, [0] * tokens_per_block)
        manager.mark_computed(0, computed)
        table = manager.block_table(0)
        generated = np.arange(first, page + 1)
        resident = generated[table[generated] != NO_BLOCK]
        may_go = resident[resident < (computed - protected_tokens) // tokens_per_block]
        room = floor_room(len(generated), len(generated) - len(resident), min_kept)
        if room <= 0 or not len(may_go):
            continue
        pages, donors = choose(Moment(computed, resident, may_go), room)
        manager.retire(0, pages)
        retired_at[pages], donor[pages] = computed, donors
    manager.check_integrity()
    return Retirements(tokens_per_block, retired_at, donor)
