"""Redundancy on the pool's device: against the definition, while pages come and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_memshare.trtllm.pytorch.redundancy import Redundancy

SIZE = 4


def of(source: Redundancy, request_id: int, first: int, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    source.catch_up([(request_id, first, blocks)])
    return source.measure(request_id, wanted)


def by_definition(source: Redundancy, blocks: np.ndarray) -> np.ndarray:
    """The mean over a page's tokens of the largest cosine with a token of a later page that is there."""
    signatures = source._sign(np.maximum(blocks, 0)).numpy()
    found = np.full(len(blocks), -1.0, np.float32)
    for page in np.flatnonzero(blocks >= 0):
        later = [signatures[p] for p in np.flatnonzero(blocks >= 0) if p > page]
        if later:
            found[page] = (signatures[page] @ np.concatenate(later).T).max(1).mean()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_pages_come_and_go(seed):
    """Several at once, copies among them; pages that went may be the nearest of others."""
    rng, pool = (
        np.random.default_rng(seed),
        torch.randn(60, 3, 2, 2, SIZE, 8, generator=torch.Generator().manual_seed(0)),
    )
    order = rng.permutation(60)
    for copy, page in zip(order[30:45], order[:15], strict=True):
        pool[copy, :, 1] = pool[page, :, 1]
    source, blocks = Redundancy(pool), np.zeros(0, np.int64)
    while len(blocks) < 60:
        blocks = np.concatenate((blocks, order[len(blocks) : len(blocks) + rng.integers(1, 9)]))
        blocks[rng.random(len(blocks)) < 0.06] = -1
        there = np.flatnonzero(blocks >= 0)
        found = of(source, 1, 10, blocks, there + 10)
        np.testing.assert_allclose(found, by_definition(source, blocks)[there], atol=1e-5)


def test_a_page_that_was_given_up_is_no_later_copy():
    pool = torch.randn(12, 3, 2, 2, SIZE, 8, generator=torch.Generator().manual_seed(0))
    pool[7] = pool[2]
    source, blocks = Redundancy(pool), np.array([4, 9, 2, 0, 1, 7, 3])
    assert of(source, 1, 10, blocks, np.array([12]))[0] == pytest.approx(1.0, abs=1e-5)
    blocks[5] = -1
    assert of(source, 1, 10, blocks, np.array([12]))[0] < 0.95


def test_a_request_that_begins_anew_or_is_shorter_is_looked_at_anew():
    pool = torch.randn(12, 3, 2, 2, SIZE, 8, generator=torch.Generator().manual_seed(0))
    source = Redundancy(pool)
    of(source, 1, 10, np.array([4, 9, 2, 0]), np.array([10]))
    for first, blocks in ((11, np.array([9, 2, 0])), (11, np.array([5, 6]))):
        pages = np.arange(first, first + len(blocks))
        np.testing.assert_allclose(of(source, 1, first, blocks, pages), by_definition(source, blocks), atol=1e-5)
    source.forget(1)
    assert not source._index.num_pages(1)


def test_requests_do_not_meet_each_other():
    pool = torch.randn(12, 3, 2, 2, SIZE, 8, generator=torch.Generator().manual_seed(0))
    pool[7] = pool[2]
    source = Redundancy(pool)
    source.catch_up([(1, 10, np.array([4, 2, 0])), (2, 3, np.array([5, 7, 1]))])
    for request_id, first, blocks in ((1, 10, [4, 2, 0]), (2, 3, [5, 7, 1])):
        found = source.measure(request_id, np.arange(first, first + 3))
        np.testing.assert_allclose(found, by_definition(source, np.array(blocks)), atol=1e-5)
