"""Calls of a request's listener, and the one thing that it must not do: wait for its own thread.

A listener runs on the thread that takes the steps. One that waits for a request of these steps, its own or another,
would wait for itself, and everybody with it. For a request of an executor with another thread it may wait, if nobody
there waits for this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trtllm_memshare.serving.failures import log_listener

Listener = Callable[[bool], None]
_here = threading.local()


def call_listener(listener: Listener, has_ended: bool) -> None:
    """Tells a listener; what it raises comes out."""
    with listening():
        listener(has_ended)


@contextmanager
def listening() -> Iterator[None]:
    """While code of a caller runs: a listener, or a callback of a future."""
    before = getattr(_here, "listens", False)  # a listener may take the steps of another executor
    _here.listens = True
    try:
        yield
    finally:
        _here.listens = before


def tell_end(request_id: int, listener: Listener | None) -> None:
    """Tells a listener, if there is one, of its request's end; logs what it raises, since nobody is left to tell."""
    if listener is not None:
        try:
            call_listener(listener, True)
        except BaseException as error:
            log_listener(request_id, error)


def check_may_wait(request_id: int, is_there: bool) -> None:
    """Raises RuntimeError if a listener is about to wait for what is not there yet."""
    if not is_there and getattr(_here, "listens", False):
        raise RuntimeError(f"a listener waits for request {request_id}, whose steps its own thread takes (call drain)")
