"""Pages that are held so that TensorRT-LLM admits nobody who could not stay."""

from __future__ import annotations

import random

import pytest
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_v1 import FakeKVCacheManager, FakeMainKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_pressure import PRESSURE, serve

from trtllm_memshare.trtllm.pytorch.admission import AdmissionReserve
from trtllm_memshare.trtllm.pytorch.backends import V1Backend


@pytest.mark.parametrize("manager_class", [FakeKVCacheManager, FakeMainKVCacheManager])
def test_pages_are_held_and_let_go(manager_class):
    manager = make_manager(manager_class, 100, 8)
    reserve = AdmissionReserve(manager, V1Backend(manager))
    for wanted in (70, 71, 40, 3, 99, 12, 0):
        reserve.hold(wanted)
        held = 0 if wanted < 4 else wanted
        assert abs(reserve.num_held - held) < 4
        assert manager.get_num_free_blocks() == 100 - reserve.num_held
    assert not manager.impl.sequences


def test_requests_wait_instead_of_being_let_in_and_paused_again_and_again(null_pages):
    """Ten requests of 24 pages in 60: four or so can stay. Whoever is paused waits until floors leave room for it."""
    plain = serve(FakeKVCacheManager, 60, 10, is_checked=False)
    executor = serve(make_sharing_class(null_pages=null_pages, **{**PRESSURE, "min_kept": 0.5}), 67, 10)
    assert executor.num_pauses < plain.num_pauses / 3
    assert not executor.manager.memshare.failures.num_errors
    assert executor.manager.memshare.pressure._reserve.num_held == 0


@pytest.mark.parametrize(
    "protected",
    [
        {"protected_tokens": 64},
        {"protected_tokens": 0, "protected_steps": 2, "max_protected_tokens": 64},
    ],
)
def test_what_is_protected_is_counted_at_the_floors(null_pages, protected):
    """All goes that may. Nothing ends a step in this text, so steps protect as much as they may, 64 tokens."""
    everything = {"min_kept": 0.0, "high_watermark": 0.05, "low_watermark": 0.01}
    make = make_sharing_class(null_pages=null_pages, **{**PRESSURE, **everything, **protected})
    executor = FakeExecutor(make_manager(make, 87, 8), True)
    pressure, held = executor.manager.memshare.pressure, []
    for request_id in range(3):
        executor.submit(request_id, [40 + request_id] * 8, list(range(2, 40)) * 4)
    while executor.active:
        executor.step()
        if len(executor.active) == 3 and pressure._has_given:
            manager = executor.manager.memshare.manager
            held.append(sum(1 + generated - gone for generated, gone in map(manager.page_counts, range(3))))
            assert held[-1] <= pressure._floors()
    assert not executor.manager.memshare.failures.num_errors
    assert max(held) == 3 * (1 + 9)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_unshared_requests_count_whole_and_alone_keep_nobody_out(null_pages, num_shared):
    """The last request to end may be one of them: what is held then would be held until the next one comes."""
    make = make_sharing_class(null_pages=null_pages, on_unsupported="warn", **{**PRESSURE, "min_kept": 0.5})
    executor, rng = FakeExecutor(make_manager(make, 107, 8), True), random.Random(3)
    pressure, held = executor.manager.memshare.pressure, {True: 0, False: 0}
    for request_id in range(4):
        request = executor.submit(request_id, repetitive_text(rng, 150), repetitive_text(rng, 20 + 9 * request_id))
        if request_id >= num_shared:
            request.llm_request_type = "LLMREQUEST_TYPE_GENERATION_ONLY"
    while executor.active:
        executor.step()
        is_shared_one_there = any(True for _ in executor.manager.memshare.requests)
        held[is_shared_one_there] = max(held[is_shared_one_there], pressure._reserve.num_held)
        unshared = [r for i, r in pressure._active.items() if i >= num_shared and i in executor.processed]
        assert pressure._floors() >= sum(-(-r.max_beam_num_tokens // 8) for r in unshared)
    assert held[False] == pressure._reserve.num_held == 0
    assert (held[True] > 0) == (num_shared == 1)
    assert executor.manager.get_num_free_blocks() >= 100
    assert not executor.manager.memshare.failures.num_errors


def test_v2_and_several_ranks_hold_nothing(null_pages):
    make = make_sharing_class(FakeMainKVCacheManagerV2, null_pages=null_pages, **PRESSURE)
    assert make_manager(make, 60, 8).memshare.pressure._reserve is None


@pytest.mark.parametrize("min_run_tokens", [8, 500])
def test_the_scheduler_sees_what_running_requests_need_next_and_what_floors_leave(null_pages, min_run_tokens):
    """Whoever gave pages up holds no more at its floor than it would without them; one request is unshared."""
    config = {**PRESSURE, "min_kept": 0.5, "min_run_tokens": min_run_tokens, "on_unsupported": "warn"}
    executor = FakeExecutor(make_manager(make_sharing_class(null_pages=null_pages, **config), 67, 8), True)
    shared, rng, held, gone = executor.manager.memshare, random.Random(3), [], {}
    pressure = shared.pressure

    def look(num_incoming, admit=pressure.admit):
        admit(num_incoming)
        lengths = {i: r.max_beam_num_tokens for i, r in pressure._active.items()}
        floors = pressure._floors()
        assert floors <= sum(-(-(n + 1) // 8) - gone.get(i, 0) for i, n in lengths.items())
        opening = sum(any((n - 1 + i) % 8 == 0 for i in range(3)) for n in lengths.values())
        seen = executor.manager.get_num_free_blocks() - num_incoming
        wanted = opening + max(0, int(0.85 * 60) - floors - num_incoming)
        held.append(pressure._reserve.num_held)
        assert seen < wanted + 4 or not any(True for _ in shared.requests)  # nobody there who could give pages up
        assert seen > wanted - 4 or not held[-1]

    pressure.admit = look
    for request_id in range(12):
        request = executor.submit(request_id, repetitive_text(rng, 30), repetitive_text(rng, 100 + 10 * request_id))
        if request_id == 2:
            request.llm_request_type = "LLMREQUEST_TYPE_GENERATION_ONLY"
    while executor.active:
        gone |= {known.request_id: known.pages.num_given_up for known in shared.requests}
        executor.step()
    assert not shared.failures.num_errors
    assert sum(pages > 0 for pages in held) > 20
