"""The published choice at a budget: distances of whole pages, and pairs, against definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtllm_memshare.search.nearest_page import page_distances, pair_with_earlier

LAYERS, HEADS, SIZE, DIM = 3, 2, 4, 8


def make_pool(dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(6, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(0))).to(dtype)


def by_hand(pool: torch.Tensor, one: int, other: int) -> float:
    """Number by number, in float64."""
    layers = []
    for layer in range(LAYERS):
        fields = []
        for field in (0, 1):
            first, second = (pool[block, layer, field].double().flatten().tolist() for block in (one, other))
            difference = sum((x - y) ** 2 for x, y in zip(first, second, strict=True))
            fields.append(math.sqrt(difference / ((sum(x * x for x in first) + sum(y * y for y in second)) / 2)))
        layers.append(max(fields))
    return sum(layers) / LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_distances_by_hand(dtype):
    pool = make_pool(dtype)
    found = page_distances(pool, torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0, 4, 5], dtype=torch.int32))
    assert found.shape == (2, 3)
    expected = [[by_hand(pool, one, other) for other in (0, 4, 5)] for one in (3, 1)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_copy_is_at_no_distance_and_scale_alone_tells_two_pages_apart():
    pool = make_pool()
    pool[1], pool[2], pool[3] = pool[0], 2 * pool[0], 0
    found = page_distances(pool, torch.tensor([0]), torch.tensor([1, 2, 3]))[0]
    assert found[0] < 2e-3  # the square root of what rounding leaves
    torch.testing.assert_close(found[1], torch.tensor(math.sqrt(1 / 2.5)))
    torch.testing.assert_close(found[2], torch.tensor(math.sqrt(2)))
    assert page_distances(pool, torch.tensor([3]), torch.tensor([3])).isnan().all()
    none = torch.zeros(0, dtype=torch.int64)
    assert page_distances(pool, none, torch.tensor([1])).shape == (0, 1)


def naive(distance, counts, max_aliases, limit):
    """The rule as nested loops: again and again the nearest allowed pair, the earliest of equal ones."""
    counts, there, pairs = list(counts), set(range(len(counts))), []
    while len(pairs) < limit:
        best = None
        for page in sorted(there):
            for other in sorted(there):
                allowed = other < page and counts[page] + counts[other] <= max_aliases
                near = distance[page][other]
                if allowed and math.isfinite(near) and (best is None or near < distance[best[0]][best[1]]):
                    best = page, other
        if best is None:
            break
        pairs.append(best)
        counts[best[1]] += counts[best[0]]
        there.remove(best[0])
    return pairs


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_aliases", [2, 5, 8])
def test_pairs_are_those_of_plain_loops_and_fewer_are_a_prefix(seed, max_aliases):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 14))
    distance = rng.integers(1, 9, (count, count)).astype(np.float32)  # ties, on purpose
    distance[rng.random((count, count)) < 0.1] = np.nan
    counts = rng.integers(1, 4, count)
    before = counts.copy()
    expected = naive(distance, counts, max_aliases, count)
    for limit in range(count + 2):
        assert pair_with_earlier(distance, counts, max_aliases, limit) == expected[:limit]
    assert (counts == before).all()
    along = [distance[pair] for pair in expected]
    assert along == sorted(along)


def test_what_a_page_stands_for_goes_with_it():
    distance = np.array([[0, 0, 0], [0.3, 0, 0], [0.9, 0.1, 0]], np.float32)
    ones = np.ones(3, np.int64)
    assert pair_with_earlier(distance, ones, 3, 3) == [(2, 1), (1, 0)]
    assert pair_with_earlier(distance, ones, 2, 3) == [(2, 1)]  # page 1 stands for two, and 0 would for three
    assert pair_with_earlier(distance, np.array([1, 2, 1]), 3, 3) == [(2, 1)]
