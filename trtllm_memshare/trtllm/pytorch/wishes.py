"""What a request asks for itself (``py_memshare``, ``py_memshare_min_kept``): the LLM API has no field for it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from trtllm_memshare.errors import quote

log = logging.getLogger("trtllm_memshare")


class Wishes:
    """Reads wishes of the requests of one manager; a wrong one is said, once, and harms nobody.

    Args:
      min_kept: share of its generated pages that a request keeps if it asks for nothing.
    """

    def __init__(self, min_kept: float) -> None:
        self._min_kept = min_kept
        self._said: set[str] = set()

    def keeps_whole(self, request: Any) -> bool:
        """Whether a request asks for its cache whole, pages that stand again included.

        So does one whose wish means nothing: what is given up does not come back.
        """
        own = getattr(request, "py_memshare", None)
        if own is None:
            return False
        if isinstance(own, bool | int | np.bool_ | np.integer) and own in (0, 1):
            return not own
        self._say("py_memshare", "True, False, 1 or 0", own, request, "its cache stays whole")
        return True

    def min_kept(self, request: Any) -> float:
        """Share of its generated pages that a request keeps, in [0, 1]; 1 where it asks for its cache whole."""
        if self.keeps_whole(request):
            return 1.0
        own = getattr(request, "py_memshare_min_kept", None)
        if own is None:
            return self._min_kept
        if isinstance(own, int | float | np.floating) and not isinstance(own, bool) and 0 <= own <= 1:  # NaN is not
            return float(own)
        self._say(
            "py_memshare_min_kept", "a number between 0 and 1", own, request, f"min_kept {self._min_kept} holds for it"
        )
        return self._min_kept

    def _say(self, name: str, expected: str, got: object, request: Any, instead: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.warning(
                "%s must be %s, got %s on request %s: %s (correct what sets it; said once)",
                name,
                expected,
                quote(got),
                request.py_request_id,
                instead,
            )
