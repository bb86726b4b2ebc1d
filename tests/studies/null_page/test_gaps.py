"""The gaps of the study: each query at its own place, against a product that is written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.studies.null_page.gaps import gaps_of, worst_by_part, worst_heads
from trtllm_memshare.engine.attention_queries import Queries
from trtllm_memshare.engine.null_page import NullPageSet

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def test_a_gap_is_the_logit_of_the_turned_query_less_all_real_ones():
    generator = torch.Generator().manual_seed(0)
    unrotated = torch.randn(LAYERS, HEADS, 3, HEAD_DIM, generator=generator)
    sums = torch.randn(LAYERS, HEADS, 3, generator=generator)
    keys = torch.randn(2, LAYERS, KV_HEADS, HEAD_DIM, generator=generator)
    pages = NullPageSet(keys, np.array([0, 300, 600], np.int32), torch.empty(0))
    inv_freq = 1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    positions = np.array([0, 5, 300])
    gaps = gaps_of(Queries(unrotated, sums, torch.zeros(LAYERS), 0.5, positions), pages, inv_freq)
    assert gaps.shape == (LAYERS, HEADS, 3)
    half = HEAD_DIM // 2
    for layer, head, n in np.ndindex(LAYERS, HEADS, 3):
        angle = positions[n] * inv_freq
        low, high = unrotated[layer, head, n, :half], unrotated[layer, head, n, half:]
        turned = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()])
        key = keys[int(positions[n] >= 300), layer, head // (HEADS // KV_HEADS)]  # 300 is the second band's first
        assert gaps[layer, head, n] == pytest.approx(float(turned @ key * 0.5 - sums[layer, head, n]), abs=1e-4)


def test_each_part_of_a_text_has_its_worst_gap():
    positions = np.array([16, 17, 99, 100, 101])
    gaps = torch.full((LAYERS, HEADS, 5), -50.0)
    gaps[1, 2, 2], gaps[0, 3, 3] = -30.0, -25.0
    assert worst_by_part(gaps, positions, [100]) == [
        {"end": 100, "worst_gap": -30.0},
        {"end": 102, "worst_gap": -25.0},
    ]


def test_worst_heads_come_first_with_the_length_of_their_own_key():
    gaps = torch.full((2, LAYERS, HEADS), -50.0)
    gaps[0, 1, 3], gaps[1, 0, 2] = -21.0, -25.0  # in different bands
    keys = torch.zeros(2, LAYERS, KV_HEADS, HEAD_DIM)
    keys[0, 1, 1, 0], keys[1, 0, 1, 0] = 7.0, 9.0
    pages = NullPageSet(keys, np.array([0, 64, 128], np.int32), gaps)
    assert worst_heads(pages, 2) == [
        {"layer": 1, "head": 3, "gap": -21.0, "length": 7.0},
        {"layer": 0, "head": 2, "gap": -25.0, "length": 9.0},
    ]
