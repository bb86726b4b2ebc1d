"""Intervals of a share of right answers."""

from __future__ import annotations

import pytest

from trtllm_memshare.evaluation.statistics import mcnemar, paired_interval, wilson_interval


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
