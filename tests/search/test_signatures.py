"""Signatures of tokens against their definition written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.signatures import K, V, fields_of_pool, make_projection, page_signatures

LAYERS, HEADS, SIZE, DIM = 6, 2, 8, 16
INV_FREQ = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])


def make_pool(blocks=5, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(blocks, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(pool, block, position, projection) -> list[list[float]]:
    """Token by token, layer by layer, head by head, number by number."""
    signatures = []
    for slot in range(SIZE):
        sums = [0.0] * projection.width
        for index, layer in enumerate(projection.layers.tolist()):
            for head in range(HEADS):
                row = pool[block, layer, projection.field, head, slot].double().tolist()
                if projection.field == K:
                    half = len(INV_FREQ)
                    angles = [-(position + slot) * w for w in INV_FREQ.double().tolist()]
                    first = [row[i] * math.cos(a) - row[i + half] * math.sin(a) for i, a in enumerate(angles)]
                    second = [row[i + half] * math.cos(a) + row[i] * math.sin(a) for i, a in enumerate(angles)]
                    row = first + second
                length = math.sqrt(sum(x * x for x in row))
                for i, x in enumerate(row):
                    for j in range(projection.width):
                        sums[j] += x / length * float(projection.matrix[index, head, i, j])
        length = math.sqrt(sum(x * x for x in sums))
        signatures.append([x / length for x in sums])
    return signatures


def sign(pool, block_ids, inv_freq, positions, projection):
    return page_signatures(fields_of_pool(pool, projection), block_ids, inv_freq, positions, projection)


@pytest.mark.parametrize("field", [K, V])
def test_signatures_by_hand(field):
    pool, projection = make_pool(), make_projection(LAYERS, HEADS, DIM, 4, field)
    assert projection.layers.tolist() == [1, 3, 5]
    found = sign(pool, torch.tensor([3, 1]), INV_FREQ, torch.tensor([40, 8]), projection)
    assert found.shape == (2, SIZE, 4)
    for index, (block, position) in enumerate(((3, 40), (1, 8))):
        torch.testing.assert_close(found[index], torch.tensor(by_hand(pool, block, position, projection)))


def test_the_projection_is_the_same_everywhere_and_takes_what_layers_there_are():
    first, again = (make_projection(30, 3, 64) for _ in range(2))
    assert first.layers.tolist() == [5, 15, 25]
    assert torch.equal(first.matrix, again.matrix)
    np.testing.assert_allclose(first.matrix[0, 0, 0, :3], [0.718607, 1.2122552, 0.3600815], rtol=1e-6)
    assert make_projection(1, 1, 8).layers.tolist() == [0]
    assert make_projection(2, 1, 8).layers.tolist() == [0, 1]


def test_equal_text_at_another_place_has_the_same_signature_of_k():
    pool, projection = make_pool(), make_projection(LAYERS, HEADS, DIM, field=K)
    pool[4] = pool[0]
    rows = pool[0, :, 0].permute(2, 0, 1, 3)[None]
    pool[4, :, 0] = rotate(rows, torch.full((1, SIZE), 320), INV_FREQ)[0].permute(1, 2, 0, 3)
    found = sign(pool, torch.tensor([0, 4]), INV_FREQ, torch.tensor([16, 336]), projection)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    as_stored = sign(pool, torch.tensor([0, 4]), INV_FREQ[:0], torch.tensor([16, 336]), projection)
    assert (as_stored[0] - as_stored[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_other_pools_are_read_as_the_numbers_that_they_hold(dtype):
    pool, projection = make_pool() * 20, make_projection(LAYERS, HEADS, DIM)
    held = pool.to(dtype)
    blocks, positions = torch.arange(5), torch.arange(5) * SIZE
    found = sign(held, blocks, INV_FREQ, positions, projection)
    assert torch.equal(found, sign(held.float(), blocks, INV_FREQ, positions, projection))
    scaled = sign(held.float() * 0.01, blocks, INV_FREQ, positions, projection)
    torch.testing.assert_close(found, scaled, rtol=1e-4, atol=1e-5)


def test_no_blocks_and_empty_rows_and_what_does_not_fit():
    pool, projection = make_pool(), make_projection(LAYERS, HEADS, DIM)
    none = torch.zeros(0, dtype=torch.int64)
    assert sign(pool, none, INV_FREQ, none, projection).shape == (0, SIZE, 64)
    zeros = sign(torch.zeros_like(pool), torch.tensor([1]), INV_FREQ, torch.tensor([0]), projection)
    assert not zeros.any()
    for block in (-1, 5):
        with pytest.raises(ValueError, match=rf"blocks must lie in \[0, 5\), got {block}"):
            sign(pool, torch.tensor([block]), INV_FREQ, torch.tensor([0]), projection)
    with pytest.raises(ValueError, match="the projection is for layers"):
        sign(pool, none, INV_FREQ, none, make_projection(30, HEADS, DIM))
