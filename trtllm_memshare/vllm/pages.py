"""What pressure knows about one request's pages: which are full, generated, recent, repeated, retired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trtllm_memshare.search.need import PageFacts
from trtllm_memshare.search.page_pairs import PagePairs
from trtllm_memshare.search.pressure import floor_room
from trtllm_memshare.search.repeats import stands_again
from trtllm_memshare.search.types import Matcher
from trtllm_memshare.vllm.page_report import PageReport
from trtllm_memshare.vllm.request_options import RequestOptions


class RequestPages:
    """Pages of one running request. A page is a logical block; lengths in tokens.

    Args:
      max_aliases: most entries of one page where pages are compared with earlier ones; 0 = they are not.
      aliases: earlier pages are read in place of those that go; else these are forgotten.

    Attributes:
      first_generated: the first page without a prompt token.
      retired: logical blocks that were given up, in order of retirement.
      to_retire_again: those that were given up before the request was preempted, and the page that was read in place of
        each, None = none.
      band: index of the null page that retired entries point at.
      num_asked: pages before this one were asked about, or need not be.
      exhausted_at: how many full pages there were when it had none to give; no use asking before there are more.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        block_size: int,
        options: RequestOptions,
        matcher: Matcher,
        max_aliases: int = 0,
        aliases: bool = False,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.options = options
        self.first_generated = -(-num_prompt_tokens // block_size)
        self.retired: list[int] = []
        self.to_retire_again: dict[int, int | None] = {}
        self.band = 0
        self.num_asked = 0
        self.exhausted_at = -1
        self._max_aliases, self._aliases = max_aliases, aliases
        self._pairs = PagePairs(self.first_generated, max_aliases)
        self._block_size = block_size
        self._matcher = matcher
        self._num_seen = 0
        self._surprisal = np.zeros(0, np.float32)  # by page, NaN where unknown
        self._redundancy = np.zeros(0, np.float32)  # the same

    @property
    def num_retired(self) -> int:
        return len(self.retired)

    @property
    def aliased(self) -> Mapping[int, int]:
        """The page that is read in place of each that is not forgotten, by page."""
        return self._pairs.stands_in if self._aliases else {}

    @property
    def forgotten(self) -> list[int]:
        """Retired pages with a null page in their place."""
        aliased = self.aliased
        return [page for page in self.retired if page not in aliased] if aliased else self.retired

    def donors(self, pages: list[int]) -> dict[int, int]:
        """The earlier page nearest to each of those last looked at that go now, in the order in which they go."""
        return {page: donor for page, donor in self._pairs.donors().items() if page in pages}

    def stand_for(self, pages: np.ndarray) -> np.ndarray:
        """How many entries each of these pages stands for, its own included, int64 ``[len(pages)]``."""
        return self._pairs.stand_for(pages)

    def note_retired(self, pages: list[int], donors: Mapping[int, int]) -> None:
        """Pages have gone, each into its donor if it has one."""
        self.retired.extend(pages)
        if self._max_aliases:
            self._pairs.retired(np.array(pages, np.int64), donors)

    def num_full(self, num_computed: int) -> int:
        """Full generated pages once ``num_computed`` tokens are in the cache, retired ones included."""
        return max(0, num_computed // self._block_size - self.first_generated)

    def is_at_floor(self, num_computed: int) -> bool:
        """Whether it gave pages up and may give up no more at present but those that stand again."""
        room = floor_room(self.num_full(num_computed), self.num_retired, self.options.min_kept)
        return self.num_retired > 0 and room == 0

    def see_tokens(self, token_ids: Sequence[int]) -> None:
        """Shows the request's tokens so far, prompt included; only those since the last call are looked at."""
        if len(token_ids) > self._num_seen:
            self._matcher.append(np.asarray(token_ids[self._num_seen :], np.int32))
            self._num_seen = len(token_ids)

    def repeated(self, num_computed: int) -> set[int]:
        """Pages of which every token stands again, later, in what the request keeps. Brings the matcher up to date.

        None where pages are compared with earlier ones: the published choice knows no exact repeats.
        """
        found = set(self._matcher.ready_blocks()).difference(self.retired)
        if self._max_aliases:
            return set()
        gone, size = np.array(self.retired, np.int64), self._block_size
        return {
            page
            for page in found
            if stands_again(self._matcher, page, size, num_computed, lambda tokens: np.isin(tokens // size, gone))
        }

    def retirable_end(self, num_computed: int) -> int:
        """The first page that is protected or not full: pages before it may go."""
        return min(num_computed, max(0, self._matcher.protected_from())) // self._block_size

    def facts(self, pages: np.ndarray, draws: np.random.Generator, limit: int) -> PageFacts:
        """What is known of these pages, by name; NaN where nothing is.

        Args:
          pages: int32 ``[n]``, all that may go.
          draws: the request's own, started anew.
          limit: most pages that go now.
        """
        last = int(pages[-1]) + 1 if len(pages) else 0
        return PageFacts(
            position=pages,
            redundancy=_known(self._redundancy, pages),
            surprisal=_known(self._surprisal, pages),
            draw=draws.random(last, np.float32)[pages],
            distance=self._pairs.measure(pages, limit) if self._max_aliases else None,
        )

    def take(self, report: PageReport) -> None:
        """Takes what a worker knows of pages ``0 .. n - 1``: redundancy of all anew, the rest of some of them."""
        if report.redundancy is not None:
            self._redundancy = report.redundancy
        if report.surprisal is not None:
            before = _known(self._surprisal, np.arange(max(len(self._surprisal), len(report.surprisal))))
            told = _known(report.surprisal, np.arange(len(before)))
            self._surprisal = np.where(np.isnan(told), before, told)
        if report.distances is not None:
            self._pairs.learn(*report.distances)

    def lose_blocks(self) -> None:
        """The request was preempted: its blocks are gone, and what it had given up goes again when it is back."""
        gone = {page: self._pairs.stands_in.get(page) for page in self.retired}
        self.to_retire_again = dict(sorted({**self.to_retire_again, **gone}.items()))
        self.retired = []
        self._pairs = PagePairs(self.first_generated, self._max_aliases)  # pages are compared anew as well
        self.band = 0
        self.num_asked = 0  # what was asked in this step, nobody answers


def _known(values: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Values of pages, float32 ``[pages]``, NaN behind the end."""
    known = np.full(len(pages), np.nan, np.float32)
    inside = pages < len(values)
    known[inside] = values[pages[inside]]
    return known
