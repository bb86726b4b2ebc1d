"""What is left of a request that has ended: nothing, and while others run nothing of theirs ends with it."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_requests import LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_pressure import PRESSURE


def make_executor(null_pages, lengths, manager_class=FakeKVCacheManager, **config):
    make = make_sharing_class(manager_class, null_pages=null_pages, **{**PRESSURE, **config})
    executor, rng = FakeExecutor(make_manager(make, 67, 8), True), random.Random(3)
    for request_id, length in enumerate(lengths):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, length))
    return executor


def test_a_server_that_waits_for_work_holds_no_request_that_has_ended(null_pages):
    executor = make_executor(null_pages, [180] * 4, need="redundancy")
    requests = [weakref.ref(request) for request in executor.requests]
    while executor.active:
        executor.step()
    shared = executor.manager.memshare
    assert shared.manager.stats().forgotten > 20
    assert not shared.pressure._redundancy._index._requests
    executor.requests.clear()
    executor.previous = None
    gc.collect()
    assert [request() for request in requests] == [None] * 4


def test_pressure_ends_once_it_has_been_quiet_for_long_and_not_with_the_first(null_pages):
    executor = make_executor(null_pages, [120, 150, 150, 230])
    shared, active = executor.manager.memshare, []
    while executor.active:
        if len(executor.active) == 1 and len(executor.requests) == 4:  # there is never nobody
            executor.submit(4, [1] * 8, repetitive_text(random.Random(4), 230))
        executor.step()
        active.append((len(executor.active), shared.pressure.stats.episodes.is_active))
    assert active.index((4, True)) < active.index((3, True)) < active.index((1, False))
    assert shared.pressure.stats.episodes.num == 1
    assert not shared.failures.num_errors


def test_a_request_that_was_lost_and_ended_by_itself_is_not_ended_again(null_pages):
    """Several ranks end lost ones when they meet, which may be later."""
    executor = make_executor(null_pages, [40, 40])
    while len(executor.processed) < 2:
        executor.step()
    shared = executor.manager.memshare
    executor.step()
    shared.lost.lose(1)
    while executor.active:
        executor.step()
    shared.lost.end("late")
    assert shared.failures.num_failed_requests == 0


@pytest.mark.parametrize("is_dummy", [True, False])
def test_requests_of_the_warm_up_are_no_pauses(null_pages, is_dummy):
    executor = make_executor(null_pages, [])
    (request,) = executor.manager.add_dummy_requests([2**40], token_nums=[9], is_gen=True)
    request.is_dummy_request = is_dummy
    executor.manager.memshare.begin_step(ScheduledRequests([], [request]).generation_requests)
    executor.manager.free_resources(request)
    assert executor.manager.memshare.pauses.num == (not is_dummy)
    assert not executor.manager.memshare.pauses._running


def suspended_states(executor):
    """States of requests as main's V2 scheduler suspends them, while the executor runs to its end."""
    states, suspend = [], executor.scheduler._suspend

    def suspending(request):
        states.append(request.state)
        suspend(request)

    executor.scheduler._suspend = suspending
    while executor.active:
        executor.step()
    return states


def test_a_request_that_is_suspended_while_its_last_token_is_on_its_way_is_no_pause():
    """Main's V2 takes its pages for an older one; it is answered in the same iteration and has waited for nothing."""
    counted = {True: [], False: []}
    for length in range(36, 50):  # both fill the pool when they hold 48 tokens each
        make = make_sharing_class(FakeMainKVCacheManagerV2, shadow=True)
        executor = FakeExecutor(make_manager(make, 12, 8, config={"host_cache_size": 1 << 30}), True)
        for request_id, count in ((0, 80), (2, length)):
            executor.submit(request_id, [40 + request_id] * 8, list(range(count)))
        states = suspended_states(executor)
        if states:
            is_last = states == [LlmRequestState.GENERATION_TO_COMPLETE]
            counted[is_last].append(executor.manager.memshare.pauses.num)
        assert not executor.manager.memshare.pauses._running
    assert set(counted[True]) == {0}
    assert min(counted[False]) > 0


@pytest.mark.parametrize("manager_class", [FakeKVCacheManager, FakeMainKVCacheManagerV2])
def test_who_reaches_its_limit_runs_no_pass_in_vain_and_nothing_is_taken_from_it_meanwhile(null_pages, manager_class):
    """Even ids do. TensorRT-LLM does not schedule them again, and they count as nobody that runs."""
    executor = make_executor(null_pages, [120, 150, 170, 180], manager_class)
    shared, forward, before, seen = executor.manager.memshare, executor._forward, {}, []

    def looking(batch):
        for request in executor.active:
            if request.state is LlmRequestState.GENERATION_TO_COMPLETE:
                request_id = request.py_request_id
                assert request not in batch.generation_requests
                assert request_id not in shared.pressure._active
                assert executor._own_pages(request_id) == before[request_id]
                assert executor.processed[request_id] == len(executor.scripts[request_id]) - 1
                seen.append(request_id)
        forward(batch)

    executor._forward = looking
    while executor.active:
        before.update({request_id: executor._own_pages(request_id) for request_id in executor.processed})
        executor.step()
    assert seen == [0, 2]
    assert shared.manager.stats().forgotten > 0
    assert (executor.num_pauses, shared.pauses.num, shared.failures.num_errors) == (0, 0, 0)
