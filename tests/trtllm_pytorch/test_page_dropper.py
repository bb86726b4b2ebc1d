"""Pages dropped through the framework for KV cache compression: floors, counts, the off file, order on a GPU."""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace

import pytest
from trtllm_pytorch.fake_executor import repetitive_text
from trtllm_pytorch.fake_framework import FrameworkExecutor
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState
from trtllm_pytorch.test_framework import make_executor, serve

from trtllm_memshare.search.episodes import QUIET_STEPS
from trtllm_memshare.trtllm.pytorch.totals import NOTHING


def after_each(look):
    """A ``prepare`` of ``serve`` that looks at the dropper after each of its steps."""

    def prepare(dropper, requests):
        relieve = dropper._relieve
        dropper._relieve = lambda running: (relieve(running), look(dropper))

    return prepare


def growing(lengths, num_blocks=60, **config) -> FrameworkExecutor:
    """Requests that write as many tokens as ``lengths`` say."""
    executor, rng = make_executor(num_blocks, True, **config), random.Random(3)
    for request_id, length in enumerate(lengths):
        executor.submit(request_id, repetitive_text(rng, 5), repetitive_text(rng, length))
    return executor


def test_with_room_for_all_nothing_is_dropped_or_looked_at():
    def prepare(dropper, requests):
        dropper._backend.pages = None

    assert serve(3, True, num_blocks=200, prepare=prepare).dropper.num_dropped == 0


def test_before_the_first_iteration_there_is_nothing_to_say_and_a_request_may_end():
    dropper = growing([]).dropper
    dropper.forget(FakeLlmRequest(1, [1]))
    happened = {name for name, value in dropper.totals().items() if value != NOTHING[name]}
    assert happened <= {"retired_pages"}  # by reason, none of each
    assert not sum(dropper.totals()["retired_pages"].values())


@pytest.mark.parametrize("min_kept", [0.5, 0.75])
def test_no_request_goes_below_its_floor_and_who_is_there_is_counted(min_kept):
    missing, counts = [], []

    def look(dropper):
        at_floor = 0
        for request in dropper._running.values():
            gone = request.py_num_compressed_tokens // 8
            generated = (request.max_beam_num_tokens - 1) // 8 - math.ceil(request.py_prompt_len / 8)
            if gone:
                missing.append(math.ceil(min_kept * generated) - (generated - gone))
                at_floor += missing[-1] >= 0
        counts.append(at_floor)
        assert dropper.totals()["requests_at_floor"] == at_floor

    serve(3, True, num_blocks=45, min_kept=min_kept, prepare=after_each(look))
    assert max(missing) == 0
    assert max(counts) > 0


def test_one_episode_lasts_until_the_last_request_has_ended():
    executor = serve(3, True)
    totals = executor.dropper.totals()
    assert (totals["pressure_episodes"], totals["pressure_active"]) == (1, False)


def test_requests_that_end_while_others_run_end_no_episode_and_leave_nothing_behind():
    executor = growing([100, 120, 140, 160, 180, 180], need="redundancy")
    dropper, active = executor.dropper, []
    while executor.active:
        executor.step()
        active.append((len(executor.active), dropper.totals()["pressure_active"]))
    assert (6, True) in active
    assert all(is_active for running, is_active in active[active.index((6, True)) :] if running)
    assert not active[-1][1]
    assert not dropper._redundancy._index._requests
    assert not dropper.failures.num_errors


def test_an_episode_ends_once_it_has_been_quiet_for_long():
    executor, gone, active = growing([120, 150, 150, 230]), [], []
    dropper = executor.dropper
    while executor.active:
        if len(executor.active) == 1 and len(executor.requests) == 4:  # there is never nobody
            executor.submit(4, [1] * 8, repetitive_text(random.Random(4), 230))
        executor.step()
        gone.append(dropper.num_dropped)
        active.append((len(executor.active), dropper.stats.episodes.is_active))
    last = gone.index(gone[-1])  # the step that dropped last
    assert active.index((1, False)) == last + QUIET_STEPS
    assert dropper.stats.episodes.num == 1


