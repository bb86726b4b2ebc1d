"""Pauses: those that TensorRT-LLM made, and those that pages given up have spared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_ENDING = ("GENERATION_TO_COMPLETE", "GENERATION_COMPLETE")


class Pauses:
    """Counts requests of one manager that generated and had to wait for memory.

    V1 frees a request that it pauses, and computes it anew later. V2 suspends one: it is missing from an iteration, and
    its pages are not held on the device. V2 may also suspend one whose last token is on its way: it is answered in the
    same iteration, has waited for nothing, and is not counted.

    Args:
      is_suspended: of a request id; see ``CacheBackend``.

    Attributes:
      num: pauses so far.
    """

    def __init__(self, is_suspended: Callable[[int], bool]) -> None:
        self._is_suspended = is_suspended
        self._running: dict[int, Any] = {}
        self._active: Mapping[int, Any] = {}
        self.num = 0

    def look(self, active: Mapping[int, Any]) -> None:
        """Notes who generates, by id; who did before and is suspended now has been paused.

        The same object as before means that they are the same.
        """
        if active is self._active:
            return
        self._active = active
        for request_id in self._running.keys() - active.keys():
            if self._is_suspended(request_id):
                request = self._running.pop(request_id)
                self.num += getattr(request.state, "name", "") not in _ENDING
        self._running.update(active)

    def freed(self, request_id: int, has_ended: bool) -> None:
        """A request's resources are freed: it has ended, or it is paused."""
        self.num += request_id in self._running and not has_ended
        self._running.pop(request_id, None)
        self._active = {}


class AvoidedPauses:
    """Counts requests that TensorRT-LLM alone would have paused, had nobody given pages up: the youngest, as it does.

    A request counts once until all would fit again, so this is a lower bound: TensorRT-LLM alone would also have let
    some come back and paused them anew.

    Attributes:
      num: requests so far.
    """

    def __init__(self) -> None:
        self._spared: set[int] = set()
        self.num = 0

    def look(self, num_missing: int, pages: Mapping[int, int]) -> None:
        """Looks at one iteration.

        Args:
          num_missing: pages beyond the pool's that the requests would hold now; not positive where all would fit.
          pages: of each request that runs, those given up included, oldest first.
        """
        if num_missing <= 0:
            self._spared.clear()
            return
        self._spared &= pages.keys()
        gained = sum(pages[request_id] for request_id in self._spared)
        for request_id in reversed(pages):
            if gained >= num_missing:
                break
            if request_id not in self._spared:
                self._spared.add(request_id)
                self.num += 1
                gained += pages[request_id]
