"""Where tensor-parallel ranks meet: at the same iterations, whatever has happened to each of them.

Each rank runs its own copy of sharing. They decide together every ``search_interval`` iterations. A rank on which
something failed goes on meeting the others, so that none waits for it for ever: there all stop sharing anything new,
and a request whose row one of them cannot vouch for is ended on all of them in the same iteration, since their
schedulers would drift apart otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

from trtllm_memshare.ranks.agreement import RankAgreement, RankDisagreementError

T = TypeVar("T")


class RankMeetings:
    """Meetings of one rank.

    Args:
      ranks: how values pass between them.
      interval: iterations between two meetings.
    """

    def __init__(self, ranks: RankAgreement, interval: int) -> None:
        self.ranks, self._interval = ranks, interval
        self._last = -1
        self._all_are_off = False

    def is_meeting(self, step: int) -> bool:
        """Whether all ranks exchange something in this iteration."""
        return step % self._interval == 1 % self._interval

    def begin(self, step: int) -> None:
        """Notes that this rank is about to speak in this iteration's meeting."""
        self._last = step

    def choose(self, choose: Callable[[], T]) -> T:
        """The first rank's choice on every rank; to be called right after a decision that went well.

        Raises:
          RankDisagreementError: on every rank, if the first one could not choose.
        """
        value, problem = None, ""
        if self.ranks.rank == 0:
            try:
                value = choose()
            except Exception as error:  # the others wait for an answer, whatever happened here
                problem = f"{type(error).__name__}: {error}"
        value, problem = self.ranks.exchange((value, problem))[0]
        if value is None:
            raise RankDisagreementError(f"rank 0 could not choose: {problem}")
        return value

    def switched_off(
        self, step: int, disagreed: bool, lost: Iterable[int], given_up: Mapping[int, int]
    ) -> set[int] | None:
        """This rank's part of a meeting when it shares nothing new any more.

        Args:
          step: number of this iteration.
          disagreed: this iteration's decision ended with a disagreement, on every rank.
          lost: requests whose rows this rank cannot vouch for.
          given_up: pages that each request of this rank has given up; none of a request that it does not know.

        Returns:
          Requests to end now, on every rank alike; None if this is no meeting, or one that the others hold as usual.
        """
        if not self.is_meeting(step):
            return None
        if not self._all_are_off:
            if self._last != step:
                self._last = step
                with suppress(RankDisagreementError):  # that is what it is for: the others learn of it
                    self.ranks.decide([], None, f"switched off on rank {self.ranks.rank}".encode(), lambda c, s: [])
            elif not disagreed:
                return None  # something failed after a decision that went well: the others learn at the next one
        self._all_are_off = True
        views = self.ranks.exchange((list(lost), dict(given_up)))
        # From what all have said alone, so that all end the same: a rank that failed early knows fewer requests.
        named = {request_id for their_lost, pages in views for request_id in (*their_lost, *pages)}
        lost = {request_id for their_lost, _ in views for request_id in their_lost}
        return {i for i in named if i in lost or len({pages.get(i, 0) for _, pages in views}) > 1}
