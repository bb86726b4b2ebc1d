"""What a request asks for itself (``py_memshare``, ``py_memshare_min_kept``): the LLM API has no field for it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

log = logging.getLogger("trtllm_memshare")


class Wishes:
    """Reads wishes of the requests of one manager; a wrong one is said, once, and harms nobody.

    Args:
      min_kept: share of its generated pages that a request keeps if it asks for nothing.
    """

    def __init__(self, min_kept: float) -> None:
        self._min_kept, self._said = min_kept, False

    @staticmethod
    def keeps_whole(request: Any) -> bool:
        """Whether a request asks for its cache whole, pages that stand again included."""
        return getattr(request, "py_memshare", True) is False

    def min_kept(self, request: Any) -> float:
        """Share of its generated pages that a request keeps, in [0, 1]; 1 where it asks for its cache whole."""
        if self.keeps_whole(request):
            return 1.0
        own = getattr(request, "py_memshare_min_kept", None)
        if own is None:
            return self._min_kept
        if isinstance(own, int | float | np.floating) and not isinstance(own, bool) and 0 <= own <= 1:  # NaN is not
            return float(own)
        if not self._said:
            self._said = True
            log.warning(
                "py_memshare_min_kept must be a number between 0 and 1, got %r on request %s: min_kept %s holds for "
                "it (correct what sets it; said once)",
                own,
                request.py_request_id,
                self._min_kept,
            )
        return self._min_kept
