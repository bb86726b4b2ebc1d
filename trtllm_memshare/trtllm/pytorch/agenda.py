"""Which request is to be looked at in which iteration, so that most iterations look at few."""

from __future__ import annotations


class Agenda:
    """Requests by the iteration for which they are expected next."""

    def __init__(self) -> None:
        self._due: dict[int, int] = {}
        self._expected: dict[int, list[int]] = {}  # by iteration; who was expected anew or forgotten is there still
        self._next = 0

    def expect(self, request_id: int, step: int) -> None:
        """Looks at a request again in iteration ``step``; an earlier expectation is dropped."""
        step = max(step, self._next)
        self._due[request_id] = step
        self._expected.setdefault(step, []).append(request_id)

    def forget(self, request_id: int) -> None:
        self._due.pop(request_id, None)

    def due(self, step: int) -> list[int]:
        """Requests to look at in this iteration; each has to be expected again."""
        found = []
        for when in range(self._next, step + 1):
            for request_id in self._expected.pop(when, ()):
                if self._due.get(request_id) == when:
                    found.append(request_id)
                    del self._due[request_id]
        self._next = step + 1
        return found
