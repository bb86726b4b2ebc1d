"""How much the tokens of a page surprised the model that wrote them: one number a page, from -log p of each token.

``surprisal`` is the sum. ``peak`` is what the few tokens carry that nobody could have guessed: a name, a number.
A statement that stands once has those among words that follow by themselves, so that the sum over its page says little.
"""

from __future__ import annotations

import numpy as np

PEAK_TOKENS = 4
"""Chosen among 1, 2, 4 and 8 on texts that are in no table."""


def summed_surprisal(nats: np.ndarray) -> np.ndarray:
    """Sum over each page's tokens, float32 ``[pages]``; a token that is not known counts as the page's mean.

    Args:
      nats: float32 ``[pages, tokens_per_block]``, -log p of each token; NaN = not known.

    Returns:
      NaN where no token is known.
    """
    known = np.isfinite(nats)
    count = known.sum(1)
    sums = np.where(known, nats, 0).sum(1) * nats.shape[1]
    return np.divide(sums, count, out=np.full(len(nats), np.nan, np.float32), where=count > 0)


def peak_surprisal(nats: np.ndarray) -> np.ndarray:
    """Mean of the ``PEAK_TOKENS`` largest of each page, or of all if it has fewer; as ``summed_surprisal``."""
    count = min(PEAK_TOKENS, nats.shape[1])
    known = np.isfinite(nats)
    largest = np.partition(np.where(known, nats, 0), -count, axis=1)[:, -count:]
    return np.where(known.any(1), largest.mean(1), np.nan).astype(np.float32)


OF_PAGES = {"surprisal": summed_surprisal, "peak": peak_surprisal}
"""By the name of the fact that it makes."""


class PageSurprisal:
    """The same for one request, a token at a time: what a page has so far.

    Args:
      fact: ``surprisal`` or ``peak``.
      tokens_per_block: tokens of a page.

    Attributes:
      values: of each page, in nats; 0 for pages of which no token was added.
    """

    def __init__(self, fact: str, tokens_per_block: int) -> None:
        self.values: list[float] = []
        self._is_peak, self._size = fact == "peak", tokens_per_block
        self._largest: list[float] = []  # of the newest page

    def add(self, position: int, nats: float) -> None:
        """Takes a token by its position in the request; positions ascend."""
        page = position // self._size
        if page >= len(self.values):
            self.values.extend([0.0] * (page + 1 - len(self.values)))
            self._largest = []
        if not self._is_peak:
            self.values[page] += nats
            return
        largest, count = self._largest, min(PEAK_TOKENS, self._size)
        if len(largest) < count:
            largest.append(nats)
        elif nats > (least := min(largest)):
            largest[largest.index(least)] = nats
        self.values[page] = sum(largest) / count
