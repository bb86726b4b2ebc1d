"""One request's error is one failed request; a step's error is its batch; everybody who waits is answered."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
import torch
from fakes.counting_runner import CountingRunner, expected
from serving.counting_executor import PROMPTS, WAIT, assert_clean, make

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import MAX_FAILED_STEPS, ExecutorStoppedError, RequestFailedError
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.sampling import Sampler
from trtllm_memshare.serving.statistics import MAX_TIMELINE, ExecutorStats
from trtllm_memshare.serving.validation import QueueFullError


def run_with_one_victim(boundaries, executor: Executor, damage, match: str, params=SamplingParams(30)) -> None:
    """``damage`` gets the handle of the request in the middle; it must fail and the others must not notice."""
    handles = [executor.submit(p, params if i == 1 else SamplingParams(30)) for i, p in enumerate(PROMPTS)]
    damage(handles[1])
    executor.run_until_idle()
    for place in (0, 2):
        assert handles[place].result(0).token_ids == expected(PROMPTS[place], 30)
    with pytest.raises(RequestFailedError, match=match):
        handles[1].result(0)
    with pytest.raises(RequestFailedError, match=match):
        list(handles[1])
    assert_clean(executor)
    assert not executor.has_failed
    after = executor.submit([7], SamplingParams(3))
    executor.run_until_idle()
    assert after.result(0).token_ids == [8, 9, 10]


def spoil(value: float, from_token: int):
    """Damages the logits of the request in the middle: its tokens are its lengths plus 19."""

    def change(batch, logits):
        lasts = batch.input_ids[batch.chunk_lengths.cumsum() - 1]
        for row, (last, length) in enumerate(zip(lasts, batch.sequence_lengths, strict=True)):
            if last - length == 19 and length >= 3 + from_token:
                if value == -torch.inf:
                    logits[row] = value
                logits[row, 3] = value

    return change


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("from_token", [0, 5])
def test_logits_that_are_not_finite_end_their_request(boundaries, value, temperature, from_token):
    runner = CountingRunner()
    runner.change_logits = spoil(value, from_token)
    params = SamplingParams(30, temperature=temperature, top_k=1 if temperature else 0)
    run_with_one_victim(boundaries, make(boundaries, runner), lambda handle: None, "logits that are not finite", params)


def test_a_mask_of_minus_infinity_is_no_error(boundaries):
    runner = CountingRunner()
    runner.change_logits = lambda batch, logits: logits[:, :4].fill_(-torch.inf)
    executor = make(boundaries, runner)
    handle = executor.submit([5], SamplingParams(10, temperature=1e-3, log_probs=True))
    executor.run_until_idle()
    assert handle.result(0).token_ids == expected([5], 10)


class RaisingSampler(Sampler):
    """Raises for requests with seed 13, where a bug in one request's parameters would."""

    def _uniform(self, request):
        if request.params.seed == 13:
            raise ArithmeticError("no probability")
        return super()._uniform(request)


def test_an_error_in_choosing_a_token_is_one_request_s(boundaries):
    executor = make(boundaries, sampler=RaisingSampler())
    params = SamplingParams(30, temperature=0.5, seed=13)
    match = r"request 1 ended: its next token could not be chosen \(ArithmeticError: no probability\)"
    run_with_one_victim(boundaries, executor, lambda handle: None, match, params)
    assert executor.status().num_failed == 1


def test_a_listener_that_raises(boundaries):
    executor, calls = make(boundaries), []

    def listener(ended: bool) -> None:
        calls.append(ended)
        if len(calls) >= 3:
            raise ValueError("nobody home")

    handles = [executor.submit(p, SamplingParams(30), listener=listener if i == 1 else None)
               for i, p in enumerate(PROMPTS)]  # fmt: skip
    executor.run_until_idle()
    with pytest.raises(RequestFailedError, match=r"request 1 ended: its listener raised \(ValueError: nobody home\)"):
        handles[1].result(0)
    assert calls == [False] * 3
    assert [handles[i].result(0).token_ids for i in (0, 2)] == [expected(PROMPTS[i], 30) for i in (0, 2)]
    assert_clean(executor)


