"""A file that stops new sharing while the server runs, for as long as it exists."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("trtllm_memshare")

_LOOK_EVERY = 16  # iterations: a look costs microseconds


class KillSwitch:
    """Looks for the file now and then.

    Args:
      path: of the file; None = there is no switch.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_off, self._next_look = False, 0

    def is_off(self, step: int) -> bool:
        """Whether new sharing is stopped, as of the last look; ``step``: number of this iteration."""
        if self._path is not None and step >= self._next_look:
            self._next_look = step + _LOOK_EVERY
            was_off, self._is_off = self._is_off, self._path.exists()
            if self._is_off != was_off:
                state = "shares nothing new" if self._is_off else "shares again"
                log.warning("MemShare %s: %s %s", state, self._path, "exists" if self._is_off else "is gone")
        return self._is_off
