"""The specification of stage 2: its properties, and a plain loop beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtllm_memshare.search.block_distance import DK, DV, K_NEW, V_NEW, block_distance, relative_distances, rotate

BLOCKS, LAYERS, HEADS, SIZE, DIM = 6, 3, 2, 8, 16
INV_FREQ = 1.0 / 10000 ** (torch.arange(0, DIM, 2).float() / DIM)


@pytest.fixture
def pool():
    return torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(0))


def rows(*blocks):
    return torch.stack([torch.arange(SIZE, dtype=torch.int32) + b * SIZE for b in blocks])


def naive(pool, new, old, delta, inv_freq):
    """The contract as loops over scalars, in float64."""
    half, out = len(inv_freq), np.zeros((len(new), LAYERS, 4))
    data = pool.double().numpy()
    for p in range(len(new)):
        for n, o, d in zip(new[p].tolist(), old[p].tolist(), delta[p].tolist(), strict=True):
            if n == -1 and o == -1:
                continue
            for layer in range(LAYERS):
                for head in range(HEADS):
                    k_new, v_new = (data[n // SIZE, layer, f, head, n % SIZE] for f in (0, 1))
                    k_old, v_old = (data[o // SIZE, layer, f, head, o % SIZE].copy() for f in (0, 1))
                    for i in range(half):
                        a = d * float(inv_freq[i])
                        x, y = k_old[i], k_old[i + half]
                        k_old[i], k_old[i + half] = (
                            x * math.cos(a) - y * math.sin(a),
                            y * math.cos(a) + x * math.sin(a),
                        )
                    out[p, layer] += [
                        ((k_new - k_old) ** 2).sum(),
                        (k_new**2).sum(),
                        ((v_new - v_old) ** 2).sum(),
                        (v_new**2).sum(),
                    ]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("rotary", [0, DIM // 4, DIM // 2])
def test_equals_plain_loops_with_absent_rows_and_mixed_blocks(pool, rotary):
    new, old = rows(0, 3), rows(1, 2)
    new[0, :3] = old[0, :3] = -1
    old[1, 5] = 40
    delta = torch.randint(-3000, 3000, (2, SIZE), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    expected = naive(pool, new, old, delta, INV_FREQ[:rotary])
    torch.testing.assert_close(block_distance(pool, new, old, delta, INV_FREQ[:rotary]), expected, rtol=2e-5, atol=1e-5)


def test_a_block_is_at_distance_zero_from_itself_and_of_its_rotated_copy(pool):
    delta = torch.full((1, SIZE), 417, dtype=torch.int32)
    k = pool[2, :, 0].permute(2, 0, 1, 3)[None]
    pool[4] = pool[2]
    pool[4, :, 0] = rotate(k, delta, INV_FREQ)[0].permute(1, 2, 0, 3)
    none = torch.zeros_like(delta)
    assert block_distance(pool, rows(2), rows(2), none, INV_FREQ)[..., [DK, DV]].abs().max() == 0
    sums = block_distance(pool, rows(4), rows(2), delta, INV_FREQ)
    assert relative_distances(sums.numpy()).max() < 1e-5
    as_stored = block_distance(pool, rows(4), rows(2), delta, INV_FREQ[:0])
    assert relative_distances(as_stored.numpy())[..., 0].min() > 0.5


def test_rotation_composes_and_undoes_itself():
    k = torch.randn(2, SIZE, LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    delta = torch.randint(0, 30000, (2, SIZE), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(rotate(rotate(k, delta, INV_FREQ), -delta, INV_FREQ), k, rtol=1e-5, atol=1e-5)


def test_a_row_outside_the_pool_makes_its_pair_nan_and_no_other(pool):
    new, old = rows(0, 1, 2), rows(3, 4, 5)
    new[1, 0] = BLOCKS * SIZE
    old[2, 7] = -2
    sums = block_distance(pool, new, old, torch.zeros_like(new), INV_FREQ)
    assert torch.isfinite(sums[0]).all()
    assert torch.isnan(sums[1:]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_there_read_nothing_of_the_block_that_stands_in_for_them(pool, value):
    new, old = rows(1), rows(2)
    new[0, :3] = old[0, :3] = -1
    expected = block_distance(pool, new, old, torch.zeros_like(new), INV_FREQ)
    pool[0] = value
    assert torch.equal(block_distance(pool, new, old, torch.zeros_like(new), INV_FREQ), expected)


@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_sizes_and_norms(pool, pairs):
    index = torch.arange(pairs) % BLOCKS
    new = rows(*index.tolist()) if pairs else torch.zeros((0, SIZE), dtype=torch.int32)
    sums = block_distance(pool, new, new, torch.zeros_like(new), INV_FREQ)
    assert sums.shape == (pairs, LAYERS, 4)
    for p, block in enumerate(index.tolist()):
        torch.testing.assert_close(sums[p, :, K_NEW], pool[block, :, 0].square().sum((1, 2, 3)))
        torch.testing.assert_close(sums[p, :, V_NEW], pool[block, :, 1].square().sum((1, 2, 3)))


def test_shapes_that_differ_are_refused(pool):
    with pytest.raises(ValueError, match=r"must share one shape .* got \[1, 8\], \[2, 8\] and \[1, 8\]"):
        block_distance(pool, rows(0), rows(0, 1), rows(0), INV_FREQ)
