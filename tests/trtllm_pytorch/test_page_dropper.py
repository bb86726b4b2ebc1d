"""Pages dropped through the framework for KV cache compression: floors, counts, the off file, order on a GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from trtllm_pytorch.fake_requests import LlmRequestState
from trtllm_pytorch.test_framework import serve


def after_each(look):
    """A ``prepare`` of ``serve`` that looks at the dropper after each of its steps."""

    def prepare(dropper, requests):
        relieve = dropper._relieve
        dropper._relieve = lambda running: (relieve(running), look(dropper))

    return prepare


def test_with_room_for_all_nothing_is_dropped():
    assert serve(3, True, num_blocks=200).dropper.num_dropped == 0


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
