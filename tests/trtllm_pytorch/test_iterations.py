"""In which iterations a search begins."""

from __future__ import annotations

import random

import pytest
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text


@pytest.mark.parametrize(("min_pool_use", "num_blocks"), [(1.0, 20), (1.0, 21), (0.5, 39), (0.5, 42)])
def test_nothing_is_searched_while_less_of_the_pool_is_in_use_than_asked_for(min_pool_use, num_blocks):
    """One request that grows to 20 pages, which it holds for eight iterations."""
    executor = FakeExecutor(make_manager(make_sharing_class(min_pool_use=min_pool_use), num_blocks, 8), True)
    text = repetitive_text(random.Random(1), 160)
    executor.submit(0, text[:5], text[5:])
    shared = executor.manager.memshare
    while executor.active:
        executor.step()
    assert (shared.manager.stats().shared > 0) == (min_pool_use * num_blocks <= 20)
    assert not shared.failures.num_errors