@pytest.mark.parametrize("is_dummy", [True, False])
def test_requests_of_the_warm_up_are_no_pauses(is_dummy):
    executor = growing([])
    (request,) = executor.manager.add_dummy_requests([2**40], token_nums=[9], is_gen=True)
    request.is_dummy_request = is_dummy
    executor.dropper.end([request])
    executor.manager.free_resources(request)
    assert executor.dropper.totals()["pauses"] == (not is_dummy)
    assert not executor.dropper.failures.num_errors


def test_a_request_that_was_freed_before_its_last_step_is_reported_is_not_taken_up_again():
    """TensorRT-LLM answers and frees who has ended, and only then calls with the batch, where they still are."""
    executor = growing([20])
    while executor.active:
        executor.step()
    executor.dropper.end(executor.requests)
    assert not executor.dropper._running
    assert not executor.dropper.pauses._running
    assert not executor.dropper.failures.num_errors


@pytest.mark.parametrize("num_blocks", [49, 50, 51])
def test_nobody_is_said_to_be_spared_who_would_not_have_been_suspended(num_blocks, tmp_path):
    """Two requests that grow together, to 25 pages each."""
    switch = tmp_path / "off"

    def run() -> FrameworkExecutor:
        executor = growing([195, 195], num_blocks, off_file=switch)
        while executor.active:
            executor.step()
        return executor

    dropper = run().dropper
    switch.touch()
    assert dropper.totals()["pauses_avoided"] == (run().num_pauses > 0) == (num_blocks < 50)
    assert dropper.num_dropped > 0


def test_a_file_that_appears_while_requests_run_stops_dropping(tmp_path):
    switch = tmp_path / "off"
    stop = after_each(lambda dropper: dropper.num_dropped and switch.touch())
    stopped = serve(3, True, off_file=switch, prepare=stop).dropper.num_dropped
    assert 0 < stopped < serve(3, True).dropper.num_dropped


def test_nothing_is_known_of_pages_that_have_other_numbers():
    def prepare(dropper, requests):
        drop = dropper._drop

        def dropping(request, pages):
            assert request.state is not LlmRequestState.GENERATION_COMPLETE
            drop(request, pages)
            assert not dropper._redundancy._index.num_pages(request.py_request_id)

        dropper._drop = dropping

    dropper = serve(3, True, need="redundancy", prepare=prepare).dropper
    assert dropper.num_dropped > 20
    assert not dropper._redundancy._index._requests
    assert not dropper.pauses._running


def test_shadow_counts_no_page_as_given_up():
    totals = serve(3, True, shadow=True).dropper.totals()
    assert totals["retired_pages"] == {"repeated": 0, "needed_least": 0, "resumed": 0}
    assert totals["pressure_episodes"] == 0
    assert totals["pauses_avoided"] == 0 < totals["pauses"]


def test_host_time_is_that_of_the_steps():
    started = time.perf_counter()
    spent = growing([180]).dropper.totals()["host_seconds"], serve(3, True).dropper.totals()["host_seconds"]
    assert spent[0] == 0 < spent[1] < time.perf_counter() - started


def test_saved_bytes_are_those_of_the_pages():
    totals = serve(3, True).dropper.totals()
    assert totals["saved_bytes"] == 256 * totals["blocks_forgotten"] > 0


def test_on_a_gpu_the_managers_stream_waits_for_the_moves_before_pages_go_back():
    calls = []

    def prepare(dropper, requests):
        dropper._done = SimpleNamespace(record=lambda: calls.append("record"))
        dropper._manager._stream = SimpleNamespace(wait_event=lambda event: calls.append("wait"))
        shrink = dropper._backend.shrink
        dropper._backend.shrink = lambda *arguments: (calls.append("shrink"), shrink(*arguments))

    serve(3, True, prepare=prepare)
    assert calls
    assert calls == ["record", "wait", "shrink"] * (len(calls) // 3)
