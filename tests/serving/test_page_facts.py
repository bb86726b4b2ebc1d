"""What is known of pages while they are served: how closely they are met again, how likely they were, what is read."""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

import numpy as np
import pytest
import torch

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.errors import UserError
from trtllm_memshare.search import signature_index
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.need import find_need
from trtllm_memshare.serving.page_facts import PageLedger
from trtllm_memshare.serving.redundancy_source import ValueRedundancy
from trtllm_memshare.serving.sampling import token_log_probs


class Manager:
    """The pages of one request, as ``ValueRedundancy`` asks for them."""

    tokens_per_block = 4

    def __init__(self, blocks, first):
        self.blocks, self.first = np.array(blocks), first
        self.pool = BlockPool(9, 4)
        self.pool.reserve([0])

    def generated_pages(self, request_id):
        return self.first, len(self.blocks), self.blocks


def test_redundancy_is_of_pages_that_are_still_there():
    torch.manual_seed(0)
    pool = torch.randn(9, 3, 2, 2, 4, 8)
    pool[6, :, 1] = pool[2, :, 1]  # page 4 repeats the V of page 1
    manager = Manager([1, 2, 4], 1)
    source = ValueRedundancy(manager, pool)
    source.catch_up([7])
    assert source.measure(7, np.array([1]), 1)[0] < 0.95
    manager.blocks = np.array([1, 2, 4, 5, 6, 7])
    source.catch_up([7])
    found = source.measure(7, np.arange(1, 6), 5)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert (found[1:] < 0.95).all()
    source.retired(7, np.array([4], np.int32))
    assert source.measure(7, np.array([1]), 1)[0] < 0.95
    source.forget(7)
    assert not source._index.num_pages(7)


def test_pages_of_several_requests_are_signed_together_and_in_parts(monkeypatch):
    """At most three pages at once: the second request's are cut, and each comes to its own request."""
    torch.manual_seed(0)
    pool, tables = torch.randn(12, 3, 2, 2, 4, 8), {3: [1, 2, 3], 5: [4, 5, 6, 7], 8: [9], 9: [10, 11]}
    pool[6, :, 1], pool[11, :, 1] = pool[4, :, 1], pool[2, :, 1]
    manager = Manager([], 0)
    manager.generated_pages = lambda request_id: (0, len(tables[request_id]), np.array(tables[request_id], np.int32))
    source, signed = ValueRedundancy(manager, pool), []
    sign = source._sign
    monkeypatch.setattr(signature_index, "PAGES_AT_ONCE", 3)
    monkeypatch.setattr(source, "_sign", lambda blocks: signed.append(blocks.tolist()) or sign(blocks))
    source.catch_up([3, 5, 8, 9])
    assert signed == [[1, 2, 3], [4, 5, 6], [7, 9, 10], [11]]
    alone = ValueRedundancy(manager, pool)
    for request_id, table in tables.items():
        alone.catch_up([request_id])
        pages = np.arange(len(table))
        expected = alone.measure(request_id, pages, 1)
        np.testing.assert_allclose(source.measure(request_id, pages, 1), expected, atol=1e-6)
    assert source.measure(5, np.array([0]), 1)[0] == pytest.approx(1.0, abs=1e-5)  # page 2 has its V
    assert source.measure(3, np.array([1]), 1)[0] < 0.95  # another request's page does not count
    signed.clear()
    source.catch_up([3, 5, 8, 9])
    assert not signed


def test_surprisal_of_a_page_adds_up_over_its_tokens():
    ledger = PageLedger(find_need("surprisal"), 4, 8, 0, None)

    class State:
        request_id, tokens = 3, [0] * 6

    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    for token in (0, 1, 1):
        ledger.observe_tokens([State], lambda token=token: token_log_probs(logits, [token]))
        State.tokens = [*State.tokens, token]
    ledger.catch_up([3])
    facts = ledger.facts(3, np.array([1, 2]), np.array([0, 0]), 2)
    np.testing.assert_allclose(facts.surprisal, [-np.log(0.5 * 0.25), -np.log(0.25)], rtol=1e-5)


