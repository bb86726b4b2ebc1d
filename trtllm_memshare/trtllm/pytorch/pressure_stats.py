"""What pressure did so far, on either route: counts, and when it began and ended."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.episodes import Episodes
from trtllm_memshare.search.pressure import PressureView
from trtllm_memshare.trtllm.pytorch.pauses import AvoidedPauses

_LOOK_EVERY = 16  # calls: what would have been paused changes slowly, and a look reads every request


class PressureStats:
    """Totals of one manager.

    Args:
      num_pages: of the pool, those left out that are nobody's.
      low_watermark: share of them.

    Attributes:
      retired_pages: pages given up, by reason: ``repeated`` or ``needed_least``.
      episodes: of pages given up.
      avoided: pauses that pages given up have spared.
    """

    def __init__(self, num_pages: int, low_watermark: float) -> None:
        self._num_pages = num_pages
        self.retired_pages = {"repeated": 0, "needed_least": 0}
        self.episodes, self.avoided = Episodes(num_pages, low_watermark), AvoidedPauses()
        self._calls = 0

    @property
    def num_retired(self) -> int:
        return sum(self.retired_pages.values())

    def look(self, num_used: int, num_steps: int) -> None:
        """Ends the episode if it is over.

        Args:
          num_used: pages in use.
          num_steps: iterations since the last call.
        """
        self.episodes.look(num_used, self.num_retired, num_steps)

    def end(self) -> None:
        """Nobody runs any more, so nothing is short."""
        self.episodes.end(0, self.num_retired)
        self.avoided.look(0, {})

    def count(self, views: list[PressureView], choice: list[tuple[int, np.ndarray]], num_used: int) -> None:
        """Counts pages that go now.

        Args:
          views: of all requests. ``choice``: of those that give pages up, see ``choose_pages``.
          num_used: pages in use before they go.
        """
        if not choice:
            return
        self.episodes.relieved(num_used, len(views), self.num_retired)
        by_id = {view.request_id: view for view in views}
        for request_id, pages in choice:
            view = by_id[request_id]
            repeated = int(view.repeated[np.searchsorted(view.pages, pages)].sum())
            self.retired_pages["repeated"] += repeated
            self.retired_pages["needed_least"] += len(pages) - repeated

    def is_look_due(self) -> bool:
        """Whether ``avoided`` is to look at this iteration; to be asked once in each."""
        self._calls += 1
        return self.num_retired > 0 and self._calls % _LOOK_EVERY == 0

    def look_for_avoided(self, num_needed: int, given_up: list[int], pages: dict[int, int]) -> None:
        """Finds out who would have been paused.

        Args:
          num_needed: pages in use, and about to be taken as far as that is certain.
          given_up: pages that each running request does without.
          pages: see ``AvoidedPauses.look``.
        """
        self.avoided.look(num_needed + sum(given_up) - self._num_pages, pages)
