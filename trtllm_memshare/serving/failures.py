"""What happens when something raises: how far an error reaches, and when the executor gives up.

- An error of one request (choosing its token, its listener, being added) ends that request; of a listener any error is,
  `SystemExit` and `CancelledError` among them.
- An error of a step (the runner, reading logits) ends the requests of that step's batch; the others go on. After
  ``MAX_FAILED_STEPS`` failed steps in a row the executor stops: a GPU that has faulted fails every step.
- A ``UserError`` of a step names settings that the runner cannot serve with: it stops the executor at once.
- Any other error, ``SystemExit`` and ``KeyboardInterrupt`` among them, stops the executor.

Whoever waits for a request is answered in every case.
"""

from __future__ import annotations

import logging

from trtllm_memshare.errors import shorten

MAX_FAILED_STEPS = 3
_log = logging.getLogger(__name__)


class RequestFailedError(RuntimeError):
    """One request ended with an error; ``__cause__`` is what was raised, if anything was."""


class ExecutorStoppedError(RuntimeError):
    """The executor has stopped on an error, so the request cannot end."""


def describe(error: BaseException) -> str:
    """An exception in a line of at most 200 characters, for people who did not raise it."""
    text = str(error).strip().splitlines()
    return shorten(f"{type(error).__name__}: {text[0]}" if text else type(error).__name__)


def request_failed(request_id: int, what: str, cause: BaseException | None = None) -> RequestFailedError:
    """An error for one request's handle."""
    error = RequestFailedError(f"request {request_id} ended: {what}" + (f" ({describe(cause)})" if cause else ""))
    error.__cause__ = cause
    return error


def not_finite(request_id: int, num_tokens: int) -> RequestFailedError:
    """The error of a request whose logits held a NaN, or nothing but infinities."""
    return request_failed(
        request_id, f"the model gave logits that are not finite after {num_tokens} tokens, so there is no next one"
    )


def log_listener(request_id: int, error: BaseException) -> None:
    """Notes what a listener raised when nobody is left to tell."""
    _log.warning("the listener of request %d raised at its end: %s", request_id, describe(error))


class FailedSteps:
    """Counts failed steps.

    Attributes:
      num_failed: all so far.
    """

    def __init__(self) -> None:
        self.num_failed = 0
        self._in_a_row = 0

    def succeeded(self) -> None:
        self._in_a_row = 0

    def failed(self, error: Exception, num_requests: int) -> None:
        """Notes one; raises ``error`` again if it is time to stop."""
        self.num_failed += 1
        self._in_a_row += 1
        _log.error("a step failed and with it its %d requests: %s", num_requests, describe(error))
        if self._in_a_row >= MAX_FAILED_STEPS:
            raise error
