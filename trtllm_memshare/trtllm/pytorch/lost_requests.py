"""Requests whose rows of the block table cannot be vouched for: what they read until they end, and who ends them when.

On one rank they end in the iteration that found them. Several ranks end them where they meet, all in the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_memshare.trtllm.pytorch.failures import Failures
from trtllm_memshare.trtllm.pytorch.rank_meetings import RankMeetings
from trtllm_memshare.trtllm.pytorch.requests import KnownRequests
from trtllm_memshare.trtllm.pytorch.table_rows import TableRows


class LostRequests:
    """Those of one manager that have not ended yet.

    Args:
      requests: what is known of TensorRT-LLM's.
      rows: of the block table.
      failures: ends requests.
    """

    def __init__(self, requests: KnownRequests, rows: TableRows, failures: Failures) -> None:
        self._requests, self._rows, self._failures = requests, rows, failures
        self._lost: dict[int, Any] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._lost

    def lose(self, request_id: int) -> None:
        """Marks a request whose row cannot be vouched for; until it ends, it reads and writes its own last page."""
        self._lost[request_id] = self._requests[request_id].request
        self._rows.set_own_page(request_id)

    def forget(self, request_id: int) -> None:
        """Lets go of a request whose resources are freed."""
        self._lost.pop(request_id, None)

    def end(self, why: str) -> None:
        """Ends all of them."""
        lost, self._lost = self._lost, {}
        self._failures.end_requests(lost.values(), why)

    def meet(self, meetings: RankMeetings, step: int, disagreed: bool, generation_requests: Sequence[Any]) -> None:
        """This rank's part of a meeting when it shares nothing new any more, see ``RankMeetings.switched_off``."""
        try:
            given_up = {k.request_id: k.pages.num_given_up for k in self._requests}
            ending = meetings.switched_off(step, disagreed, self._lost, given_up)
            if ending is None:
                return
            for request_id in ending:
                if self._requests.get(request_id) is not None:
                    self.lose(request_id)
            # One that this rank failed before it knew it has given nothing up here, and a row as TensorRT-LLM wrote it.
            unknown = [r for r in generation_requests if self._requests.get(r.py_request_id) is None]
            self._lost |= {r.py_request_id: r for r in unknown if r.py_request_id in ending}
            self.end("a rank could not vouch for it")
        except Exception as error:  # TensorRT-LLM's loop would end with it
            self._failures.stop("the exchange between ranks", error)
