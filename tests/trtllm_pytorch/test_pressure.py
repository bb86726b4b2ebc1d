"""Pages given up before TensorRT-LLM pauses anybody: floors, wishes, pauses, every form of manager."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from fakes.later_copies import copies, stand_again
from fakes.reading_runner import patchwork_text
from fakes.wrong_repeats import whether_or_not_copies_are_kept
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_tail_swap import (
    MANAGERS,
    NUM_SCHEDULES,
    check_contents,
    check_pages,
    check_tree,
    resident_pages,
    run,
    takes_null_pages,
)

from trtllm_memshare.cache import givable
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch import pressure
from trtllm_memshare.trtllm.pytorch.agenda import Agenda
from trtllm_memshare.trtllm.pytorch.null_rows import NULL_REQUEST

PRESSURE = {"preset": "pressure", "need": "random", "min_kept": 0.25, "high_watermark": 0.85, "low_watermark": 0.75}


@pytest.mark.parametrize("kind", [k for k in MANAGERS if k != "V1 reuse"])
@settings(max_examples=-(-NUM_SCHEDULES // (len(MANAGERS) - 1)), deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_forgets_what_it_may_and_keeps_the_rest_readable(null_pages, kind, seed, overlap):
    run(kind, seed, overlap, null_pages=null_pages, **{**PRESSURE, "protected_tokens": 8})


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=max(1, NUM_SCHEDULES // 12), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_block_reuse_no_page_of_the_tree_is_given_up_or_written(null_pages, overlap, seed):
    executor = run("V1 reuse", seed, overlap, reuse=True, null_pages=null_pages, **PRESSURE)
    check_tree(executor)
    held = resident_pages(executor.manager, NULL_REQUEST) if takes_null_pages(executor.manager) else []
    counts = executor.manager.impl.ref_count
    assert sum(counts) == len(held)
    assert all(counts[page] == 1 for page in held)


def test_with_block_reuse_who_gave_pages_up_is_freed_unregistered(null_pages):
    executor = run("V1 reuse", 4, True, reuse=True, null_pages=null_pages, **PRESSURE)
    gave_up = sum(r.py_memshare_retired_blocks > 0 for r in executor.requests)
    assert executor.manager.memshare.manager.stats().forgotten > 20
    assert executor.manager.impl.num_unregistered >= gave_up > 2
    assert not executor.manager.memshare.failures.num_errors


def serve(make, num_blocks, num_requests, length=180, size=8, is_checked=True, **arguments):
    """Requests that come at once, to their end."""
    manager = make_manager(make, num_blocks, size, **arguments)
    executor = FakeExecutor(manager, True)
    rng = random.Random(3)
    for request_id in range(num_requests):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, length))
    for step in range(3000):
        executor.step()
        if is_checked and step % 5 == 0:
            check_contents(executor)
            check_pages(executor)
        if not executor.active:
            return executor
    raise AssertionError("the schedule did not end")


@pytest.mark.parametrize(
    ("manager_class", "config"), [(FakeKVCacheManager, {}), (FakeMainKVCacheManagerV2, {"host_cache_size": 1 << 30})]
)
def test_nobody_is_paused_where_floors_allow_it(manager_class, config, null_pages):
    """Four requests of 24 pages each in 60 pages."""
    assert serve(manager_class, 60, 4, is_checked=False, config=config).num_pauses > 0
    make = make_sharing_class(manager_class, null_pages=null_pages, **PRESSURE)
    executor = serve(make, 67, 4, config=config)
    shared = executor.manager.memshare
    assert executor.num_pauses == 0
    assert shared.manager.stats().forgotten > 20
    assert shared.pressure.stats.episodes.num == 1
    assert not shared.failures.num_errors


def test_suspended_requests_leave_our_tables_room_for_those_that_run(null_pages, caplog):
    """V2 keeps what they hold on the host, twenty requests of 24 pages each over a pool of 60."""
    make = make_sharing_class(FakeMainKVCacheManagerV2, null_pages=null_pages, **{**PRESSURE, "min_kept": 0.75})
    manager = make_manager(make, 60, 8, max_batch_size=24, config={"host_cache_size": 1 << 30})
    executor, rng, behind = FakeExecutor(manager, True), random.Random(3), 0
    for request_id in range(20):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    while executor.active:
        executor.step()
        behind += sum(known.is_behind for known in manager.memshare.requests)
        check_contents(executor)
    assert executor.num_pauses > 20
    assert behind == 0
    assert "have no room for request" not in caplog.text


def test_before_somebody_is_paused_even_a_page_here_and_there_goes(null_pages):
    """While nobody would be, so few are not worth a look at all requests in every iteration."""
    make = make_sharing_class(null_pages=null_pages, **{**PRESSURE, "min_kept": 0.5, "min_run_tokens": 500})
    manager = make_manager(make, 60, 8)
    pressure, seen = manager.memshare.pressure, []  # pages missing, pages that might go, pages that went

    def watch(horizon, choose=pressure.choose):
        may_go = sum(view.most for view in pressure._views(10**6, True))
        free = pressure._backend.num_free_pages() + pressure._reserve.num_held
        missing = pressure._num_wanted(horizon + 1) - free
        choice = choose(horizon)
        seen.append((missing, may_go, sum(len(pages) for _, pages, _ in choice)))
        return choice

    pressure.choose = watch
    executor, rng = FakeExecutor(manager, True), random.Random(3)
    for request_id in range(16):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    while executor.active:
        executor.step()
    assert not manager.memshare.failures.num_errors
    short = [row for row in seen if row[0] > 0]
    assert sum(0 < may_go < 4 for _, may_go, _ in short) > 9
    assert all(went >= min(missing, may_go) for missing, may_go, went in short)


@pytest.mark.parametrize("repeats", [False, True])
def test_requests_keep_their_floor_and_their_own_wishes(null_pages, repeats):
    """Only pages that stand again go below a floor, and of a request that shares nothing not even these."""
    seen: dict[int, float] = {}

    def check(executor):
        check_contents(executor)
        manager = executor.manager.memshare.manager
        for known in executor.manager.memshare.requests:
            generated, retired = manager.page_counts(known.request_id)
            if generated:
                kept = (generated - retired) / generated
                seen[known.request_id] = min(seen.get(known.request_id, 1.0), kept)

    runs = {} if repeats else {"min_run_tokens": 500}
    make = make_sharing_class(null_pages=null_pages, **{**PRESSURE, **runs, "min_kept": 0.5})
    manager = make_manager(make, 60, 8)
    executor = FakeExecutor(manager, True)
    rng = random.Random(3)
    for request_id in range(4):
        request = executor.submit(request_id, repetitive_text(rng, 5), repetitive_text(rng, 180))
        if request_id == 1:
            request.py_memshare_min_kept = 0.9
        if request_id == 2:
            request.py_memshare = False
    while executor.active:
        executor.step()
        check(executor)
    if repeats:
        assert seen[0] < 0.5
    else:
        assert seen[0] == pytest.approx(0.5, abs=0.07)
        assert seen[1] >= 0.9
    assert seen[2] == 1.0


def below_floors(monkeypatch, null_pages):
    """How many looks found a request below its floor; what is missing there stands again in what the request keeps.

    Texts come again in pieces and nearly; the last pages go first, so that copies go before what they are copies of.
    """
    monkeypatch.setattr(pressure, "page_need", lambda _, facts: -facts.position.astype(np.float32))
    runs = {"min_run_tokens": 8, "shingle_tokens": 4, "protected_tokens": 8, "min_kept": 0.5}
    executor, size = (
        FakeExecutor(make_manager(make_sharing_class(null_pages=null_pages, **{**PRESSURE, **runs}), 60, 8), True),
        8,
    )
    shared, found = executor.manager.memshare, 0
    for request_id in range(4, 12):
        executor.submit(request_id, patchwork_text(request_id + 1000)[:9], patchwork_text(request_id)[9:189])
    while executor.active:
        executor.step()
        for request_id, sequence in shared.manager._sequences.items():
            generated, retired = shared.manager.page_counts(request_id)
            missing = math.ceil(0.5 * generated - 1e-9) - (generated - retired)
            if missing > 0:
                tokens, gone = executor.scripts[request_id][: sequence.num_computed], np.flatnonzero(sequence.retired)
                is_kept = ~np.isin(np.arange(len(tokens)) // size, gone)
                stand = stand_again(copies(tokens, 8), is_kept)
                assert sum(stand[p * size : (p + 1) * size].all() for p in gone) >= missing, "below its floor"
                found += 1
    assert not shared.failures.num_errors
    return found


def test_pages_go_below_a_floor_only_if_they_stand_again(null_pages, monkeypatch):
    assert below_floors(monkeypatch, null_pages) > 50


def test_a_page_below_a_floor_that_stands_nowhere_is_seen(null_pages, monkeypatch):
    """A test of the test above: copies need not be kept."""
    monkeypatch.setattr(givable, "stands_again", whether_or_not_copies_are_kept)
    with pytest.raises(AssertionError, match="below its floor"):
        below_floors(monkeypatch, null_pages)


def test_a_paused_request_that_is_cancelled_is_nobody_to_make_room_for(null_pages):
    """Eight requests, of which some are paused and then cancelled; two that come later have the pool for themselves."""
    make = make_sharing_class(null_pages=null_pages, **{**PRESSURE, "min_kept": 0.5})
    executor, rng = FakeExecutor(make_manager(make, 60, 8), True), random.Random(3)
    shared, cancelled = executor.manager.memshare, 0
    for request_id in range(8):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    while executor.active:
        executor.step()
        for request_id in [r.py_request_id for r in executor.active if r.py_request_id in shared.pressure._paused]:
            executor.cancel(request_id)
            cancelled += 1
    assert cancelled > 1
    assert shared.pressure._paused == shared.requests._parked == {}
    before = shared.manager.stats().forgotten
    for request_id in (100, 101):
        executor.submit(request_id, repetitive_text(rng, 5), repetitive_text(rng, 160))
    while executor.active:
        executor.step()
        check_contents(executor)
    assert shared.manager.stats().forgotten == before
    assert not shared.failures.num_errors


def given_up(null_pages, **wishes):
    """Pages that each of four requests gave up, and how many it wrote; two of them have these wishes."""
    manager = make_manager(make_sharing_class(null_pages=null_pages, **PRESSURE), 67, 8)
    executor, rng = FakeExecutor(manager, True), random.Random(3)
    for request_id in range(4):
        request = executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
        if request_id in (1, 2):
            vars(request).update(wishes)
    while executor.active:
        executor.step()
    assert not manager.memshare.failures.num_errors
    return [(r.py_memshare_retired_blocks, r.py_memshare_generated_blocks) for r in executor.requests]


@pytest.mark.parametrize("wish", ["half", float("nan"), 1.7, -1, True])
def test_a_wish_that_means_nothing_is_said_once_and_harms_nobody(null_pages, caplog, wish):
    assert given_up(null_pages, py_memshare_min_kept=wish) == given_up(null_pages)
    assert caplog.text.count("py_memshare_min_kept must be a number between 0 and 1") == 1


@pytest.mark.parametrize("wish", [0, np.False_, np.int64(0), "false", 2, 0.0, float("nan"), np.zeros(2)])
def test_what_is_not_a_yes_keeps_a_request_whole(null_pages, caplog, wish):
    whole = given_up(null_pages, py_memshare=False)
    assert [retired for retired, _ in whole[1:3]] == [0, 0]
    assert sum(retired for retired, _ in whole) > 20
    assert given_up(null_pages, py_memshare=wish) == whole
    is_known = isinstance(wish, int | np.integer | np.bool_) and wish == 0
    assert caplog.text.count("py_memshare must be True, False, 1 or 0, got ") == (not is_known)


@pytest.mark.parametrize("wish", [True, 1, np.True_, None])
def test_a_yes_and_no_wish_at_all_change_nothing(null_pages, caplog, wish):
    assert given_up(null_pages, py_memshare=wish) == given_up(null_pages)
    assert "py_memshare" not in caplog.text


def test_below_the_watermark_nothing_is_given_up_and_no_row_is_touched(null_pages):
    """With room for all, only the pages taken for null are missing from the pool."""
    executor = serve(make_sharing_class(null_pages=null_pages, **PRESSURE), 200, 4)
    shared = executor.manager.memshare
    assert shared.manager.stats().forgotten == 0
    assert shared.pressure.stats.episodes.num == shared.tail.num_copies == 0


def test_shadow_counts_and_gives_nothing_up(null_pages):
    make = make_sharing_class(null_pages=null_pages, shadow=True, **PRESSURE)
    executor = serve(make, 67, 4)
    stats = executor.manager.memshare.manager.stats()
    assert stats.forgotten == 0
    assert stats.shadowed > 0
    pressure_stats = executor.manager.memshare.pressure.stats
    assert pressure_stats.num_retired == pressure_stats.episodes.num == 0
    assert not executor.manager.memshare.giving_up._counted  # a server runs for months


def test_redundancy_is_read_where_pages_lie_now_and_not_of_those_that_went(null_pages):
    make = make_sharing_class(null_pages=null_pages, **{**PRESSURE, "need": "redundancy"})
    executor, rng = FakeExecutor(make_manager(make, 67, 8), True), random.Random(3)
    shared, looked_at = executor.manager.memshare, {True: 0, False: 0}

    def look(spans, catch_up=shared.pressure._redundancy.catch_up):
        for request_id, first, blocks in spans:
            gone = shared.manager.pool.is_null[shared.manager.block_table(request_id)][first : first + len(blocks)]
            for page, (block, is_gone) in enumerate(zip(blocks.tolist(), gone.tolist(), strict=True), first):
                looked_at[is_gone] += 1
                assert (block == -1) == is_gone
                if not is_gone:
                    text = [executor.content(request_id, page * 8 + slot) for slot in range(8)]
                    assert executor.pool[block, 0, 0, 0, :, 0].tolist() == text
        catch_up(spans)

    shared.pressure._redundancy.catch_up = look
    for request_id in range(4):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    while executor.active:
        executor.step()
    assert not shared.failures.num_errors
    assert min(looked_at.values()) > 20


def test_settings_that_cannot_work_here_are_named(tmp_path, monkeypatch):
    from trtllm_memshare.trtllm.pytorch.settings import load_settings

    path = tmp_path / "settings.json"
    for text, message in (
        ('{"preset": "pressure"}', "needs null_pages, a folder"),
        ('{"preset": "pressure", "null_pages": "x", "need": "attention-redundancy"}', "does not know"),
        ('{"preset": "pressure", "null_pages": "x", "retired_becomes": "dropped"}', "got dropped"),
        (
            '{"preset": "pressure", "route": "framework", "need": "nearest-earlier"}',
            "need nearest-earlier reads distance, which route framework",
        ),
        ('{"preset": "pressure", "null_pages": "x", "retired_becomes": "alias"}', "need nearest-earlier alone"),
        (
            '{"preset": "pressure", "null_pages": "x", "need": "surprisal"}',
            "take one of random, age, nearest-earlier, redundancy, redundancy-recency",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)})
    path.write_text('{"preset": "pressure", "null_pages": "x"}')
    assert load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)}).memshare.pressure
    with pytest.raises(UserError, match="no null pages in"):
        make_manager(make_sharing_class(preset="pressure", null_pages=str(tmp_path)), 40, 8)


def test_what_is_expected_comes_once_and_when_it_is_due():
    agenda = Agenda()
    agenda.expect(1, 5)
    agenda.expect(2, 7)
    agenda.expect(1, 6)
    agenda.forget(2)
    assert [agenda.due(step) for step in (4, 5, 6, 7)] == [[], [], [1], []]
