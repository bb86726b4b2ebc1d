"""Intervals of a share of right answers."""

from __future__ import annotations

import pytest

from trtllm_memshare.report.statistics import wilson_interval


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