def test_a_listener_that_raises_at_the_end_harms_nobody(boundaries):
    executor = make(boundaries)

    def listener(ended: bool) -> None:
        if ended:
            raise ValueError("gone")

    handles = [executor.submit(p, SamplingParams(5), listener=listener) for p in PROMPTS]
    executor.run_until_idle()
    assert [h.result(0).token_ids for h in handles] == [expected(p, 5) for p in PROMPTS]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_request_that_cannot_be_added_is_answered_and_leaves_nothing(boundaries, monkeypatch, place):
    executor = make(boundaries)
    add, extend = executor.manager.add_sequence, executor.manager._extend

    def fail(request_id, *arguments):
        if request_id == 1 and place == "before":
            raise MemoryError
        return add(request_id, *arguments)

    def fail_late(sequence, *arguments):
        if sequence.request_id == 1 and place == "after":
            extend(sequence, *arguments)
            raise MemoryError
        return extend(sequence, *arguments)

    monkeypatch.setattr(executor.manager, "add_sequence", fail)
    monkeypatch.setattr(executor.manager, "_extend", fail_late)
    slots = len(executor.manager._free_slots)
    match = r"request 1 ended: it could not be added to the cache \(MemoryError\)"
    run_with_one_victim(boundaries, executor, lambda handle: None, match)
    assert len(executor.manager._free_slots) == slots


def test_a_failed_step_fails_its_batch_and_is_counted(boundaries):
    runner = CountingRunner()
    executor = make(boundaries, runner, max_batch_size=2)
    handles = [executor.submit(p, SamplingParams(30)) for p in PROMPTS]
    executor.step()

    def fail(batch):
        raise MemoryError("CUDA out of memory")

    runner.before_step = fail
    executor.step()
    runner.before_step = lambda batch: None
    executor.run_until_idle()
    for handle in handles[:2]:
        with pytest.raises(
            RequestFailedError, match=r"a step that it was part of failed \(MemoryError: CUDA out of mem"
        ):
            handle.result(0)
    assert handles[2].result(0).token_ids == expected(PROMPTS[2], 30)
    status = executor.status()
    assert (status.num_failed, status.num_failed_steps, status.num_finished) == (2, 1, 3)
    assert_clean(executor)


def test_what_pauses_cost_is_counted_when_everybody_failed(boundaries):
    runner = CountingRunner(num_blocks=12)
    executor = make(boundaries, runner)
    for prompt in PROMPTS:
        executor.submit(prompt, SamplingParams(150))
    while not executor.status().num_pauses:
        executor.step()
    runner.before_step = lambda batch: 1 / 0
    while executor.has_work:
        executor.step()
    assert executor.stats.num_finished == 3
    assert executor.stats.num_pauses == executor.status().num_pauses > 0
    assert executor.stats.num_recomputed_tokens > 0


