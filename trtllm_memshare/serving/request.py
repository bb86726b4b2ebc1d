"""Requests: what a caller asks for, what the scheduler keeps, what the caller gets back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum

from trtllm_memshare.cache.sequence import SharingRecord
from trtllm_memshare.serving.failures import log_listener, request_failed
from trtllm_memshare.serving.listening import call_listener, check_may_wait, listening, tell_end


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those off.

    ``stop_sequences``: token sequences that end the request once generated; ``bad_words``: ones never generated.
    ``min_kept``: share of its generated pages, in [0, 1], that this request keeps under pressure; None = as configured.
    Only pages whose text stands again, word for word and later, go below it.
    ``memshare``: False keeps this request's cache whole, whatever the settings.
    ``min_new_tokens``: stop tokens are not chosen before. ``repetition_penalty`` divides the positive logits of tokens
    that have occurred, prompt included, and multiplies their negative ones; ``presence_penalty`` is subtracted from
    them, ``frequency_penalty`` once for each occurrence. ``log_probs``: keep each token's, see ``token_log_probs``.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_kept: float | None = None
    memshare: bool = True
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    log_probs: bool = False

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed."""
        return replace(self, seed=seed)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that have occurred are treated differently."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def shapes_logits(self) -> bool:
        """Whether logits are changed by more than temperature, top-k and top-p."""
        return bool(self.penalizes or self.bad_words or self.min_new_tokens > 0)


