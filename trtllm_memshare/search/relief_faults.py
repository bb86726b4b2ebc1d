"""Errors of pressure itself: caught before anything is given up, so that nobody's request ends with them.

Memory on the host or the device is likeliest to run out just when the pool is short. What is caught here only reads:
which pages could go, what is known of them, who may be let in. It can be done anew, so relief is left out until the
next step and then tried again; meanwhile requests wait and are paused as with the full cache. Carrying a choice out is
not caught: an entry of a block table might name a block by then that is free for somebody else.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from typing_extensions import Self

from trtllm_memshare.errors import shorten
from trtllm_memshare.search.episodes import LOG, log_line


class ReliefFaults:
    """Counts errors, and logs each kind of them once: one that lasts comes with every step.

    Args:
      log: where the lines go.
      are_fatal: with several ranks: one that chose otherwise than the others, or asked for a choice at another point,
        would have them wait for it, so they end together as with any other error of a step.

    Attributes:
      num: how many were caught.
    """

    def __init__(self, log: logging.Logger = LOG, are_fatal: bool = False) -> None:
        self._log, self._are_fatal = log, are_fatal
        self._told: set[tuple[str, str]] = set()
        self.num = 0

    def caught(self) -> Self:
        """Runs what may fail; what the caller assigns in it keeps its value from before if it does."""
        return self

    def __enter__(self) -> None:
        """See ``caught``."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None or self._are_fatal or not isinstance(error, Exception):
            return False
        self._note(error)  # a MemoryError, torch's, or a bug of ours: whatever it is, requests go on
        return True

    def _note(self, error: Exception) -> None:
        self.num += 1
        with suppress(Exception):  # memory may be too short for a line of the log as well
            kind = type(error).__name__, place_of(error)
            if kind not in self._told:
                what = shorten(" ".join(f"{kind[0]}: {error}".split()))
                log_line(self._log, "relief_failed", logging.ERROR, error=what, at=kind[1])
                self._told.add(kind)


def place_of(error: BaseException) -> str:
    """File and line that raised, as ``signatures.py:120``, for a report."""
    frame = error.__traceback__
    if frame is None:
        return "no line"
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_filename.rpartition('/')[2]}:{frame.tb_lineno}"
