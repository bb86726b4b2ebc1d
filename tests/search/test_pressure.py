"""The choice of pages under pressure: floors, order and spread, by properties over random requests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room

SPREADS = ("longest", "equal", "need")


def view(request_id, need, repeated=None, room=None, pages=None):
    count = len(need)
    return PressureView(
        request_id,
        np.arange(count, dtype=np.int32) if pages is None else np.array(pages, np.int32),
        np.array(need, np.float32),
        np.zeros(count, bool) if repeated is None else np.array(repeated, bool),
        count if room is None else room,
    )


def views_and_number(seed):
    """Requests that may give pages up, and how many are wanted: mostly fewer than there are."""
    rng = np.random.default_rng(seed)
    repeats, rooms, views = rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1]), rng.choice([3, 14]), []
    for request_id in range(rng.integers(0, 7)):
        count = int(rng.integers(0, 13))
        need = rng.choice([rng.uniform(-2, 2), -1.0, 0.0, 1.0, math.nan], count, p=[0.3, 0.3, 0.2, 0.15, 0.05])
        pages = sorted(rng.choice(500, count, replace=False).tolist())
        views.append(view(request_id, need, rng.random(count) < repeats, int(rng.integers(0, rooms + 1)), pages))
    most = sum(v.most for v in views)
    return views, int(rng.choice([*rng.integers(0, most + 1, 4), rng.integers(-2, 3), rng.integers(80)]))


@pytest.mark.parametrize("spread", SPREADS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_choice_keeps_to_every_floor_and_goes_in_order(seed, spread):
    views, wanted = views_and_number(seed)
    chosen = dict(choose_pages(views, wanted, spread))
    most = {v.request_id: max(v.repeated.sum(), min(v.room, len(v.pages))) for v in views}
    assert sum(map(len, chosen.values())) == min(max(wanted, 0), sum(most.values()))
    for v in views:
        gone = chosen.get(v.request_id, np.zeros(0, np.int32))
        assert gone.dtype == np.int32
        assert len(gone) <= most[v.request_id] == v.most
        assert (np.diff(gone) > 0).all()
        assert np.isin(gone, v.pages).all()
        went = np.isin(v.pages, gone)
        if (went & ~v.repeated).any():
            assert went[v.repeated].all(), "a page went for need while a repeat stayed"
            assert len(gone) <= v.room, "a page went for need below the floor"
        for kind in (v.repeated, ~v.repeated):
            left, right = v.need[kind & went], v.need[kind & ~went]
            if len(left) and len(right) and not np.isnan(right).all():
                assert not np.isnan(left).any()
                assert left.max() <= np.nanmin(right)
    # Over requests, too: nobody goes for need while another has a repeat to give.
    if any((np.isin(v.pages, chosen.get(v.request_id, [])) & ~v.repeated).any() for v in views):
        for v in views:
            gone = np.isin(v.pages, chosen.get(v.request_id, []))
            assert gone[v.repeated].all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), more=st.integers(0, 20), spread=st.sampled_from(["longest", "need"]))
def test_asking_for_more_keeps_what_was_chosen(seed, more, spread):
    views, wanted = views_and_number(seed)
    some, all_of_it = dict(choose_pages(views, wanted, spread)), dict(choose_pages(views, wanted + more, spread))
    for request_id, pages in some.items():
        assert set(pages.tolist()) <= set(all_of_it[request_id].tolist())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pages=st.integers(0, 400),
    retired=st.integers(0, 400),
    min_kept=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.55, 0.75, 0.9, 1.0]), st.floats(0, 1)),
)
def test_room_ends_at_the_floor(pages, retired, min_kept):
    retired = min(retired, pages)
    room = floor_room(pages, retired, min_kept)
    assert room >= 0
    if room:
        assert pages - retired - room >= min_kept * pages - 1e-6
        assert pages - retired - room - 1 < min_kept * pages


def test_floor_by_example():
    assert floor_room(9, 3, 0.5) == 1
    assert floor_room(100, 0, 0.55) == 45  # 0.55 * 100 is 55.00000000000001
    assert floor_room(8, 8, 0.5) == 0
    assert floor_room(5, 0, 1.0) == 0


def test_need_looks_at_all_requests_together():
    views = [view(1, [5, 6, 7]), view(2, [1, 9, 2])]
    assert [(i, p.tolist()) for i, p in choose_pages(views, 3)] == [(1, [0]), (2, [0, 2])]


def test_the_longest_gives_first_and_then_all_evenly():
    views = [view(1, [0] * 9), view(2, [9] * 5), view(3, [0] * 2)]
    taken = [{i: len(p) for i, p in choose_pages(views, n, "longest")} for n in (3, 4, 6, 10)]
    assert taken == [{1: 3}, {1: 4}, {1: 5, 2: 1}, {1: 7, 2: 3}]


def test_equal_shares_follow_the_room():
    views = [view(1, [0] * 9), view(2, [9] * 6), view(3, [0] * 3)]
    assert {i: len(p) for i, p in choose_pages(views, 6, "equal")} == {1: 3, 2: 2, 3: 1}


def test_repeats_go_first_over_all_requests():
    views = [view(1, [-5, -4]), view(2, [3, 2, 9], [False, True, True])]
    assert [(i, p.tolist()) for i, p in choose_pages(views, 2)] == [(2, [1, 2])]
    assert [(i, p.tolist()) for i, p in choose_pages(views, 3)] == [(1, [0]), (2, [1, 2])]


def test_repeats_go_below_the_floor_and_nothing_else_does():
    at_its_floor = view(1, [1, 2, 3, 4], [False, True, True, False], room=0)
    nearly = view(2, [9, 8, 7], [False, False, True], room=2)
    assert (at_its_floor.most, nearly.most) == (2, 2)
    assert [(i, p.tolist()) for i, p in choose_pages([at_its_floor, nearly], 9)] == [(1, [1, 2]), (2, [1, 2])]


def test_watermarks_free_nothing_below_the_high_one_and_down_to_the_low_one_above_it():
    marks = Watermarks(high=0.9, low=0.7)
    assert marks.pages_to_free(85, 5, 100) == 0
    assert marks.pages_to_free(86, 5, 100) == 21
    assert marks.pages_to_free(70, 0, 100) == 0
    assert Watermarks(1.0, 1.0).pages_to_free(99, 2, 100) == 1


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.6), (1.1, 0.5), (0.5, 0.0)])
def test_watermarks_out_of_order_are_refused(high, low):
    with pytest.raises(ValueError, match=r"0 < low <= high <= 1, got low"):
        Watermarks(high, low)


@pytest.mark.parametrize(("num_pages", "room"), [(2, 1), (3, -1)])
def test_a_view_of_unequal_lengths_or_of_a_negative_room_is_refused(num_pages, room):
    with pytest.raises(ValueError, match=r"must have one length and room must not be negative, got .* \(request 7\)"):
        PressureView(7, np.arange(num_pages), np.zeros(3), np.zeros(3, bool), room)
