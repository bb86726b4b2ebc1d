"""The way back to one client: responses, exactly one end, and whether the client is still there."""

from __future__ import annotations

import threading
from typing import Any


class Reply:
    """Wraps a python-backend response sender.

    Triton frees what a sender points at when the final flag has been sent; asking such a sender whether its client has
    cancelled brings the whole server down (segmentation fault in ResponseFactoryIsCancelled, Triton 2.51). A lock keeps
    the two apart.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      sender: ``request.get_response_sender()``.
    """

    def __init__(self, pb_utils: Any, sender: Any) -> None:
        self._pb, self._sender = pb_utils, sender
        self._lock = threading.Lock()
        self._ended = False

    def send(self, response: Any) -> None:
        """One response of a stream; dropped if the reply has ended."""
        with self._lock:
            if not self._ended:
                self._sender.send(response)

    def end(self, response: Any = None) -> None:
        """The last response, or none, with the final flag. Only the first call counts."""
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if response is None:
                self._sender.send(flags=final)
            else:
                self._sender.send(response, flags=final)

    def fail(self, message: str, code: int | None = None) -> None:
        """Ends with an error. ``code``: of ``pb_utils.TritonError``, None = INVALID_ARG."""
        error = self._pb.TritonError(message, self._pb.TritonError.INVALID_ARG if code is None else code)
        self.end(self._pb.InferenceResponse(error=error))

    def is_cancelled(self) -> bool:
        """Whether the client has gone away; False once the reply has ended."""
        with self._lock:
            return not self._ended and bool(self._sender.is_cancelled())
