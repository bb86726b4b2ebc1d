"""Admission: who may join."""

from types import SimpleNamespace

import pytest

from trtllm_memshare.search.config import make_config
from trtllm_memshare.vllm.admission import admits
from trtllm_memshare.vllm.request_options import RequestOptions


def request(name, tokens, max_tokens, prompt=8):
    return SimpleNamespace(request_id=name, num_prompt_tokens=prompt, num_tokens=tokens, max_tokens=max_tokens)


def relief(min_kept, memshare=True, num_retired=0):
    pages = SimpleNamespace(num_retired=num_retired, options=RequestOptions(memshare, min_kept))
    return SimpleNamespace(pages=lambda name: pages)


def settings(lookahead=16, **changes):
    return make_config("pressure", **{"lookahead_tokens": lookahead, "protected_tokens": 0, **changes})


def joins(running, min_kept, num_blocks, admission="max-tokens", lookahead=16, memshare=True, **changes):
    waiting, config = request("b", 8, 40), settings(lookahead, **changes)
    return admits(waiting, running, relief(min_kept, memshare), admission, config, num_blocks, 4)


def test_a_request_joins_when_the_pool_holds_everybody_at_the_floor():
    running = [request("a", 8, 40)]
    assert not joins(running, 1.0, 23)  # 12 blocks each at the end
    assert joins(running, 1.0, 24)
    assert joins(running, 0.25, 12)  # 2 of prompt, 3 of 10 generated, the one being written
    assert not joins(running, 0.25, 11)
    assert not joins(running, 0.25, 12, memshare=False)  # who shares nothing keeps everything


def test_pages_that_went_below_a_floor_leave_room():
    """Four pages of each stood again and went: no floor brings them back."""
    running, waiting = [request("a", 8, 40)], request("b", 8, 40)
    assert admits(waiting, running, relief(1.0, num_retired=4), "max-tokens", settings(), 16, 4)
    assert not admits(waiting, running, relief(1.0, num_retired=4), "max-tokens", settings(), 15, 4)


def test_what_steps_may_protect_is_counted_as_recent_tokens_are():
    running, steps = [request("a", 8, 400)], {"protected_steps": 2, "max_protected_tokens": 16}
    by_steps = [joins(running, 0.0, blocks, **steps) for blocks in range(40)]
    assert by_steps == [joins(running, 0.0, blocks, protected_tokens=16) for blocks in range(40)]
    assert by_steps.index(True) == [joins(running, 0.0, blocks) for blocks in range(40)].index(True) + 8


@pytest.mark.parametrize(("lookahead", "num_blocks"), [(4, 6), (16, 12), (400, 24)])
def test_lookahead_counts_the_next_tokens_and_no_more_than_were_asked_for(lookahead, num_blocks):
    running = [request("a", 8, 40)]
    assert joins(running, 1.0, num_blocks, "lookahead", lookahead)
    assert not joins(running, 1.0, num_blocks - 1, "lookahead", lookahead)


def test_somebody_always_gets_on_and_vllms_own_rule_asks_nothing():
    assert joins([], 1.0, 1)
    assert joins([request("a", 8, 400)], 1.0, 1, "vllm")
