"""Leaving the executor and reading a stream: no wait without an end."""

from __future__ import annotations

import threading
import time

import pytest
from fakes.counting_runner import CountingRunner, expected
from serving.counting_executor import WAIT, assert_clean, make

from trtllm_memshare.serving.failures import ExecutorStoppedError, RequestFailedError
from trtllm_memshare.serving.request import SamplingParams


def test_ctrl_c_leaves_within_a_second_and_answers_the_requests(boundaries):
    runner = CountingRunner(num_blocks=4000)
    runner.before_step = lambda batch: time.sleep(0.01)
    executor = make(boundaries, runner, max_batch_size=8)
    handles, started = [], []

    def serve() -> None:
        with executor:
            handles.extend(executor.submit([5 + i % 50], SamplingParams(390)) for i in range(500))
            while executor.stats.num_steps < 3:
                time.sleep(0.001)
            started.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve()
    assert time.monotonic() - started[0] < 5  # a second by itself, 240 s to the end; the machine may be busy
    assert {h.result(0).finish_reason for h in handles} == {"cancelled"}
    assert_clean(executor)


def test_leaving_in_peace_lets_requests_end(boundaries):
    with make(boundaries) as executor:
        handle = executor.submit([5], SamplingParams(30))
    assert handle.result(0).finish_reason == "length"


def test_leaving_does_not_wait_for_a_step_that_never_ends(boundaries):
    runner, hangs = CountingRunner(), threading.Event()
    runner.before_step = lambda batch: hangs.wait(WAIT)
    executor = make(boundaries, runner)
    executor.max_step_s = 0.05
    with pytest.raises(ExecutorStoppedError, match=r"a step has not ended for 0\.05 s"), executor:
        handle = executor.submit([5], SamplingParams(30))
    assert executor.is_stuck
    with pytest.raises(ExecutorStoppedError, match="has not ended"):
        handle.result(0)
    assert executor.has_failed
    hangs.set()


def test_steps_that_end_are_waited_for_however_many_they_are(boundaries):
    runner = CountingRunner()
    runner.before_step = lambda batch: time.sleep(0.02)
    executor = make(boundaries, runner)
    executor.max_step_s = 0.3
    with executor:
        handle = executor.submit([5], SamplingParams(30))
    assert handle.result(0).finish_reason == "length"


def test_a_stream_waits_no_longer_than_its_caller_wants(boundaries):
    executor = make(boundaries)
    handle = executor.submit([5], SamplingParams(3))
    with pytest.raises(TimeoutError, match=rf"request {handle.request_id} had no token for 0\.01 s"):
        next(handle.stream(0.01))
    executor.run_until_idle()
    assert list(handle.stream(0.01)) == expected([5], 3)


def test_nothing_comes_after_the_end_however_late_a_step_is(boundaries):
    runner, hangs, calls = CountingRunner(), threading.Event(), []
    runner.before_step = lambda batch: hangs.wait(WAIT)
    executor = make(boundaries, runner)
    executor.max_step_s = 0.05
    with pytest.raises(ExecutorStoppedError), executor:
        handle = executor.submit([5], SamplingParams(30), listener=calls.append)
    thread = executor._thread
    hangs.set()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert handle.drain() == ([], True)
    assert calls == [True]