def test_a_page_whose_token_an_error_lost_is_unknown():
    ledger = PageLedger(find_need("surprisal"), 4, 8, 0, None)

    class State:
        request_id, tokens = 3, [0] * 3

    for step in (lambda: torch.tensor([-1.0]), lambda: 1 / 0, lambda: torch.tensor([-2.0])):
        with suppress(ZeroDivisionError):
            ledger.observe_tokens([State], step)
        State.tokens = [*State.tokens, 1]
    ledger.catch_up([3])
    facts = ledger.facts(3, np.arange(2), np.zeros(2, int), 2)
    assert facts.surprisal[0] == 1.0
    assert np.isnan(facts.surprisal[1])  # the page of the second token and the third


def test_a_need_that_serving_cannot_follow_is_refused_with_those_that_it_can():
    with pytest.raises(
        UserError, match=r"does not measure recent_attention .*\(take random, age, .*redundancy"
    ) as error:
        PageLedger(find_need("recent-attention-redundancy"), 4, 3, 0, None)
    named = str(error.value).partition("(take ")[2].rstrip(")").split(", ")
    for need in named:
        assert make_config("pressure", need=need).need == need
    assert len(named) == len(get_args(MemShareConfig.model_fields["need"].annotation))


def test_attention_starts_anew_in_a_block_that_was_freed():
    ledger = PageLedger(find_need("attention-redundancy"), 4, 3, 0, None)
    generations, in_use = np.zeros(3, np.int32), np.ones(3, bool)
    ledger.observe_attention(np.array([0.5, 0.1, 0.0], np.float32), generations, in_use)
    generations[0] = 1
    ledger.observe_attention(np.array([0.2, 0.3, 0.0], np.float32), generations, in_use)
    facts = ledger.facts(0, np.array([5, 6]), np.array([0, 1]), 2)
    np.testing.assert_allclose(facts.attention, [0.2, 0.2], rtol=1e-6)


def test_a_block_that_lay_free_was_asked_nothing():
    """Block 0 was never used and block 1 was freed, long before they got pages."""
    ledger = PageLedger(find_need("attention-redundancy"), 4, 3, 0, None)
    generations, in_use = np.array([0, 1, 0], np.int32), np.array([False, False, True])
    for _ in range(50):
        ledger.observe_attention(np.array([0.0, 0.0, 0.5], np.float32), generations, in_use)
    in_use[:] = True
    for _ in range(2):
        ledger.observe_attention(np.array([0.5, 0.25, 0.5], np.float32), generations, in_use)
    facts = ledger.facts(0, np.array([5, 6, 7]), np.arange(3), 3)
    np.testing.assert_allclose(facts.attention, [0.5, 0.25, 0.5], rtol=1e-6)


def test_the_last_attention_of_an_owner_that_ended_is_not_the_next_ones():
    """Requests end before attention is observed: the block lies free by then, as of its new generation."""
    ledger = PageLedger(find_need("attention-redundancy"), 4, 1, 0, None)
    ledger.observe_attention(np.array([0.9], np.float32), np.array([1], np.int32), np.array([False]))
    ledger.observe_attention(np.array([0.2], np.float32), np.array([1], np.int32), np.array([True]))
    np.testing.assert_allclose(ledger.facts(0, np.array([5]), np.array([0]), 1).attention, [0.2], rtol=1e-6)


def test_attention_adds_up_again_in_a_block_that_was_freed():
    ledger = PageLedger(find_need("attention-redundancy"), 4, 2, 0, None)
    generations, in_use = np.array([1, 0], np.int32), np.ones(2, bool)
    for seen in (0.2, 0.6):
        ledger.observe_attention(np.full(2, seen, np.float32), generations, in_use)
    facts = ledger.facts(0, np.array([5, 6]), np.array([0, 1]), 2)
    np.testing.assert_allclose(facts.attention, [0.4, 0.4], rtol=1e-6)