@dataclass(frozen=True, slots=True)  # as below: a long queue that is cancelled makes as many at once
class RequestStats:
    """Times in seconds since submission; counts of tokens, pauses and blocks."""

    ttft_s: float
    latency_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_pauses: int
    sharing: SharingRecord
    queue_s: float = 0.0  # until the request first had a place in the batch; all of it if it never had

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.latency_s - self.ttft_s) / max(1, self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class RequestResult:
    """``token_ids``: generated tokens, a stop token included. ``finish_reason``: stop, length or cancelled.

    ``log_probs``: one for each token if they were asked for.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats
    log_probs: tuple[float, ...] = ()


class Phase(Enum):
    """Where a request is; TensorRT-LLM's names where it has one."""

    WAITING = "waiting"
    CONTEXT = "context"
    GENERATION = "generation"


@dataclass(eq=False, slots=True)
class RequestState:
    """Scheduler's view of a request.

    ``tokens``: prompt and generated ids; after a pause all of them are recomputed as context. ``num_computed``: how
    many have K and V in the cache. ``context_length``: how many came as context in this life, known once they have.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    handle: RequestHandle
    group: int | None = None
    phase: Phase = Phase.WAITING
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    context_length: int = 0
    num_pauses: int = 0
    submitted_at: float = field(default_factory=time.perf_counter)
    scheduled_at: float | None = None
    first_token_at: float | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def banned_tokens(self) -> list[int]:
        """Tokens that would complete a bad word, and stop tokens that would come too early."""
        before = len(self.tokens) + 1
        too_early = self.params.stop_token_ids if self.num_generated < self.params.min_new_tokens else ()
        return [*too_early] + [
            w[-1] for w in self.params.bad_words if w and self.tokens[before - len(w) :] == list(w[:-1])
        ]

    @property
    def stops(self) -> bool:
        """Whether the last token ends the request: a stop token, or the end of a stop sequence."""
        if self.tokens[-1] in self.params.stop_token_ids:
            return True
        generated = self.num_generated
        return any(len(s) <= generated and self.tokens[-len(s) :] == list(s) for s in self.params.stop_sequences if s)

    @property
    def max_tokens(self) -> int:
        """Length at which generation ends at the latest."""
        return len(self.prompt) + self.params.max_new_tokens

    def result(self, reason: str, record: SharingRecord, now: float) -> RequestResult:
        """What the caller gets at the end, which is ``now`` in seconds of ``time.perf_counter``."""
        first, scheduled = (now if at is None else at for at in (self.first_token_at, self.scheduled_at))
        stats = RequestStats(
            first - self.submitted_at,
            now - self.submitted_at,
            len(self.prompt),
            self.num_generated,
            self.num_pauses,
            record,
            scheduled - self.submitted_at,
        )
        tokens, log_probs = self.tokens[len(self.prompt) :], tuple(self.handle.log_probs)
        return RequestResult(self.request_id, tokens, reason, stats, log_probs)


class ResultFuture(Future["RequestResult"]):
    """A future whose ``cancel`` asks for the request to be cancelled: it then ends with the tokens so far.

    A plain future would forget the result that the executor is going to set. ``cancel`` answers False, as for any
    future that runs: ``asyncio.wrap_future`` and its timeouts get along with it.
    """

    def __init__(self, cancel_request: Callable[[], None]) -> None:
        super().__init__()
        self._cancel_request = cancel_request
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        if not self.done():
            self._cancel_request()
        return False


class RequestHandle:
    """What ``Executor.submit`` returns: a future, a stream and a way to cancel.

    Iterating yields token ids as they are generated and ends with the request. Who cannot wait takes ``drain`` and a
    listener, which the executor's thread calls after each token with False and at the end with True.
    """

    def __init__(
        self,
        request_id: int,
        listener: Callable[[bool], None] | None = None,
        on_cancel: Callable[[], None] | None = None,
        steps_elsewhere: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request_id, self._listener = request_id, listener
        self._on_cancel, self._steps_elsewhere = on_cancel, steps_elsewhere
        self._listener_error: BaseException | None = None
        self._has_ended = False  # guarded: a step that was given up may come back while its requests are answered
        self._lock = threading.Lock()
        self.future: Future[RequestResult] = ResultFuture(self.cancel)
        self.cancelled = False
        self.log_probs: list[float] = []  # of the tokens so far, if they were asked for; the executor's thread appends
        self._stream: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def result(self, timeout: float | None = None) -> RequestResult:
        """Waits for the end.

        Raises:
          RequestFailedError: this request failed.
          ExecutorStoppedError: the executor stopped on an error.
          TimeoutError: after ``timeout`` seconds; the request goes on.
          RuntimeError: a listener waits for its own thread.
        """
        check_may_wait(self.request_id, self.future.done() or self._steps_elsewhere())
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Asks the executor to end this request at its next step; its blocks are freed then."""
        self.cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def __iter__(self) -> Iterator[int]:
        return self.stream()

    def stream(self, timeout: float | None = None) -> Iterator[int]:
        """Token ids as they are generated.

        Raises:
          TimeoutError: none came within ``timeout`` seconds; the request goes on.
          RequestFailedError, ExecutorStoppedError, RuntimeError: as ``result``.
        """
        while True:
            check_may_wait(self.request_id, not self._stream.empty() or self._steps_elsewhere())
            try:
                token = self._stream.get(timeout=timeout)
            except queue.Empty:
                what = f"request {self.request_id} had no token for {timeout:g} s (wait longer, or cancel it)"
                raise TimeoutError(what) from None
            if token is None:
                self._stream.put(None)  # for whoever else reads it, or reads it again
                break
            yield token
        if self.future.done():
            self.future.result()  # raises if the executor stopped on an error

    def drain(self) -> tuple[list[int], bool]:
        """Tokens that have come since the last time, and whether the request has ended; never waits."""
        tokens: list[int] = []
        while True:
            try:
                token = self._stream.get_nowait()
            except queue.Empty:
                return tokens, False
            if token is None:
                self._stream.put(None)
                return tokens, True
            tokens.append(token)

    def push(self, token: int, log_prob: float | None = None) -> None:
        """Executor's side: one more token; none after the end."""
        with self._lock:
            if self._has_ended:
                return
            if log_prob is not None:
                self.log_probs.append(log_prob)
            self._stream.put(token)
        if self._listener is not None:
            try:
                call_listener(self._listener, False)
            except BaseException as error:  # SystemExit and CancelledError too: its request ends, and no other
                self._listener, self._listener_error = None, error
                self.cancel()

    def finish(self, result: RequestResult | None, error: BaseException | None = None) -> bool:
        """Executor's side: ends stream and future, once; a second end changes nothing.

        Returns:
          Whether it ended just now, and with an error.
        """
        with self._lock:
            if self._has_ended:
                return False
            self._has_ended = True
        if error is None and self._listener_error is not None:
            error = request_failed(self.request_id, "its listener raised", self._listener_error)
        try:
            with listening():
                if error is not None:
                    self.future.set_exception(error)
                else:
                    self.future.set_result(result)  # type: ignore[arg-type]
        except BaseException as raised:  # of a callback, which is the caller's
            log_listener(self.request_id, raised)
        self._stream.put(None)
        tell_end(self.request_id, self._listener)
        return error is not None
