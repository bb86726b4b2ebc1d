"""The element-level arithmetic of the CUDA kernel, run on the host, against float64 and the PyTorch specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plugins.host_kernel import run_host_kernel
from search.float64_reference import block_distance_float64, relative_error
from tolerances import KERNEL_RELATIVE_ERROR

from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES

BLOCKS, LAYERS = 5, 2


def make_pool(dtype, heads=2, size=16, dim=64, seed=0):
    values = torch.randn(BLOCKS, LAYERS, 2, heads, size, dim, generator=torch.Generator().manual_seed(seed))
    return (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)


def frequencies(rotary_dim):
    return (1.0 / 1e6 ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))).float()


def make_pairs(pairs, size, largest_delta=32768, seed=1):
    """Shifted runs: new rows of one block, old rows that cross two, a few absent."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, (BLOCKS - 1) * size, (2, pairs, 1), generator=generator)
    new, old = (first + torch.arange(size)).int()
    absent = torch.rand(pairs, size, generator=generator) < 0.1
    delta = torch.randint(-largest_delta, largest_delta, (pairs, size), dtype=torch.int32, generator=generator)
    return torch.where(absent, -1, new).int(), torch.where(absent, -1, old).int(), delta


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in ELEMENT_TYPES], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(
    ("heads", "size", "dim", "rotary"),
    [(2, 16, 64, 64), (1, 8, 32, 32), (3, 32, 128, 64), (1, 16, 72, 36), (2, 8, 128, 0), (1, 128, 256, 256)],
)
def test_error_against_float64(host_kernel, dtype, interleaved, heads, size, dim, rotary):
    pool, inv_freq = make_pool(dtype, heads, size, dim), frequencies(rotary)
    new, old, delta = make_pairs(3, size)
    sums = run_host_kernel(host_kernel, pool, new, old, delta, inv_freq, interleaved)
    exact = block_distance_float64(pool, new, old, delta, inv_freq, interleaved)
    assert relative_error(sums, exact) < KERNEL_RELATIVE_ERROR
    reference = block_distance(pool, new, old, delta, inv_freq, interleaved)
    assert relative_error(reference, exact) < KERNEL_RELATIVE_ERROR


def test_position_differences_of_32k_at_the_fastest_frequency(host_kernel):
    pool, inv_freq = make_pool(torch.float32), torch.full((32,), 1.0)
    new, old, _ = make_pairs(4, 16)
    delta = torch.full_like(new, 32768)
    exact = block_distance_float64(pool, new, old, delta, inv_freq)
    assert relative_error(run_host_kernel(host_kernel, pool, new, old, delta, inv_freq), exact) < KERNEL_RELATIVE_ERROR


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "int8", "bfloat16"])
def test_every_finite_bit_pattern_is_decoded_exactly(host_kernel, dtype):
    """Rows of zeros but for one element, at every place of a 16-byte vector in turn: |V_new|^2 is its square."""
    bits = 16 if dtype in ("float16", "bfloat16") else 8
    patterns = torch.from_numpy(np.arange(2**bits, dtype=np.uint16 if bits == 16 else np.uint8).view(
        np.int16 if bits == 16 else np.int8))  # fmt: skip
    values = patterns.view(getattr(torch, dtype))
    keep = values.float().isfinite() & (values.float().abs() < 1e18)
    values = values[keep]
    dim, size = 32, 8
    count = -(-len(values) // size)
    pool = torch.zeros((count, 1, 2, 1, size, dim), dtype=torch.uint8 if bits == 8 else torch.int16)
    pool = pool.view(values.dtype)
    flat = torch.zeros(count * size, dtype=values.dtype)
    flat[: len(values)] = values
    for place in range(dim):
        turned = (torch.arange(count * size) % dim == place).view(count, size)
        stored = torch.where(turned, flat.view(torch.uint8 if bits == 8 else torch.int16).view(count, size), 0)
        pool.view(stored.dtype)[:, 0, 1, 0, :, place] = stored
    rows = torch.full((count * size, size), -1, dtype=torch.int32)
    rows[:, 0] = torch.arange(count * size)
    sums = run_host_kernel(host_kernel, pool, rows, rows, torch.zeros_like(rows), torch.zeros(0))
    assert torch.equal(sums[: len(values), 0, 3], values.float().square())


def test_rows_out_of_the_pool_are_nan_and_padding_is_zero(host_kernel):
    pool, inv_freq = make_pool(torch.float32), frequencies(64)
    new, old, delta = make_pairs(5, 16)
    new[0, 3] = BLOCKS * 16
    old[1, 0] = -2
    new[2, 5], old[2, 5] = -1, 7
    new[3] = old[3] = -1
    sums = run_host_kernel(host_kernel, pool, new, old, delta, inv_freq)
    assert torch.isnan(sums[:3]).all()
    assert torch.equal(sums[3], torch.zeros(LAYERS, 4))
    assert torch.isfinite(sums[4]).all()
    assert torch.equal(sums.isnan(), block_distance(pool, new, old, delta, inv_freq).isnan())


@pytest.mark.parametrize("pairs", [0, 1])
def test_no_pair_and_one_pair(host_kernel, pairs):
    pool, inv_freq = make_pool(torch.float16), frequencies(64)
    new, old, delta = make_pairs(pairs, 16)
    sums = run_host_kernel(host_kernel, pool, new, old, delta, inv_freq)
    assert sums.shape == (pairs, LAYERS, 4)
    assert relative_error(sums, block_distance_float64(pool, new, old, delta, inv_freq)) < KERNEL_RELATIVE_ERROR


def test_nan_in_the_pool_reaches_the_sums(host_kernel):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        pool = make_pool(dtype)
        pool[:, 1, 1, 0, :, 7] = float("nan")
        new, old, delta = make_pairs(1, 16)
        sums = run_host_kernel(host_kernel, pool, new, old, delta, frequencies(64))
        assert torch.isfinite(sums[0, 0]).all(), dtype
        assert torch.isnan(sums[0, 1, 2:]).all(), dtype
