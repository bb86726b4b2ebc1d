"""Nothing that goes wrong in sharing ends the server: it stops new sharing, is said once, harms no other request."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_cpp import FakeCppKVCacheManager
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_requests import FinishReason
from trtllm_pytorch.test_pressure import PRESSURE
from trtllm_pytorch.test_tail_swap import MANAGERS, NUM_NULL, NUM_SCHEDULES, check_contents, check_pages, drive, run

from trtllm_memshare.trtllm.pytorch.block_tables import BlockTables
from trtllm_memshare.trtllm.pytorch.giving_up import GivingUp
from trtllm_memshare.trtllm.pytorch.table_rows import TableRows


class Fault(Exception):
    """What a bug of ours might raise."""


def failing(original, after: int):
    """A function that raises at one call and works before and after."""
    calls = iter(range(10**9))

    def call(*arguments, **keywords):
        if next(calls) == after:
            raise Fault("made up")
        return original(*arguments, **keywords)

    return call


PLACES = {
    "tokens": lambda shared: (shared.requests, "take_in"),
    "candidates": lambda shared: (shared.manager, "candidates"),
    "decisions": lambda shared: (shared.policy, "decide"),
    "remaps": lambda shared: (shared.manager, "apply"),
    "page lists": lambda shared: (shared._backend, "pages"),
    "cuts": lambda shared: (shared._backend, "shrink"),
    "waits": lambda shared: (shared.tail, "_wait_for_table"),
    "rows": lambda shared: (shared._rows, "gather"),
    "new rows": lambda shared: (shared._rows._map, "_flush"),
    "null pages": lambda shared: (shared._rows, "take_null_pages"),
    "pressure": lambda shared: (shared.pressure, "choose"),
    "forgotten pages": lambda shared: (shared.manager, "retire"),
    "crossings": lambda shared: (shared._rows, "cross"),
    "bands": lambda shared: (shared.manager, "cross_bands"),
    "the end of a request": lambda shared: (shared.requests, "forget"),
}


def break_at(place: str, kind: str, seed: int, after: int, null_pages: str | None) -> FakeExecutor:
    """A schedule in which one call of a place raises, checked as it goes; all pages are free at its end.

    Without ``null_pages`` null entries are skipped.
    """

    class Broken(FakeExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            owner, name = PLACES[place](self.manager.memshare)
            setattr(owner, name, failing(getattr(owner, name), after))

    def check(executor, step):
        if step % 3 == 0:
            check_contents(executor)

    under_pressure = list(PLACES).index(place) >= list(PLACES).index("null pages") or seed % 2
    way = {"null_pages": null_pages} if null_pages else {"null_entries": "skip"}
    config = {**way, **PRESSURE} if under_pressure else {}
    make = make_sharing_class(MANAGERS[kind], **config)
    num_null = NUM_NULL if under_pressure and null_pages else 0
    executor = drive(make, random.Random(seed), kind, True, False, check, Broken, num_null)
    failures = executor.manager.memshare.failures
    ended = [
        r
        for r in executor.requests
        if r.finish_reason is FinishReason.CANCELLED and r.py_request_id not in executor.cancelled_waiting
    ]
    assert failures.num_errors <= 1
    assert len(ended) == failures.num_failed_requests <= 8
    assert failures.is_off == bool(failures.num_errors)
    return executor


@pytest.mark.parametrize("kind", ["V1", "V2 main"])
@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=max(1, NUM_SCHEDULES // 60), deadline=None)
@given(seed=st.integers(0, 10**6), after=st.integers(0, 12))
def test_an_error_anywhere_stops_new_sharing_and_harms_nobody_else(null_pages, place, kind, seed, after):
    break_at(place, kind, seed, after, null_pages)


@pytest.mark.parametrize("kind", ["V1", "V1 old", "V2 main"])
@pytest.mark.parametrize("place", [*list(PLACES)[list(PLACES).index("page lists") :]])
@settings(max_examples=max(1, NUM_SCHEDULES // 60), deadline=None)
@given(seed=st.integers(0, 10**6), after=st.integers(0, 12))
def test_and_where_rows_are_shorter_than_their_text(place, kind, seed, after):
    break_at(place, kind, 2 * seed + 1, after, None)


@pytest.mark.parametrize(
    ("place", "kind", "after"),
    [
        ("page lists", "V1", 0),  # null pages were taken and never named
        ("page lists", "V2 main", 0),
        ("cuts", "V1", 0),  # pages that keep new requests out were forgotten, not freed
        ("the end of a request", "V1", 0),  # of one that holds pages: it is released while it is being freed
        ("forgotten pages", "V1", 5),  # of two requests the second could not give up, and the first had no new row
    ],
)
def test_schedules_that_once_kept_pages_for_ever(null_pages, place, kind, after):
    executor = break_at(place, kind, 1, after, null_pages)
    assert executor.manager.memshare.failures.num_errors == 1


def test_a_list_that_changed_behind_our_back_ends_its_request_alone(monkeypatch, caplog):
    original = FakeCppKVCacheManager.rewind_kv_cache
    monkeypatch.setattr(
        FakeCppKVCacheManager, "rewind_kv_cache", lambda self, i, n: original(self, i, n - self.tokens_per_block)
    )
    executor = drive(make_sharing_class(), random.Random(5), "V1", True, False)
    ended = [r for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert len(ended) == 1
    assert len(executor.requests) > 1
    assert caplog.text.count("shares nothing new from now on") == 1
    assert "dropped from the end, but the KV cache manager now lists" in caplog.text
    assert "Please report this line with: FakeKVCacheManager of TensorRT-LLM" in caplog.text
    assert f"request {ended[0].py_request_id} is ended alone" in caplog.text


@pytest.mark.parametrize(
    ("config", "num_blocks"),
    [
        ({"preset": "aligned", "undo_rope": False, "max_distance": 0.8}, 200),
        ({**PRESSURE, "need": "redundancy"}, 60),
    ],
)
def test_a_list_that_a_search_finds_wrong_ends_its_request_alone(null_pages, monkeypatch, caplog, config, num_blocks):
    """Its row was rearranged for the list of before, so that it would write into pages of others."""
    handing_back: list[bool] = []

    def hand_back(self, choice, step, original=GivingUp.hand_back):
        handing_back.append(bool(choice))
        original(self, choice, step)
        handing_back.append(False)

    monkeypatch.setattr(GivingUp, "hand_back", hand_back)
    make = make_sharing_class(null_pages=null_pages, **config)
    executor = FakeExecutor(make_manager(make, num_blocks, 8), True)
    shared, text = executor.manager.memshare, repetitive_text(random.Random(1), 180)
    for request_id in range(4):
        executor.submit(request_id, text[: 5 + request_id], text)
    synchronise = shared.tail.synchronise

    def cut_first(known):
        if not shared.failures.is_off and shared.shares(0) and known.request_id == 0 and not any(handing_back[-1:]):
            executor.manager.impl.rewind_kv_cache(0, 3 * executor.manager.tokens_per_block)
        return synchronise(known)

    monkeypatch.setattr(shared.tail, "synchronise", cut_first)
    while executor.active:
        executor.step()
        check_contents(executor)
    ended = [r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert ended == [0]
    assert shared.failures.num_errors == shared.failures.num_failed_requests == 1
    assert "request 0 of" in caplog.text


def test_a_request_that_cannot_cross_its_band_is_lost_and_the_others_cross(monkeypatch):
    """They are expected in this iteration only: left out, they would read the null pages of another band for ever."""
    backend = SimpleNamespace(max_batch_size=4, max_blocks_per_seq=8, pool=torch.zeros(1))
    rows, crossed, lost = TableRows(backend, None, {1: "known", 2: "known", 3: "known"}, None), [], []

    def cross(request_id, step):
        if request_id < 3:
            raise Fault(f"made up for {request_id}")
        crossed.append((request_id, step))

    monkeypatch.setattr(rows, "set", cross)
    for request_id in (1, 2, 3, 4):  # the last one has ended
        rows._crossings.expect(request_id, 5)
    with pytest.raises(Fault, match="made up for 1"):
        rows.cross(5, lost.append)
    assert (crossed, lost) == ([(3, 5)], [1, 2])


def test_rows_that_exist_when_sharing_stops_stay_right():
    """Requests that share already go on reading what they share, to their end."""

    def check(executor, step):
        shared = executor.manager.memshare
        if shared.manager.stats().shared >= 4:
            shared.failures.is_off = True
        check_contents(executor)

    executor = drive(make_sharing_class(), random.Random(5), "V1", True, False, check)
    assert (
        4
        <= executor.manager.memshare.manager.stats().shared
        < run("V1", 5, True).manager.memshare.manager.stats().shared
    )


@pytest.mark.parametrize("on_unsupported", ["stop", "warn"])
def test_an_attention_backend_that_fills_its_own_table_is_said_and_nothing_shared(monkeypatch, caplog, on_unsupported):
    monkeypatch.setattr(BlockTables, "rearrange", lambda self, table, request_ids: None)
    executor = run("V1", 5, overlap=True, on_unsupported=on_unsupported)
    assert executor.manager.memshare.failures.is_off
    assert executor.manager.memshare.manager.stats().shared == 0
    assert caplog.text.count("set attn_backend: TRTLLM") == 1


def test_a_file_stops_new_sharing_for_as_long_as_it_exists(tmp_path, caplog):
    switch = tmp_path / "off"
    text = repetitive_text(random.Random(1), 200)

    def shared_after(exists: bool) -> int:
        for _ in range(60):
            executor.step()
            check_contents(executor)
            check_pages(executor)
        assert switch.exists() == exists
        return manager.memshare.manager.stats().shared

    with caplog.at_level(logging.WARNING, logger="trtllm_memshare"):
        manager = make_manager(make_sharing_class(off_file=switch), 200, 8)
        executor = FakeExecutor(manager, True)
        executor.submit(0, text[:5], text)
        before = shared_after(False)
        switch.touch()
        executor.step()
        for _ in range(16):
            executor.step()
        stopped = manager.memshare.manager.stats().shared
        assert shared_after(True) == stopped >= before > 0
        switch.unlink()
        assert shared_after(False) > stopped
    assert f"shares nothing new: {switch} exists" in caplog.text
    assert f"shares again: {switch} is gone" in caplog.text


def test_while_the_file_exists_nobody_gives_up_again_and_no_page_is_held_back(null_pages, tmp_path):
    """Requests that come back keep what they computed; the pages that kept others out are the scheduler's."""
    switch, rng = tmp_path / "off", random.Random(3)
    make = make_sharing_class(null_pages=null_pages, off_file=switch, **{**PRESSURE, "min_kept": 0.5})
    executor = FakeExecutor(make_manager(make, 67, 8), True)
    shared, held = executor.manager.memshare, []
    for request_id in range(10):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))

    def step(count):
        for _ in range(count):
            executor.step()
            check_contents(executor)
            check_pages(executor)
            held.append(shared.pressure._reserve.num_held)

    def gone():
        return shared.giving_up.num_resumed, shared.manager.stats().forgotten

    while shared._step % 16 or not held[-1:] > [0]:  # the file is looked for in the next step
        step(1)
    switch.touch()
    step(17)
    held.clear()
    before, pauses = gone(), executor.num_pauses
    step(400)
    assert executor.num_pauses > pauses
    assert gone() == before
    assert max(held) == 0
    switch.unlink()
    step(17)
    for request_id in range(20, 26):
        executor.submit(request_id, repetitive_text(rng, request_id), repetitive_text(rng, 180))
    while executor.active:
        step(1)
    assert gone()[1] > before[1]
    assert not shared.failures.num_errors