def test_ctrl_c_does_not_wait_for_a_step_that_hangs(boundaries):
    runner, has_begun, hangs = CountingRunner(), threading.Event(), threading.Event()
    runner.before_step = lambda batch: (has_begun.set(), hangs.wait(WAIT))
    executor, handles = make(boundaries, runner), []

    def serve() -> None:
        with executor:
            handles.append(executor.submit([5], SamplingParams(30)))
            has_begun.wait(WAIT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve()
    with pytest.raises(ExecutorStoppedError, match="it was left, and its step did not end within 1 s"):
        handles[0].result(0)
    hangs.set()


def test_a_stream_is_read_twice(boundaries):
    executor = make(boundaries)
    handle = executor.submit([5], SamplingParams(3))
    executor.run_until_idle()
    assert list(handle) == expected([5], 3)
    assert list(handle.stream(0.01)) == []
    assert handle.drain() == ([], True)
    assert handle.drain() == ([], True)


@pytest.mark.parametrize("wait", [lambda handle: handle.result(), lambda handle: list(handle.stream())])
@pytest.mark.parametrize("whose", [0, 1])
def test_a_listener_that_waits_for_a_request_ends_its_own_alone(boundaries, wait, whose):
    """It runs on the thread that takes the steps: it would wait for itself, and everybody with it."""
    executor, handles = make(boundaries), []
    handles.append(executor.submit([5], SamplingParams(30)))
    handles.append(executor.submit([20], SamplingParams(30), listener=lambda has_ended: wait(handles[whose])))
    executor.run_until_idle()
    assert handles[0].result(0).token_ids == expected([5], 30)
    with pytest.raises(
        RequestFailedError, match=rf"its listener raised .RuntimeError: a listener waits for request {whose}"
    ):
        handles[1].result(0)
    assert_clean(executor)


@pytest.mark.parametrize("wait", [lambda handle: handle.result(WAIT), lambda handle: list(handle.stream(WAIT))])
def test_a_listener_may_wait_for_an_executor_with_a_thread_of_its_own(boundaries, wait):
    executor, found = make(boundaries), []
    runner, may_step = CountingRunner(), threading.Event()
    runner.before_step = lambda batch: may_step.wait(WAIT)
    with make(boundaries, runner) as other:
        awaited = other.submit([5], SamplingParams(4))

        def listener(has_ended: bool) -> None:
            if has_ended:
                threading.Timer(0.05, may_step.set).start()  # by then it waits
                found.append(wait(awaited))

        executor.submit([20], SamplingParams(2), listener=listener)
        executor.run_until_idle()
    assert found in ([awaited.result(0)], [expected([5], 4)])


def test_a_listener_may_not_wait_for_an_executor_that_its_thread_steps_too(boundaries):
    executor, other = make(boundaries), make(boundaries)
    awaited = other.submit([5], SamplingParams(4))
    handle = executor.submit([20], SamplingParams(2), listener=lambda has_ended: awaited.result(WAIT))
    executor.run_until_idle()
    with pytest.raises(RequestFailedError, match="RuntimeError: a listener waits for request 0"):
        handle.result(0)


def test_a_listener_may_not_wait_for_what_its_thread_answers_after_it(boundaries):
    """The executor's own thread hangs, and who leaves answers one request after the other."""
    runner, hangs, raised, handles = CountingRunner(), threading.Event(), [], []
    runner.before_step = lambda batch: hangs.wait(WAIT)
    executor = make(boundaries, runner)
    executor.max_step_s = 0.05

    def listener(has_ended: bool) -> None:
        try:
            handles[1].result(WAIT)
        except BaseException as error:
            raised.append(error)

    handles.append(executor.submit([5], SamplingParams(30), listener=listener))
    handles.append(executor.submit([20], SamplingParams(30)))
    with pytest.raises(ExecutorStoppedError), executor:
        pass
    hangs.set()
    assert "a listener waits for request 1" in str(raised[0])


def test_a_callback_of_a_future_may_not_wait_either(boundaries):
    executor, raised = make(boundaries), []
    awaited = executor.submit([5], SamplingParams(30))

    def callback(future) -> None:
        try:
            awaited.result(WAIT)
        except BaseException as error:
            raised.append(error)

    executor.submit([20], SamplingParams(2)).future.add_done_callback(callback)
    executor.run_until_idle()
    assert "a listener waits for request 0" in str(raised[0])
    assert awaited.result(0).token_ids == expected([5], 30)


def test_a_listener_that_takes_the_steps_of_another_executor_may_not_wait_afterwards(boundaries):
    executor, other = make(boundaries), make(boundaries)
    awaited = executor.submit([5], SamplingParams(30))

    def listener(has_ended: bool) -> None:
        other.submit([7], SamplingParams(2), listener=lambda has_ended: None)
        other.run_until_idle()
        awaited.result(WAIT)

    handle = executor.submit([20], SamplingParams(2), listener=listener)
    executor.run_until_idle()
    with pytest.raises(RequestFailedError, match="RuntimeError: a listener waits for request 0"):
        handle.result(0)


def test_a_listener_may_read_what_is_there(boundaries):
    executor, found = make(boundaries), []

    def listener(has_ended: bool) -> None:
        if has_ended:
            found.append((handle.result().token_ids, list(handle.stream())))

    handle = executor.submit([5], SamplingParams(4), listener=listener)
    executor.run_until_idle()
    assert found == [(expected([5], 4), expected([5], 4))]
