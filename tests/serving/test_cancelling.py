"""Cancelling, at any moment and however many: every caller is answered."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from fakes.counting_runner import CountingRunner, expected
from serving.counting_executor import PROMPTS, WAIT, assert_clean, make

from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import ExecutorStoppedError
from trtllm_memshare.serving.request import SamplingParams


def test_cancelling_the_future_cancels_the_request(boundaries):
    executor = make(boundaries)
    handles = [executor.submit(p, SamplingParams(30)) for p in PROMPTS]
    executor.step()
    assert handles[1].future.cancel() is False
    executor.run_until_idle()
    assert handles[1].result(0).finish_reason == "cancelled"
    assert handles[1].result(0).token_ids == expected(PROMPTS[1], 1)
    assert [handles[i].result(0).finish_reason for i in (0, 2)] == ["length"] * 2
    assert handles[1].future.cancel() is False  # too late, and no harm
    assert_clean(executor)


def test_a_timeout_of_asyncio_frees_the_blocks(boundaries):
    runner = CountingRunner()
    runner.before_step = lambda batch: time.sleep(0.005)

    async def wait(handle):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(handle.future), 0.05)

    with make(boundaries, runner) as executor:
        handle = executor.submit([5], SamplingParams(390))
        asyncio.run(wait(handle))
        other = executor.submit([6], SamplingParams(5))
        assert other.result(WAIT).token_ids == expected([6], 5)
        assert handle.result(WAIT).finish_reason == "cancelled"
    assert_clean(executor)


def test_an_error_while_the_cancelled_are_dropped_leaves_nobody_waiting(boundaries, monkeypatch):
    executor = make(boundaries, max_batch_size=1)
    handles = [executor.submit([5], SamplingParams(30)) for _ in range(5)]
    executor.step()
    for handle in handles[1:4]:
        handle.cancel()
    monkeypatch.setattr(executor.manager, "forget_paused", lambda request_id: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executor.run_until_idle()
    for handle in handles:
        with pytest.raises(ExecutorStoppedError, match="ZeroDivisionError"):
            handle.result(0)


def test_a_request_cancelled_before_it_is_taken_from_the_queue_is_found_in_the_next_step(boundaries):
    executor = make(boundaries)
    take = executor._take_submissions

    def submit_and_cancel_then_take_nothing():
        executor._take_submissions = take  # type: ignore[method-assign]
        take()
        handles.append(executor.submit([5], SamplingParams(300)))  # by another thread, just after
        handles[0].cancel()

    handles: list = []
    executor._take_submissions = submit_and_cancel_then_take_nothing  # type: ignore[method-assign]
    for _ in range(3):
        executor.step()
    assert handles[0].result(0).finish_reason == "cancelled"


def test_cancelling_a_long_queue_takes_one_pass(boundaries):
    executor = make(boundaries, max_batch_size=1)
    handles = [executor.submit([5], SamplingParams(300)) for _ in range(20_000)]
    executor.step()
    for handle in handles[1:]:
        handle.cancel()
    looked_at = []
    original = executor._is_cancelled
    executor._is_cancelled = lambda state: looked_at.append(1) or original(state)  # type: ignore[method-assign]
    executor.step()
    executor.step()
    assert len(looked_at) <= 3 * len(handles)
    assert sum(h.future.done() for h in handles) == len(handles) - 1
    assert gc.isenabled()


def test_a_request_cancelled_while_the_queue_is_looked_through_is_answered(boundaries):
    executor = make(boundaries, max_batch_size=1)
    handles = [executor.submit([5], SamplingParams(30)) for _ in range(5)]
    executor.step()
    original = executor._is_cancelled

    def look_then_cancel(state):
        was_cancelled = original(state)
        state.handle.cancel()  # by its caller, from another thread
        return was_cancelled

    executor._is_cancelled = look_then_cancel  # type: ignore[method-assign]
    handles[1].cancel()
    for _ in range(3):
        executor.step()
    assert [h.result(0).finish_reason for h in handles] == ["cancelled"] * 5
    assert_clean(executor)


def test_a_request_cancelled_while_the_executor_asks_whether_any_was_is_answered(boundaries):
    class Raced(Executor):
        flag, cancels = False, None

        @property
        def _has_cancelled(self):
            value, cancels, self.cancels = self.flag, self.cancels, None
            if cancels is not None:
                cancels()  # by its caller, after the flag was read
            return value

        @_has_cancelled.setter
        def _has_cancelled(self, value):
            self.flag = value

    executor = Raced(CountingRunner(), make_config("off"), boundaries, max_seq_len=400)  # type: ignore[arg-type]
    handle = executor.submit([5], SamplingParams(300))
    executor.step()
    executor.cancels = handle.cancel
    executor.step()
    executor.step()
    assert handle.result(0).finish_reason == "cancelled"
    assert_clean(executor)


def test_submit_from_many_threads_while_some_cancel(boundaries):
    results = []

    def client(executor, place):
        handle = executor.submit([5 + place], SamplingParams(40))
        if place % 3 == 0:
            handle.cancel()
        results.append((place, handle.result(WAIT)))

    with make(boundaries) as executor:
        threads = [threading.Thread(target=client, args=(executor, place)) for place in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert len(results) == 30
    for place, result in results:
        assert result.token_ids == expected([5 + place], 40)[: len(result.token_ids)]
        assert result.finish_reason == "length" or place % 3 == 0
    assert_clean(executor)
