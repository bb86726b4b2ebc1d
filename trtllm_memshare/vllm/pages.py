"""What pressure knows about one request's pages: which are full, generated, recent, repeated, retired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm_memshare.search.need import PageFacts
from trtllm_memshare.search.types import Matcher
from trtllm_memshare.vllm.page_report import PageReport
from trtllm_memshare.vllm.request_options import RequestOptions


class RequestPages:
    """Pages of one running request. A page is a logical block; lengths in tokens.

    Attributes:
      first_generated: the first page without a prompt token.
      retired: logical blocks that were given up, in order of retirement.
      to_retire_again: those that were given up before the request was preempted.
      band: index of the null page that retired entries point at.
      num_asked: pages before this one were asked about, or need not be.
      exhausted_at: how many full pages there were when it had none to give; no use asking before there are more.
    """

    def __init__(self, num_prompt_tokens: int, block_size: int, options: RequestOptions, matcher: Matcher) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.options = options
        self.first_generated = -(-num_prompt_tokens // block_size)
        self.retired: list[int] = []
        self.to_retire_again: list[int] = []
        self.band = 0
        self.num_asked = 0
        self.exhausted_at = -1
        self._block_size = block_size
        self._matcher = matcher
        self._num_seen = 0
        self._surprisal = np.zeros(0, np.float32)  # by page, NaN where unknown
        self._redundancy = np.zeros(0, np.float32)  # the same

    @property
    def num_retired(self) -> int:
        return len(self.retired)

    def num_full(self, num_computed: int) -> int:
        """Full generated pages once ``num_computed`` tokens are in the cache, retired ones included."""
        return max(0, num_computed // self._block_size - self.first_generated)

    def see_tokens(self, token_ids: Sequence[int]) -> None:
        """Shows the request's tokens so far, prompt included; only those since the last call are looked at."""
        if len(token_ids) > self._num_seen:
            self._matcher.append(np.asarray(token_ids[self._num_seen :], np.int32))
            self._num_seen = len(token_ids)

    def repeated(self) -> set[int]:
        """Pages of which every token stands again in a later run of the request. Brings the matcher up to date."""
        return set(self._matcher.ready_blocks())

    def retirable_end(self, num_computed: int) -> int:
        """The first page that is protected or not full: pages before it may go."""
        return min(num_computed, max(0, self._matcher.protected_from())) // self._block_size

    def facts(self, pages: np.ndarray, draws: np.random.Generator) -> PageFacts:
        """What is known of these pages, by name; NaN where nothing is. ``draws``: the request's own, started anew."""
        last = int(pages[-1]) + 1 if len(pages) else 0
        return PageFacts(
            position=pages,
            redundancy=_known(self._redundancy, pages),
            surprisal=_known(self._surprisal, pages),
            draw=draws.random(last, np.float32)[pages],
        )

    def take(self, report: PageReport) -> None:
        """Takes what a worker knows of pages ``0 .. n - 1``: redundancy of all anew, surprisal of some of them."""
        if report.redundancy is not None:
            self._redundancy = report.redundancy
        if report.surprisal is not None:
            before = _known(self._surprisal, np.arange(max(len(self._surprisal), len(report.surprisal))))
            told = _known(report.surprisal, np.arange(len(before)))
            self._surprisal = np.where(np.isnan(told), before, told)

    def lose_blocks(self) -> None:
        """The request was preempted: its blocks are gone, and what it had given up goes again when it is back."""
        self.to_retire_again = sorted({*self.retired, *self.to_retire_again})
        self.retired = []
        self.band = 0
        self.num_asked = 0  # what was asked in this step, nobody answers


def _known(values: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Values of pages, float32 ``[pages]``, NaN behind the end."""
    known = np.full(len(pages), np.nan, np.float32)
    inside = pages < len(values)
    known[inside] = values[pages[inside]]
    return known
