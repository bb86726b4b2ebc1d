"""Needs of pages: who goes first under each formula, and what happens without a fact."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.need import NEEDS, PageFacts, page_need


def facts(**known) -> PageFacts:
    values = {name: np.array(value, np.float32) for name, value in known.items()}
    return PageFacts(position=np.arange(4, 7, dtype=np.int32), **values)


ALL = facts(
    redundancy=[0.9, 0.6, 0.6],
    attention=[0.02, 0.01, 0.04],
    recent_attention=[0.3, 0.1, 0.2],
    surprisal=[5.0, 20.0, 10.0],
    draw=[0.5, 0.7, 0.2],
    distance=[np.inf, 1.1, 0.4],
)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("random", [2, 0, 1]),
        ("age", [0, 1, 2]),
        ("nearest-earlier", [2, 1, 0]),
        ("attention", [1, 2, 0]),
        ("surprisal", [0, 2, 1]),
        ("redundancy", [0, 1, 2]),  # equal redundancy: the older page first
        ("redundancy-recency", [0, 1, 2]),
        ("recent-attention-redundancy", [0, 1, 2]),
        ("attention-redundancy", [0, 1, 2]),
        ("attention-redundancy-recency", [0, 1, 2]),
        ("surprisal-redundancy", [0, 2, 1]),
        ("surprisal-led-redundancy", [0, 2, 1]),
        ("surprisal-led-redundancy-recency", [0, 2, 1]),
        ("attention-surprisal-redundancy", [0, 1, 2]),
    ],
)
def test_who_goes_first(name, order):
    need = page_need(name, ALL)
    assert need.dtype == np.float32
    assert np.argsort(need, kind="stable").tolist() == order


def test_every_formula_is_tested_above_and_takes_no_pages():
    assert len(NEEDS) == 14
    empty = PageFacts(np.zeros(0, np.int32), *(np.zeros(0, np.float32) for _ in range(6)))
    assert all(len(page_need(name, empty)) == 0 for name in NEEDS)


def test_importance_is_relative_to_the_request_and_redundancy_is_not():
    need = page_need("attention-redundancy", facts(redundancy=[0.9, 0.6, 0.6], attention=[0.02, 0.01, 0.04]))
    assert need == pytest.approx([0.1 * 0.5 - 0.81, 0.1 * 0.25 - 0.54, 0.1 - 0.54])
    unread = page_need("attention-redundancy", facts(redundancy=[0.9, 0.6, 0.6], attention=[0.0, 0.0, 0.0]))
    assert unread == pytest.approx([-0.81, -0.54, -0.54])


def test_recency_keeps_a_new_page_that_is_a_little_more_redundant_and_not_one_that_is_much_more():
    need = page_need("redundancy-recency", facts(redundancy=[0.5, 0.7, 0.95]))
    assert need == pytest.approx([-0.5, 0.1 - 0.7, 0.2 - 0.95])
    assert page_need("redundancy-recency", facts(redundancy=[0.5, 0.55, 0.6])).argsort().tolist() == [0, 1, 2]


def test_beside_surprisal_a_page_far_back_is_hardly_needed_less_than_one_still_farther():
    many = PageFacts(np.arange(4, 404, dtype=np.int32), *(np.zeros(400, np.float32) for _ in range(6)))
    need = page_need("surprisal-led-redundancy-recency", many)
    assert need[[0, -1]] == pytest.approx([0, 0.2])
    assert (np.diff(need) > 0).all()
    assert need[-1] - need[-20] > 5 * (need[-200] - need[-219])


def test_unknown_names_and_missing_facts():
    with pytest.raises(UserError, match=r"unknown need surprise \(did you mean surprisal\?\)"):
        page_need("surprise", ALL)
    with pytest.raises(ValueError, match="need surprisal-redundancy reads surprisal, redundancy, got no surprisal"):
        page_need("surprisal-redundancy", facts(redundancy=[0.9, 0.6, 0.6]))


@pytest.mark.parametrize("others", [[np.nan], [10.0], [np.inf]])
def test_a_page_of_unknown_surprisal_is_ranked_by_its_redundancy(others):
    """Whether anything is known of its neighbours or not: repeats go first, and nobody's need is unknown."""
    known = facts(redundancy=[0.95, 0.2, 0.5], surprisal=[np.nan, np.nan, *others])
    need = page_need("surprisal-led-redundancy", known)
    assert np.isfinite(need).all()
    assert need[0] < need[1]
    assert need[0] < need[2]


@pytest.mark.parametrize("name", NEEDS)
def test_the_only_page_that_may_go_has_a_need(name):
    one = PageFacts(np.array([7], np.int32), *(np.full(1, 0.5, np.float32) for _ in range(6)))
    assert np.isfinite(page_need(name, one)).all()
