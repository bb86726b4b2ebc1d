"""Time of the search per token: each search is counted once, in the window it falls into."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.search_cost import WINDOW, median_search_times, search_times
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return np.tile(np.arange(50, dtype=np.int32), 26)


@pytest.fixture(scope="module")
def boundaries() -> BoundaryTokens:
    return BoundaryTokens.from_texts([f"t{i}" for i in range(49)] + ["\n\n"])


@pytest.mark.parametrize("interval", [4, 8])
def test_each_search_falls_into_its_window(stream, boundaries, interval):
    """A clock that goes on by a second a look: a search costs one, and one in `interval` tokens has a search."""
    config = make_config("aligned", search_interval=interval)
    ticks = itertools.count()
    times = search_times(config, stream, boundaries, [WINDOW + 64, WINDOW + 264, 164], lambda: float(next(ticks)))
    assert times[:2] == pytest.approx([1e6 / interval] * 2)
    assert times[2] == pytest.approx(1e6 / interval, rel=0.1)  # 100 tokens behind the prompt are a window of 100


def test_the_median_over_streams_and_no_warm_up(stream, boundaries, monkeypatch):
    given = iter([[99.0], [1.0, 10.0], [5.0, 70.0], [2.0, 20.0]])
    monkeypatch.setattr("trtllm_memshare.evaluation.search_cost.search_times", lambda *_: next(given))
    assert median_search_times(make_config("aligned"), [stream] * 3, boundaries, [500, 600]) == [2.0, 20.0]


def test_a_length_that_the_prompt_alone_has_is_refused(stream, boundaries):
    with pytest.raises(UserError, match="lengths must be over 64 tokens"):
        search_times(make_config("aligned"), stream, boundaries, [1000, 64])
