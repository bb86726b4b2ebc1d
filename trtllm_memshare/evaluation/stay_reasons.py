"""Why pages of a text stay in memory: the last word of stage 1, stage 2 and the cache on each of them."""

from __future__ import annotations

from collections import Counter

from trtllm_memshare.cache.remap import WORTH_ANOTHER_LOOK
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.serving.executor import Executor

RECENT, NO_COPY, WAITS = "recent", "no copy", "waits"
"""Protected; not every token has a later copy; decided at one of the next searches.

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
        manager = executor.manager
        givable = manager.givable_pages(request_id)
        repeated = dict(zip(givable.pages.tolist(), givable.repeated.tolist(), strict=True))
        first, full, _ = manager.generated_pages(request_id)
        for page in range(first, full):
            if not manager.is_retired(request_id, page):
                self.reasons[page] = self._reason(page, repeated)

    def count(self, first: int, stop: int) -> dict[str, int]:
        """How many of the pages in ``[first, stop)`` stay, by reason, the most frequent first."""
        return dict(Counter(r for page, r in sorted(self.reasons.items()) if first <= page < stop).most_common())

    def _reason(self, page: int, repeated: dict[int, bool]) -> str:
        if page not in repeated:
            return RECENT
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
