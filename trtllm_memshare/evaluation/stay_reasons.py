"""Why pages of a text stay in memory: the last word of stage 1, stage 2 and the cache on each of them."""

from __future__ import annotations

from collections import Counter

from trtllm_memshare.cache.remap import WORTH_ANOTHER_LOOK
from trtllm_memshare.search.need import find_need
from trtllm_memshare.search.pressure import floor_room
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.serving.executor import Executor

RECENT, NO_COPY, WAITS, FLOOR = "recent", "no copy", "waits", "floor"
"""Protected; not every token has a later copy; decided at one of the next searches; under pressure, the request is at
its floor, below which only exact repeats go, and with the need ``nearest-earlier`` nothing.

The other reasons are those that ``SharingPolicy.rejected`` and the cache's ``refused`` count: ``distance`` (stage 2),
``drift`` (the distances along a chain of stand-ins), ``max_aliases``.
"""


class Inquiry:
    """Hears what is decided on the pages of one request, and asks once about those that are there.

    Args:
      position: of the query that has just been computed when it asks.

    Attributes:
      reasons: of each full page that was resident then, the prompt's left out.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self.reasons: dict[int, str] = {}
        self._verdicts: dict[int, str | None] = {}

    def listen(self, executor: Executor) -> None:
        """Hears of every verdict from now on."""
        executor.sharing.policy.on_verdict = self._judged
        executor.manager.watch_remaps(self._applied, self._refused)

    def ask(self, executor: Executor, request_id: int) -> None:
        """Fills ``reasons``."""
        manager, config = executor.manager, executor.config
        givable = manager.givable_pages(request_id, find_need(config.need).finds_repeats)
        repeated = dict(zip(givable.pages.tolist(), givable.repeated.tolist(), strict=True))
        room = floor_room(givable.num_generated, givable.num_retired, config.min_kept) if config.pressure else 1
        first, full, _ = manager.generated_pages(request_id)
        for page in range(first, full):
            if not manager.is_retired(request_id, page):
                self.reasons[page] = self._reason(page, repeated, at_floor=room == 0)

    def count(self, first: int, stop: int) -> dict[str, int]:
        """How many of the pages in ``[first, stop)`` stay, by reason, the most frequent first."""
        return dict(Counter(r for page, r in sorted(self.reasons.items()) if first <= page < stop).most_common())

    def _reason(self, page: int, repeated: dict[int, bool], at_floor: bool) -> str:
        if page not in repeated:
            return RECENT
        if at_floor and not repeated[page]:
            return FLOOR
        verdict = self._verdicts.get(page)
        if verdict is not None and verdict not in WORTH_ANOTHER_LOOK:
            return verdict
        if page in self._verdicts or repeated[page]:
            return WAITS
        return NO_COPY

    def _judged(self, candidate: Candidate, reason: str | None) -> None:
        self._verdicts[candidate.logical] = reason

    def _applied(self, decision: Decision) -> None:
        self._verdicts.pop(decision.candidate.logical, None)

    def _refused(self, decision: Decision, reason: str) -> None:
        self._verdicts[decision.candidate.logical] = reason
