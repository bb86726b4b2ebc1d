"""What becomes of errors of ours while TensorRT-LLM serves: new sharing stops, serving goes on.

TensorRT-LLM's executor loop ends with whatever ``prepare_resources`` raises, and fails every active request for what
the forward pass raises. So nothing that goes wrong here leaves this project's code: it is logged once, with what to
report, counted, and nothing new is shared from then on. What is shared already stays so: its rows are still rearranged,
since a request whose row is not would read another's pages. A request whose row cannot be vouched for is ended alone,
by the calls with which TensorRT-LLM ends a cancelled one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.relief_faults import place_of

log = logging.getLogger("trtllm_memshare")


class Complaints:
    """What becomes of something that sharing excludes: the start-up stops, or each thing is said once."""

    def __init__(self, on_unsupported: str) -> None:
        self._stops = on_unsupported == "stop"
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        """At start-up: raises UserError, or logs and returns: requests then run unshared."""
        if self._stops:
            raise UserError(message)
        self.say(message)

    def say(self, message: str) -> None:
        """While serving, when nothing may be raised any more."""
        if message not in self._said:
            self._said.add(message)
            log.warning("MemShare is off, requests run unshared: %s", message)


class Failures:
    """Errors so far.

    Attributes:
      is_off: nothing new is shared.
      num_errors: how many were caught. ``num_failed_requests``: requests that were ended for it.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self.is_off = False
        self.num_errors = self.num_failed_requests = 0

    def stop(self, where: str, error: BaseException) -> None:
        """Counts an error of ours and stops new sharing; the first is logged with what to report."""
        self.num_errors += 1
        if not self.is_off:
            self.is_off = True
            log.error(
                "MemShare shares nothing new from now on, TensorRT-LLM serves on: %s failed: %s: %s. Please report "
                "this line with: %s, at %s",
                where,
                type(error).__name__,
                error,
                self._description,
                place_of(error),
            )

    def end_requests(self, requests: Iterable[Any], why: str) -> None:
        """Ends requests as TensorRT-LLM ends a cancelled one; the loop answers and frees them itself."""
        for request in requests:
            reason = finish_reason("CANCELLED")
            log.error(
                "request %s is ended alone, its block table cannot be vouched for: %s", request.py_request_id, why
            )
            request.finish_by_reason(reason)
            request.decoding_iter = request.py_decoding_iter
            self.num_failed_requests += 1


def finish_reason(name: str) -> Any:
    """A member of TensorRT-LLM's ``FinishReason``, which moved between modules."""
    try:
        from tensorrt_llm.bindings.executor import FinishReason
    except ImportError:
        from tensorrt_llm._torch.pyexecutor.llm_request import FinishReason
    return getattr(FinishReason, name)
