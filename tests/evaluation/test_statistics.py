"""Intervals of a share of right answers and of a ratio; p-values of one comparison and of several."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.evaluation.statistics import holm, mcnemar, paired_interval, ratio_interval, wilson_interval


def test_known_values_and_ends():
    assert wilson_interval(99, 100) == pytest.approx((0.9455, 0.9982), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson_interval(10, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_more_trials_narrow_the_interval():
    widths = [high - low for low, high in (wilson_interval(9 * n, 10 * n) for n in (1, 10, 100))]
    assert widths == sorted(widths, reverse=True)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson_interval(0, 0)


def test_mcnemar_known_values_and_symmetry():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * 9 / 2**8)
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert 0 < mcnemar(900, 1100) < 1e-4  # counts too large for floating-point binomials


def test_paired_interval_brackets_the_change_and_narrows():
    low, high = paired_interval(1, 0, 500)
    assert low < -1 / 500 < high
    assert high > 0
    widths = [high - low for low, high in (paired_interval(2 * n, n, 100 * n) for n in (1, 10, 100))]
    assert widths == sorted(widths, reverse=True)
    assert paired_interval(0, 40, 2000)[0] > 0
    assert paired_interval(3, 8, 100) == pytest.approx(tuple(-x for x in paired_interval(8, 3, 100)[::-1]))
    with pytest.raises(ValueError, match="got 3 \\+ 8 of 10"):
        paired_interval(3, 8, 10)


def test_holm_counts_each_p_value_as_often_as_none_smaller_is_left_and_keeps_their_order():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.6, 0.5])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([0.02])) == pytest.approx([0.02])


def test_the_interval_of_a_ratio_holds_it_narrows_with_pairs_and_is_a_point_where_all_pairs_agree():
    rng = np.random.default_rng(3)
    theirs = rng.uniform(1, 3, 200)
    ours = 0.9 * theirs + rng.normal(0, 0.2, 200)
    low, high = ratio_interval(ours, theirs)
    few_low, few_high = ratio_interval(ours[:10], theirs[:10])
    assert low < ours.mean() / theirs.mean() < high
    assert high - low < few_high - few_low
    # Pairs are drawn together: with one ratio in every pair nothing else can come out.
    assert ratio_interval(0.9 * theirs, theirs) == pytest.approx((0.9, 0.9))
