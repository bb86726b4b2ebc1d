"""The choice by token and head: as many tokens as whole pages would hold, those with most attention, masked alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_memshare.evaluation.head_retirement import HeadChoicePass, HeadRetirements
from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.page_arms import Budget, retire
from trtllm_memshare.evaluation.retirement import NEVER

SIZE, TOKENS, PROMPT, PROTECTED = 8, 203, 11, 24
FIRST = -(-PROMPT // SIZE)
IDS = np.random.default_rng(5).integers(4, 60, TOKENS).tolist()


@pytest.fixture(scope="module")
def replay(tiny_checkpoint) -> MaskedReplay:
    return MaskedReplay(tiny_checkpoint)


@pytest.fixture(scope="module")
def full(replay):
    return replay.read(IDS, SIZE)


@pytest.fixture(scope="module")
def by_head(replay, full) -> HeadRetirements:
    return replay.choose_by_head(full, PROMPT, 0.5, PROTECTED)


def test_heads_that_all_give_up_the_same_pages_change_what_those_pages_do(replay, full):
    pages = retire("random", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 3)
    by_token = np.full(TOKENS, NEVER)
    by_token[: len(pages.retired_at) * SIZE] = np.repeat(pages.retired_at, SIZE)
    config = replay.model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, 1)
    heads = HeadRetirements(SIZE, np.tile(by_token, shape))
    assert heads.first == pages.first
    assert heads.retired_pages == pages.retired_pages >= 8
    assert heads.memory_share(FIRST) == pytest.approx(pages.memory_share(FIRST))
    ours, theirs = replay.change(full, heads), replay.change(full, pages)
    np.testing.assert_allclose(ours.loss, theirs.loss, atol=1e-5)
    np.testing.assert_allclose(ours.divergence, theirs.divergence, atol=1e-5)


def test_every_head_holds_as_much_as_whole_pages_would(full, by_head):
    pages = retire("streaming", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 3)
    for computed in range(FIRST * SIZE, TOKENS, SIZE):
        gone = (by_head.retired_at <= computed).sum(2)
        assert (gone == (pages.retired_at <= computed).sum() * SIZE).all()
    assert (by_head.retired_at[:, :, : FIRST * SIZE] == NEVER).all()
    positions = np.arange(TOKENS)
    assert ((by_head.retired_at == NEVER) | (by_head.retired_at >= positions + PROTECTED)).all()
    # Heads choose for themselves.
    assert len({tuple(head) for layer in by_head.retired_at for head in layer}) > 1


def test_the_tokens_with_least_attention_since_they_were_written_go():
    """Of two KV heads, whose queries like half of some tokens, and the other half."""
    rng = np.random.default_rng(0)
    choice = HeadChoicePass(40, 8, 8, 0.5, 8)
    liked = np.sort(rng.permutation(np.arange(16, 32))[:8])
    key = torch.zeros(2, 40, 4)
    key[0, liked, 0] = 5.0
    key[1, :, 0] = 5.0
    key[1, liked, 0] = 0.0
    query = torch.zeros(4, 40, 4)
    query[:, :, 0] = 1.0
    value = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    output = choice.attend(0, query, key, value)
    retired_at = choice.retirements().retired_at[0]
    # With 2 pages written the older one has to go whole; with 4, half of the two that are old.
    assert (retired_at[:, 8:16] == 24).all()
    assert np.array_equal(np.flatnonzero(retired_at[0] == 40), np.setdiff1d(np.arange(16, 32), liked))
    assert np.array_equal(np.flatnonzero(retired_at[1] == 40), liked)
    assert ((retired_at < NEVER).sum(1) == 16).all()
    weights = (query.view(2, 2, 40, 4) @ key[:, None].transpose(2, 3)).masked_fill(
        torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf")
    )
    torch.testing.assert_close(output, (weights.softmax(-1) @ value[:, None]).view(4, 40, 4))


def test_the_finest_choice_costs_less_than_random_pages(replay, full, by_head):
    """Even of a random model: what its queries do not look at changes little when it goes."""
    pages = retire("random", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 3)
    fine, coarse = replay.change(full, by_head), replay.change(full, pages)
    assert fine.divergence.mean() < coarse.divergence.mean()
