"""A page stands again as long as one later copy of its text is kept, however many copies between have gone."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.repeats import stands_again
from trtllm_memshare.search.run_matcher import RunMatcher

SIZE, COPIES = 16, 40


@pytest.fixture(scope="module")
def loop(boundaries):
    """A passage of two pages, ``COPIES`` times."""
    passage = np.random.default_rng(3).integers(10, 70, 2 * SIZE)
    matcher = RunMatcher(make_config("pressure", protected_tokens=0), SIZE, 1, boundaries)
    matcher.append(np.tile(passage, COPIES).astype(np.int32))
    assert 0 in matcher.ready_blocks()
    return matcher


@pytest.mark.parametrize("num_gone", [0, 1, 16, COPIES - 2])
def test_copies_of_copies_are_followed_to_the_one_that_is_kept(loop, num_gone):
    gone = {2 * copy for copy in range(1, 1 + num_gone)}

    def is_gone(positions):
        return np.isin(positions // SIZE, list(gone))

    assert stands_again(loop, 0, SIZE, 2 * COPIES * SIZE, is_gone)


def test_without_a_kept_copy_it_does_not(loop):
    assert not stands_again(loop, 0, SIZE, 2 * COPIES * SIZE, lambda t: (t // SIZE) % 2 == 0)
    assert not stands_again(loop, 0, SIZE, 2 * SIZE, lambda t: t < 0), "the copy is not computed yet"
    assert not stands_again(loop, 2 * COPIES - 1, SIZE, 2 * COPIES * SIZE, lambda t: t < 0), "the last one"
