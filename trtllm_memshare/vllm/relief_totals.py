"""What relief has done so far, and how many entries of block tables are retired now; the metrics show it."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_memshare.vllm.pages import RequestPages


@dataclass
class ReliefTotals:
    """Counts since the start, except what ends in ``entries``: table entries that point there now.

    Attributes:
      retired_aliased: of those retired, the ones that an earlier page was read in place of.
      pauses_avoided: times that running requests needed blocks which were not free, and got them without a preemption.
      null_entries: at a null page.
      aliased_entries: at an earlier page of their request, which is read once more in their place.
    """

    retired: int = 0
    retired_repeats: int = 0
    retired_aliased: int = 0
    retired_again: int = 0
    band_moves: int = 0
    pauses_avoided: int = 0
    null_entries: int = 0
    aliased_entries: int = 0

    @property
    def retired_now(self) -> int:
        """Blocks that requests do without now."""
        return self.null_entries + self.aliased_entries

    def add_entries(self, pages: RequestPages) -> None:
        """A request's retired entries are there now."""
        self.null_entries += len(pages.forgotten)
        self.aliased_entries += len(pages.aliased)

    def drop_entries(self, pages: RequestPages) -> None:
        """They are no more, or change and are added anew."""
        self.null_entries -= len(pages.forgotten)
        self.aliased_entries -= len(pages.aliased)
