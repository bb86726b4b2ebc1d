"""Which request is to be looked at in which iteration, so that most iterations look at few."""

from __future__ import annotations

import heapq


class Agenda:
    """Requests by the iteration for which they are expected next."""

    def __init__(self) -> None:
        self._due: dict[int, int] = {}
        self._queue: list[tuple[int, int]] = []

    def expect(self, request_id: int, step: int) -> None:
        """Looks at a request again in iteration ``step``; an earlier expectation is dropped."""
        self._due[request_id] = step
        heapq.heappush(self._queue, (step, request_id))

    def forget(self, request_id: int) -> None:
        self._due.pop(request_id, None)

    def due(self, step: int) -> list[int]:
        """Requests to look at in this iteration; each has to be expected again."""
        found = []
        while self._queue and self._queue[0][0] <= step:
            when, request_id = heapq.heappop(self._queue)
            if self._due.get(request_id) == when:
                found.append(request_id)
                del self._due[request_id]
        return found
