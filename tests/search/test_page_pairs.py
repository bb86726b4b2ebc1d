"""What stands in for what, against a table that is walked through page by page."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.page_pairs import PagePairs


def distances(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, count), np.float32)


@pytest.mark.parametrize("seed", range(10))
def test_pages_go_with_all_that_they_stand_for(seed):
    """A hundred pages, more than there is room for at first, arrive in parts while others go."""
    rng, first, count, max_aliases = np.random.default_rng(seed), 3, 100, 5
    distance = distances(count, seed)
    pairs, table = PagePairs(first, max_aliases), {page: page for page in range(first, first + count)}
    for end in range(10, count + 1, 10):
        new = np.arange(first + end - 10, first + end)
        old = pairs.there(first + end)
        assert old.tolist() == [page for page in range(first, first + end) if table[page] == page]
        pairs.learn(new, old, distance[np.ix_(new - first, old - first)])
        nearest = pairs.measure(old, 4)
        donors = pairs.donors()
        assert [distance[p - first, d - first] for p, d in donors.items()] == sorted(nearest[np.isfinite(nearest)])
        gone = list(donors)[: int(rng.integers(0, 5))]
        forgotten = [int(page) for page in rng.choice(old, 1) if page not in donors]
        for page in gone:
            table = {p: donors[page] if to == page else to for p, to in table.items()}
        table = {p: -1 if to in forgotten else to for p, to in table.items()}
        pairs.retired(np.array(gone + forgotten, np.int64), donors)
        assert pairs.stands_in == {page: to for page, to in table.items() if to not in (page, -1)}
        values = [to for to in table.values() if to >= 0]
        assert max(values.count(to) for to in values) <= max_aliases


def test_pages_that_nobody_compared_find_no_donor():
    pairs = PagePairs(2, 8)
    pairs.learn(np.array([3, 4]), np.array([2, 3, 4]), distances(3)[1:])
    assert np.isfinite(pairs.measure(np.array([2, 3, 4, 9, 80]), 9)).tolist() == [False, True, True, False, False]
    assert pairs.measure(np.array([3, 4]), 9)[0] == np.inf  # 2 may not go, so it is not among them
    assert len(pairs.measure(np.zeros(0, np.int64), 9)) == 0


def test_a_page_may_be_compared_anew():
    pairs = PagePairs(0, 8)
    for value in (0.5, 0.25):
        pairs.learn(np.array([1]), np.array([0]), np.array([[value]], np.float32))
        assert pairs.measure(np.array([0, 1]), 1).tolist() == [np.inf, value]
