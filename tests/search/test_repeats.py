"""A page stands again as long as one later copy of its text is kept, however many copies between have gone.

On random texts it is held against ``fakes.later_copies``, which compares all tokens with all.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fakes import wrong_repeats
from fakes.later_copies import copies, stand_again
from fakes.reading_runner import patchwork_text

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


def test_the_oracle_finds_copies_of_runs_alone():
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 7, 3, 4, 9]
    found = copies(text, 3)
    assert np.argwhere(found).tolist() == [[0, 5], [1, 6], [2, 7], [2, 11], [3, 12], [4, 13]]
    assert not copies(text, 4).any()


def test_the_oracle_follows_copies_that_went_to_one_that_is_kept():
    found = copies([1, 2, 9, 1, 2, 3, 8, 2, 3], 2)
    assert not found[1, 7], "the words around them differ"
    for gone, stand in (([], [0, 1, 4, 5]), ([3, 4], [1, 4, 5]), ([7, 8], [0, 1]), ([3, 4, 7], [5])):
        assert np.flatnonzero(stand_again(found, ~np.isin(np.arange(9), gone))).tolist() == stand


def asked(boundaries):
    """Of forty texts with any pages gone: what ``stands_again`` is asked, and whether a page really does."""
    size, length, rng = 8, 320, np.random.default_rng(5)
    for seed in range(40):
        text, min_run = patchwork_text(seed + 4)[:length], 4 + 4 * (seed % 2)
        config = make_config("pressure", protected_tokens=0, min_run_tokens=min_run, shingle_tokens=4)
        matcher, found = RunMatcher(config, size, 1, boundaries), copies(text, min_run)
        matcher.append(np.array(text, np.int32))
        for share in (0.0, 0.1, 0.3, 0.6):
            is_gone = np.repeat(rng.random(length // size) < share, size)
            truth = stand_again(found, ~is_gone).reshape(-1, size).all(1)
            for page in matcher.ready_blocks():
                yield (matcher, page, size, length, is_gone.__getitem__), bool(truth[page])


def test_a_page_whose_text_is_not_kept_never_stands_again(boundaries):
    answers = Counter((stands_again(*question), truth) for question, truth in asked(boundaries))
    assert answers[True, False] == 0
    assert answers[False, False] > 100
    assert answers[True, True] > 100


@pytest.mark.parametrize("wrong", wrong_repeats.ALL, ids=lambda wrong: wrong.__name__)
def test_wrong_answers_would_be_seen(boundaries, wrong):
    assert any(wrong(*question) and not truth for question, truth in asked(boundaries))