def test_steps_that_go_on_failing_stop_the_executor_with_every_waiter_answered(boundaries):
    runner = CountingRunner()

    def fail(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner.before_step = fail
    executor = make(boundaries, runner, max_batch_size=1)
    handles = [executor.submit(p, SamplingParams(30)) for p in [*PROMPTS, *PROMPTS]]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        executor.run_until_idle()
    assert executor.has_failed
    for handle in handles[:MAX_FAILED_STEPS]:
        with pytest.raises(RequestFailedError):
            handle.result(0)
    for handle in handles[MAX_FAILED_STEPS:]:
        with pytest.raises(ExecutorStoppedError, match="the executor stopped: RuntimeError: CUDA error"):
            handle.result(0)
    with pytest.raises(UserError, match="has stopped on an error"):
        executor.submit([5])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_a_thread_is_loud_and_leaves_nobody_waiting(boundaries, error):
    runner, all_there = CountingRunner(), threading.Event()

    def fail(batch):
        assert all_there.wait(WAIT)  # who comes later is refused, which is another test
        raise error

    runner.before_step = fail
    with make(boundaries, runner, max_batch_size=1) as executor:
        handles = [executor.submit(p, SamplingParams(30)) for p in PROMPTS]
        all_there.set()
        for handle in handles:
            with pytest.raises(ExecutorStoppedError, match=type(error).__name__):
                handle.result(WAIT)
    assert executor.has_failed


def test_an_error_for_the_first_does_not_keep_the_others_waiting(boundaries, monkeypatch):
    """``_fail_all`` used to stop at a future that somebody had cancelled."""
    executor = make(boundaries)
    handles = [executor.submit(p, SamplingParams(30)) for p in PROMPTS]
    handles[0].future.cancel()
    monkeypatch.setattr(executor.sharing, "apply", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executor.run_until_idle()
    for handle in handles[1:]:
        with pytest.raises(ExecutorStoppedError):
            handle.result(0)


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_a_listener_that_ends_its_thread_ends_its_request_alone(boundaries, error):
    def listener(has_ended):
        raise error

    executor = make(boundaries)
    bad = executor.submit(PROMPTS[0], SamplingParams(30), listener=listener)
    good = executor.submit(PROMPTS[1], SamplingParams(30))
    good.future.add_done_callback(lambda _: (_ for _ in ()).throw(SystemExit(1)))
    last = executor.submit(PROMPTS[2], SamplingParams(30))
    executor.run_until_idle()
    with pytest.raises(RequestFailedError, match="its listener raised"):
        bad.result(0)
    assert good.result(0).token_ids == expected(PROMPTS[1], 30)
    assert last.result(0).token_ids == expected(PROMPTS[2], 30)
    assert executor.status().num_failed == 1
    assert_clean(executor)


@pytest.mark.parametrize("times", [1, 100])
def test_an_error_while_a_request_is_taken_out_leaves_nobody_waiting(boundaries, monkeypatch, times):
    executor = make(boundaries)
    handles = [executor.submit(p, SamplingParams(5)) for p in PROMPTS]
    remove, left = executor.manager.remove_sequence, [times]

    def fail(request_id):
        if left[0]:
            left[0] -= 1
            raise MemoryError
        return remove(request_id)

    monkeypatch.setattr(executor.manager, "remove_sequence", fail)
    if times == 1:
        executor.run_until_idle()
        assert_clean(executor)
    else:
        with pytest.raises(MemoryError):
            executor.run_until_idle()
    for handle in handles:
        with pytest.raises((RequestFailedError, ExecutorStoppedError), match="MemoryError"):
            handle.result(0)


def test_the_queue_has_a_limit_and_an_error_of_its_own(boundaries):
    executor = make(boundaries, max_queue_size=2)
    handles = [executor.submit(p, SamplingParams(3)) for p in PROMPTS[:2]]
    with pytest.raises(QueueFullError, match=r"the queue is full: 2 requests wait, the limit \(submit this one later"):
        executor.submit([5])
    executor.step()
    handles.append(executor.submit(PROMPTS[2], SamplingParams(3)))
    executor.run_until_idle()
    assert all(h.result(0).finish_reason == "length" for h in handles)


def test_statistics_take_bounded_memory():
    stats = ExecutorStats()
    for step in range(5 * MAX_TIMELINE):
        stats.record_step(step, step + 1.0, 3, 2, 0.0)
    assert MAX_TIMELINE // 2 <= len(stats.timeline) < MAX_TIMELINE
    times = [t for t, *_ in stats.timeline]
    assert len({b - a for a, b in itertools.pairwise(times)}) == 1
    assert stats.num_steps == 5 * MAX_TIMELINE
