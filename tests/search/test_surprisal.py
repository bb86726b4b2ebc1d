"""Surprisal of pages: its sum and its peak, at once and a token at a time."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.surprisal import OF_PAGES, PEAK_TOKENS, PageSurprisal, peak_surprisal, summed_surprisal

NAN = np.nan


def test_a_statement_that_stands_once_has_a_peak_and_hardly_a_sum():
    told = np.array([[0.1] * 12 + [9.0, 8.0, 7.0, 6.0], [2.0] * 16], np.float32)
    assert summed_surprisal(told) == pytest.approx([31.2, 32.0])
    assert peak_surprisal(told) == pytest.approx([7.5, 2.0])


def test_tokens_that_are_not_known():
    told = np.array([[1, NAN, 3, 2, np.inf, 4], [NAN] * 6, [NAN, 8, NAN, NAN, NAN, NAN]], np.float32)
    assert summed_surprisal(told) == pytest.approx([15, NAN, 48], nan_ok=True)
    assert peak_surprisal(told) == pytest.approx([2.5, NAN, 2], nan_ok=True)


@pytest.mark.parametrize("fact", OF_PAGES)
@pytest.mark.parametrize("size", [2, PEAK_TOKENS, 16])
def test_a_token_at_a_time_comes_to_the_same(fact, size):
    nats = np.random.default_rng(size).exponential(2, (3, size)).astype(np.float32)
    of_request = PageSurprisal(fact, size)
    for i, value in enumerate(nats.ravel().tolist()):
        of_request.add(2 * size + i, value)  # two pages of the prompt before
    assert of_request.values == pytest.approx([0, 0, *OF_PAGES[fact](nats)], rel=1e-5)
