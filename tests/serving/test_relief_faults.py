"""Errors of pressure on the executor: what is tried again, what a request loses, and what ends everything."""

from __future__ import annotations

import pytest
import torch
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.relief_faults import ReliefFaults
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import ExecutorStoppedError, RequestFailedError
from trtllm_memshare.serving.pressure import Pressure
from trtllm_memshare.serving.request import SamplingParams

SIZE = 8
TEXTS = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])


def make_executor(num_blocks, most=8, **changes) -> Executor:
    runner = ReadingRunner(num_blocks, SIZE, shows_pool=True)
    changes = {"retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500, **changes}
    executor = Executor(runner, make_config("pressure", **changes), TEXTS, 320, most, 64)
    runner.manager = executor.manager
    return executor


def submit(executor, count, new_tokens=200):
    prompts = [[first, *repeating_text(first + 1000)[1:16]] for first in range(4, 4 + count)]
    return [executor.submit(p, SamplingParams(new_tokens)) for p in prompts]


def run(executor) -> None:
    while executor.has_work:
        executor.step()
        executor.manager.check_integrity()


def assert_own_texts(handles, new_tokens=200) -> None:
    for first, handle in enumerate(handles, 4):
        assert handle.result(0).token_ids == repeating_text(first)[16 : 16 + new_tokens]


def test_after_one_error_relief_goes_on_with_the_next_step(monkeypatch):
    executor = make_executor(110)
    handles, signer, steps = submit(executor, 6), executor.pressure._ledger._source._signer, []
    works = signer.page_signatures

    def fail(*arguments):
        steps.append(executor.stats.num_steps)
        if len(steps) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(*arguments)

    monkeypatch.setattr(signer, "page_signatures", fail)
    run(executor)
    assert_own_texts(handles)
    assert steps[1] == steps[0] + 1
    assert sum(executor.pressure.stats.retired_pages.values()) > 20
    assert executor.stats.num_pauses == 0  # the pool was above its high watermark, not full


def test_an_error_that_lasts_leaves_the_full_caches_pauses(monkeypatch):
    outcomes = []
    for preset in ("off", "pressure"):
        runner = ReadingRunner(60, SIZE, shows_pool=True)
        executor = Executor(runner, make_config(preset), TEXTS, 320, 8, 64)
        if preset == "pressure":
            monkeypatch.setattr(executor.pressure._ledger, "catch_up", lambda request_ids: 1 / 0)
        handles = submit(executor, 6)
        run(executor)
        assert_own_texts(handles)
        outcomes.append(executor.stats.num_pauses)
    assert min(outcomes) > 0
    assert sum(executor.pressure.stats.retired_pages.values()) == 0


def test_a_request_whose_facts_stopped_half_way_keeps_what_it_has(monkeypatch):
    executor = make_executor(110)
    handles, ledger = submit(executor, 6), executor.pressure._ledger
    works, gone, calls = ledger.retired, [], []

    def fail(request_id, pages):
        calls.append(request_id)
        if request_id == handles[2].request_id:
            raise MemoryError
        works(request_id, pages)

    monkeypatch.setattr(ledger, "retired", fail)
    executor.pressure.watch = lambda retirement: gone.append(retirement.request_id)
    run(executor)
    assert_own_texts(handles)
    assert calls == gone
    assert calls.count(handles[2].request_id) == 1 < max(map(calls.count, calls))
    assert not executor.pressure._unknown


def test_what_is_wrong_with_one_request_does_not_keep_the_others_pages(monkeypatch):
    executor = make_executor(110)
    handles, manager, gone = submit(executor, 6), executor.manager, set()
    works, wrong = manager.givable_pages, handles[3].request_id

    def fail(request_id, *how):
        return 1 / 0 if request_id == wrong else works(request_id, *how)

    monkeypatch.setattr(manager, "givable_pages", fail)
    executor.pressure.watch = lambda retirement: gone.add(retirement.request_id)
    run(executor)
    assert_own_texts(handles)
    assert gone == {h.request_id for h in handles} - {wrong}
    assert executor.pressure.faults.num > 0


def test_an_error_that_cannot_even_be_told_is_counted():
    """Memory that is too short for pages may be too short for a line of the log."""

    class Untold(MemoryError):
        def __str__(self):
            raise MemoryError

    faults = ReliefFaults()
    for _ in range(2):
        with faults.caught():
            raise Untold
    assert faults.num == 2


def test_a_request_longer_than_the_pool_goes_on_after_one_error(monkeypatch):
    """Of two requests the younger is paused for it."""
    executor = make_executor(24, most=2)
    handles, ledger, failed = submit(executor, 2), executor.pressure._ledger, []
    works = ledger.catch_up

    def fail(request_ids):
        if not failed:
            failed.append(request_ids)
            raise MemoryError
        works(request_ids)

    monkeypatch.setattr(ledger, "catch_up", fail)
    run(executor)
    assert failed
    assert_own_texts(handles)


def test_a_request_that_cannot_go_on_without_relief_is_answered(monkeypatch):
    """27 blocks of its own, a pool of 16, nobody to pause but itself: it would wait for ever."""
    executor = make_executor(16, most=1)
    handles = submit(executor, 1)
    [short] = [executor.submit([5, *repeating_text(1005)[1:16]], SamplingParams(20))]
    monkeypatch.setattr(executor.pressure._ledger, "catch_up", lambda request_ids: 1 / 0)
    for _ in range(400):
        executor.step()
        executor.manager.check_integrity()
    assert not executor.has_work
    with pytest.raises(RequestFailedError, match="it needs 17 blocks to go on, the pool has 16, and nobody is left"):
        handles[0].result(0)
    assert short.result(0).token_ids == repeating_text(5)[16:36]
    assert not executor.status().pressure.is_active


def test_an_error_while_pages_go_ends_everything_and_everybody_is_answered(monkeypatch):
    """Tables and counts may disagree by then, and a block belong to two requests."""
    executor = make_executor(110)

    def fail(*arguments):
        raise MemoryError("half of it")

    monkeypatch.setattr(executor.manager, "retire", fail)
    handles = submit(executor, 6)
    with pytest.raises(MemoryError):
        executor.run_until_idle()
    assert executor.has_failed
    for handle in handles:
        with pytest.raises(ExecutorStoppedError, match="MemoryError: half of it"):
            handle.result(0)


def test_with_several_ranks_an_error_is_the_executors(monkeypatch):
    """Another rank would wait for this one's choice."""
    executor = make_executor(110)
    submit(executor, 6)
    while executor.manager.pool.num_used < 90:
        executor.step()
    choices = []
    ranked = Pressure(
        executor.manager,
        executor.config,
        executor.pressure._ledger,
        agree=lambda choice: choices.append(choice) or choice,
    )
    running = executor._scheduler.running
    assert ranked.free_for_running(1, running)
    assert len(choices) == 1
    monkeypatch.setattr(executor.manager, "givable_pages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ranked.free_for_running(1, running)
    assert len(choices) == 1
