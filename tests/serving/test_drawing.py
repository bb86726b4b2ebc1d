"""Tokens drawn for many rows at once against the definition, row by row in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trtllm_memshare.serving import drawing
from trtllm_memshare.serving.drawing import Draw, draw_tokens

SETTINGS = [
    Draw(t, k, p, 0.0) for t, k, p in itertools.product((0.1, 0.6, 1.0, 3.0), (0, 1, 40, 600), (1.0, 0.95, 0.3, 1e-30))
]


def defined(logits: np.ndarray, draw: Draw) -> tuple[int, float]:
    """The token, and how far ``uniform`` is from a border between two."""
    scores = np.float64((logits - logits.max()) / np.float32(draw.temperature))
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order])
    if draw.top_k:
        weights[draw.top_k :] = 0
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    weights[(before >= draw.top_p) & (np.arange(len(weights)) > 0)] = 0
    order, weights = (order[weights > 0], weights[weights > 0]) if draw.cuts else (np.arange(len(logits)), None)
    if weights is None:
        weights = np.exp(scores)
    borders = np.cumsum(weights) / weights.sum()
    return int(order[np.searchsorted(borders, draw.uniform, "right")]), float(np.abs(borders - draw.uniform).min())


@pytest.mark.parametrize("spread", [0.5, 3.0])  # flat rows need more than the head, steep ones much less
def test_tokens_are_those_of_the_definition(spread):
    rng = np.random.default_rng(0)
    draws = [Draw(d.temperature, d.top_k, d.top_p, u) for d in SETTINGS for u in (0.0, *rng.random(3))]
    logits = torch.from_numpy(spread * rng.standard_normal((len(draws), 3000)).astype(np.float32))
    expected = [defined(row, draw) for row, draw in zip(logits.numpy(), draws, strict=True)]
    found = draw_tokens(logits, draws)
    wrong = [i for i, (token, margin) in enumerate(expected) if margin > 1e-6 and token != found[i]]
    assert wrong == []
    # A row's token is its own: alone it is the same, bit for bit.
    assert [draw_tokens(logits[i : i + 1], [draws[i]])[0] for i in range(0, len(draws), 7)] == found[::7]


def test_equal_logits_go_by_their_ids_wherever_the_head_ends(monkeypatch):
    monkeypatch.setattr(drawing, "_HEAD", 4)
    logits = torch.tensor([[0.0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    for top_k, uniform, token in ((3, 0.99, 3), (5, 0.99, 5), (7, 0.999, 0), (6, 0.0, 1)):
        assert draw_tokens(logits, [Draw(1.0, top_k, 1.0, uniform)]) == [token], top_k
    assert draw_tokens(torch.zeros(1, 10), [Draw(1.0, 0, 0.75, 0.999)]) == [7]


@pytest.mark.parametrize("draw", [Draw(1.0, 0, 1.0, 1 - 2**-53), Draw(1.0, 3, 0.9, 1 - 2**-53), Draw(1.0, 0, 1.0, 0.0)])
def test_a_token_without_probability_is_never_drawn(draw):
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 3], logits[0, 5] = 2.0, 1.0
    assert draw_tokens(logits, [draw])[0] in (3, 5)


def test_extreme_temperatures_neither_overflow_nor_change_the_order():
    logits = torch.tensor([[3e38, -3e38, 0.0], [1.0, 2.0, 1.5]])
    assert draw_tokens(logits, [Draw(1e-39, 0, 1.0, 0.5), Draw(1e-39, 2, 0.5, 0.9)]) == [0, 1]
    assert draw_tokens(logits[1:], [Draw(1e30, 0, 1.0, 0.99)]) == [2]
