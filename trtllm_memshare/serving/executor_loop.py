"""The executor's thread: takes submissions, runs steps, and leaves nobody waiting when it ends."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from typing_extensions import Self

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.failures import ExecutorStoppedError, describe
from trtllm_memshare.serving.request import RequestResult, RequestState
from trtllm_memshare.serving.scheduler import Scheduler
from trtllm_memshare.serving.validation import QueueFullError

MAX_QUEUE_SIZE = 100_000  # requests; each waits with a few kilobytes
_ABORT_S = 1.0
MAX_STEP_S = 600.0  # a step that lasts longer never ends: a device that hangs, a rank that has gone


@contextlib.contextmanager
def uncollected(num_results: int) -> Iterator[None]:
    """No garbage collection while very many results are made: it would walk all that wait, several times over."""
    pauses = num_results > 1000 and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()


class ExecutorLoop(ABC):
    """What an ``Executor`` is made of beside its steps.

    Args:
      scheduler: of the executor.
      max_queue_size: most requests that wait at once.

    Attributes:
      has_failed: a step raised what no request or batch could be blamed for, or never ended; no step follows.
      max_step_s: leaving the context waits no longer than this for one step.
    """

    max_step_s = MAX_STEP_S
    max_idle_s: float | None = None
    """Longest wait of the thread without a step; None = for ever."""

    def __init__(self, scheduler: Scheduler, max_queue_size: int) -> None:
        self._scheduler, self._max_queue_size = scheduler, max_queue_size
        self.has_failed = False
        self._lock = threading.Condition()
        self._submitted: deque[RequestState] = deque()
        self._unanswered: dict[int, RequestState] = {}  # wherever they are: between two lists a request is in none
        self._thread: threading.Thread | None = None
        self._stopping = self._aborting = self._has_cancelled = False
        self._step_since: float | None = None  # time.monotonic, while the thread is in a step

    @abstractmethod
    def step(self) -> None:
        """One iteration."""

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or in flight."""
        return bool(self._submitted or self._scheduler.waiting or self._scheduler.running)

    @property
    def is_stuck(self) -> bool:
        """Whether the thread's step has gone on for longer than ``max_step_s``; safe from any thread."""
        return self.step_seconds > self.max_step_s

    @property
    def step_seconds(self) -> float:
        """How long the thread has been in its step, 0 between two; safe from any thread."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_alive(self) -> bool:
        """Whether requests can still end: what a health probe asks; safe from any thread."""
        return not (self.has_failed or self.is_stuck)

    def run_until_idle(self) -> None:
        """Steps until every request has ended."""
        try:
            while self.has_work:
                self.step()
        except BaseException as error:
            self._fail_all(error)
            raise

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop, name="memshare-executor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error_type: object = None, *_: object) -> None:
        """Lets requests in flight end, then stops the thread.

        When the body raised, Ctrl-C included, they are cancelled instead: each ends with the tokens it has, or, where a
        step goes on for longer than a second, with an ExecutorStoppedError.

        Raises:
          ExecutorStoppedError: a step did not end within ``max_step_s``; whoever waits gets the same error.
        """
        with self._lock:
            self._stopping = True
            self._aborting = error_type is not None
            self._lock.notify()
        if self._thread is None:
            return
        if self._aborting:
            self._stop_soon(self._thread)
            return
        try:
            while self._thread.is_alive() and not self.is_stuck:
                self._thread.join(timeout=min(1.0, self.max_step_s))
        except BaseException:  # Ctrl-C while the last requests end
            self._aborting = True
            self._stop_soon(self._thread)
            raise
        if self._thread.is_alive():
            stuck = TimeoutError(f"a step has not ended for {self.max_step_s:g} s")
            self._fail_all(stuck)
            raise ExecutorStoppedError(f"the executor stopped: {describe(stuck)}")

    def _stop_soon(self, thread: threading.Thread) -> None:
        """Waits a second for what is cancelled; whoever still waits then is answered without the step."""
        thread.join(timeout=_ABORT_S)
        if thread.is_alive():
            self._fail_all(TimeoutError(f"it was left, and its step did not end within {_ABORT_S:g} s"))

    def _queue(self, state: RequestState) -> None:
        with self._lock:
            if self.has_failed:
                raise UserError("the executor has stopped on an error, got a new request (see its log, start it again)")
            if self._stopping:
                raise UserError("the executor is shutting down, got a new request (submit before leaving its context)")
            waiting = len(self._submitted) + len(self._scheduler.waiting)
            if waiting >= self._max_queue_size:
                raise QueueFullError(f"the queue is full: {waiting} requests wait, the limit (submit this one later)")
            self._unanswered[state.request_id] = state
            self._submitted.append(state)
            self._lock.notify()

    def _answer(self, state: RequestState, result: RequestResult | None, error: BaseException | None = None) -> bool:
        """Ends a request for its caller; whether it ended with an error."""
        self._unanswered.pop(state.request_id, None)
        return state.handle.finish(result, error)

    def _loop(self) -> None:
        try:
            while True:
                with self._lock:
                    while not self.has_work and not self._stopping and self._lock.wait(self.max_idle_s):
                        pass
                if self.has_failed or (self._stopping and not self.has_work):
                    return  # it has failed if nobody waits for its step any more
                if self._aborting:
                    self._cancel_all()
                self._step_since = time.monotonic()
                self.step()
                self._step_since = None
        except BaseException as error:
            self._fail_all(error)
            raise

    def _cancel_all(self) -> None:
        with self._lock:
            states = [*self._submitted, *self._scheduler.waiting, *self._scheduler.running]
        for state in states:
            state.handle.cancel()

    def _fail_all(self, error: BaseException) -> None:
        """An executor that stopped owes every caller an answer."""
        with self._lock:
            self.has_failed = self._stopping = True
            states = list(self._unanswered.values())
        for state in states:
            self._answer(state, None, ExecutorStoppedError(f"the executor stopped: {describe(error)}"))

    def _note_cancelled(self) -> None:
        """Some request has been cancelled: the next step looks for it. Any thread may say so."""
        self._has_cancelled = True

    def _steps_elsewhere(self) -> bool:
        """Whether another thread than the caller's takes the steps; after a failure the caller's may be who answers."""
        return self._thread not in (None, threading.current_thread()) and not self.has_failed

    def _looks_for_cancelled(self) -> bool:
        if not self._has_cancelled:
            return False
        self._has_cancelled = False  # only after True was read: one that comes in between is not forgotten
        return True

    def _take_submissions(self) -> None:
        with self._lock:
            while self._submitted:
                self._scheduler.add(self._submitted.popleft())

    def _is_cancelled(self, state: RequestState) -> bool:
        return state.handle.cancelled
