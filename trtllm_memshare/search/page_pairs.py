"""What one request's generated pages are to one another, in the published method: distances, pairs, and who stands in.

A page goes into the nearest earlier page that is there, and what it stands for goes with it. Kept by the count and not
read off a block table, so that the choice is the same where pages are forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtllm_memshare.search.nearest_page import pair_with_earlier

_FIRST_PAGES = 64


class PagePairs:
    """Pages by their logical index. The first generated one is page ``first``.

    Args:
      first: see above.
      max_aliases: most entries that may point at one page, its own included.

    Attributes:
      first: see above.
      stands_in: the page that is read in place of each that has gone, by page; one without an entry was forgotten.
    """

    def __init__(self, first: int, max_aliases: int) -> None:
        self.first, self._max_aliases = first, max_aliases
        self.stands_in: dict[int, int] = {}
        self._distance = np.full((_FIRST_PAGES, _FIRST_PAGES), np.inf, np.float32)  # inf where nothing was compared
        self._counts = np.ones(_FIRST_PAGES, np.int64)  # what each page stands for; 0 = it has gone
        self._pairs: dict[int, int] = {}

    def there(self, end: int) -> np.ndarray:
        """Pages before ``end`` that have not gone, int64 ``[n]``, ascending."""
        self._grow(end - self.first)
        return np.flatnonzero(self._counts[: end - self.first]) + self.first

    def learn(self, new: np.ndarray, old: np.ndarray, distance: np.ndarray) -> None:
        """Takes distances of pages ``new`` to pages ``old``, float32 ``[len(new), len(old)]``."""
        if len(new):
            self._grow(int(max(new.max(), old.max())) + 1 - self.first)
            self._distance[np.ix_(new - self.first, old - self.first)] = distance

    def measure(self, pages: np.ndarray, limit: int) -> np.ndarray:
        """Distance of pages to those that would be read in their place, float32 ``[len(pages)]``, inf = none.

        Args:
          pages: int ``[n]``, all that may go, so that an earlier page which is there is among them.
          limit: most pages that go now.
        """
        self._grow(int(pages.max(initial=self.first)) + 1 - self.first)
        places = pages - self.first
        distance = self._distance[np.ix_(places, places)]
        found = pair_with_earlier(distance, self._counts[places], self._max_aliases, limit)
        self._pairs = {int(pages[page]): int(pages[other]) for page, other in found}
        nearest = np.full(len(pages), np.inf, np.float32)
        for page, other in found:
            nearest[page] = distance[page, other]
        return nearest

    def stand_for(self, pages: np.ndarray) -> np.ndarray:
        """How many pages each of these stands for, itself included, int64 ``[len(pages)]``; 0 = it has gone."""
        self._grow(int(pages.max(initial=self.first)) + 1 - self.first)
        return self._counts[pages - self.first]

    def donors(self) -> dict[int, int]:
        """The page that would be read in place of each of those last measured, in the order in which they go."""
        return dict(self._pairs)

    def retired(self, pages: np.ndarray, donors: Mapping[int, int]) -> None:
        """Pages have gone.

        Args:
          pages: int ``[n]``.
          donors: as ``donors()`` gives them, others than ``pages`` among them; a page without one is forgotten, and
            what it stands for with it.
        """
        gone = set(pages.tolist())
        self._grow(max(gone, default=self.first) + 1 - self.first)
        for page, donor in donors.items():
            if page in gone:
                self._counts[donor - self.first] += self._counts[page - self.first]
                self.stands_in.update({p: donor for p, d in self.stands_in.items() if d == page})
                self.stands_in[page] = donor
        forgotten = gone - donors.keys()
        self.stands_in = {p: d for p, d in self.stands_in.items() if d not in forgotten}
        self._counts[pages - self.first] = 0

    def _grow(self, num_pages: int) -> None:
        have = len(self._counts)
        if num_pages > have:
            more = max(num_pages, have + have // 4) - have
            self._distance = np.pad(self._distance, (0, more), constant_values=np.inf)
            self._counts = np.pad(self._counts, (0, more), constant_values=1)
