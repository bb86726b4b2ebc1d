"""The CUDA kernels with their grids, shuffles and barriers, run on the host, against float64 and the specification."""

from __future__ import annotations

import ctypes

import pytest
import torch
from plugins.kernels_on_host import compile_for_host, run_block_distance
from search.float64_reference import block_distance_float64, relative_error
from tolerances import KERNEL_RELATIVE_ERROR

from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, MAX_LAYERS_OF_BLOCK, KernelVariant, num_layer_groups

BLOCKS, LAYERS = 5, 2
SLOTS = 8  # blocks that the played device runs at a time, see cuda_runtime_api.h


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
    sums = run_block_distance(host_kernel, pool, new, old, delta, inv_freq, interleaved)
    exact = block_distance_float64(pool, new, old, delta, inv_freq, interleaved)
    assert relative_error(sums, exact) < KERNEL_RELATIVE_ERROR
    reference = block_distance(pool, new, old, delta, inv_freq, interleaved)
    assert relative_error(reference, exact) < KERNEL_RELATIVE_ERROR


def test_position_differences_of_32k_at_the_fastest_frequency(host_kernel):
    pool, inv_freq = make_pool(torch.float32), torch.full((32,), 1.0)
    new, old, _ = make_pairs(4, 16)
    delta = torch.full_like(new, 32768)
    exact = block_distance_float64(pool, new, old, delta, inv_freq)
    assert (
        relative_error(run_block_distance(host_kernel, pool, new, old, delta, inv_freq), exact) < KERNEL_RELATIVE_ERROR
    )


@pytest.mark.parametrize("vectors", [False, True], ids=["elements", "vectors"])
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "int8", "bfloat16"])
def test_every_bit_pattern_is_decoded_exactly(host_kernel, dtype, vectors):
    """At every place of a 16-byte vector in turn; NaN stays NaN."""
    bits = 16 if dtype in ("float16", "bfloat16") else 8
    patterns = torch.arange(2**bits).to(torch.int16 if bits == 16 else torch.int8)
    for place in range(16 if vectors else 1):
        elements = patterns.roll(place).view(getattr(torch, dtype))
        values = torch.full((len(elements),), -1.0)
        host_kernel.memshare_decode(
            ctypes.c_void_p(elements.data_ptr()), ctypes.c_void_p(values.data_ptr()), len(elements),
            ELEMENT_TYPES[dtype].code, int(vectors),
        )  # fmt: skip
        torch.testing.assert_close(values, elements.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("heads", "size", "dim", "rotary"), [(2, 16, 64, 64), (3, 64, 128, 64), (1, 16, 72, 36)])
def test_the_order_in_which_threads_run_changes_no_bit(host_kernel, dtype, heads, size, dim, rotary):
    """A missing barrier would show, see test_cuda_on_host."""
    pool, inv_freq = make_pool(dtype, heads, size, dim), frequencies(rotary)
    pairs = make_pairs(3, size)
    sums = run_block_distance(host_kernel, pool, *pairs, inv_freq)
    host_kernel.memshare_run_backwards(1)
    try:
        assert torch.equal(run_block_distance(host_kernel, pool, *pairs, inv_freq), sums)
    finally:
        host_kernel.memshare_run_backwards(0)


def test_a_block_takes_several_layers_where_pairs_are_many_and_no_bit_depends_on_it(host_kernel):
    """7 layers, on a device that runs 8 blocks at a time: groups of 1, of 2, of 4 and 3, of all; padding and an invalid
    row among the pairs."""
    generator = torch.Generator().manual_seed(5)
    pool = torch.randn(BLOCKS, 7, 2, 1, 8, 32, generator=generator).to(torch.bfloat16)
    new, old, delta = make_pairs(7, 8)
    new[3], old[3] = -1, -1
    new[5, 2] = BLOCKS * 8
    groups = {n: num_layer_groups(n, 7, SLOTS) for n in (1, 2, 4, 7)}
    assert groups == {1: 7, 2: 4, 4: 2, 7: 1}
    sums = {n: run_block_distance(host_kernel, pool, new[:n], old[:n], delta[:n], frequencies(32)) for n in groups}
    for count, part in sums.items():
        assert torch.equal(part[:1], sums[7][:1])
        torch.testing.assert_close(part, sums[7][:count], rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(sums[7][5]).all()
    assert torch.equal(sums[7][3], torch.zeros(7, 4))


def test_both_hosts_deal_out_layers_alike(host_kernel):
    for pairs in (1, 2, 27, 28, 29, 63, 64, 110, 192, 512, 4096, 1 << 20):
        for layers in (1, 2, 3, 5, 28, 32, 64, 4096):
            for slots in (1, SLOTS, 264, 528):
                groups = num_layer_groups(pairs, layers, slots)
                assert groups == host_kernel.memshare_num_layer_groups(pairs, layers, slots)
                assert -(-layers // groups) <= MAX_LAYERS_OF_BLOCK


def test_a_shape_that_no_kernel_takes_is_refused_and_blames_nobody_else(host_kernel):
    pool, inv_freq = make_pool(torch.float32), frequencies(64)
    pairs = make_pairs(1, 16)
    zero, pointer = ctypes.c_int(0), ctypes.c_void_p(pool.data_ptr())
    rows = [ctypes.c_void_p(t.data_ptr()) for t in pairs]
    out = torch.zeros(LAYERS, 4)
    for size, dim, dtype in ((4, 64, 0), (16, 33, 0), (16, 64, 9)):
        status = host_kernel.memshare_block_distance(
            pointer, BLOCKS, *rows, ctypes.c_void_p(inv_freq.data_ptr()), ctypes.c_void_p(out.data_ptr()), 1, LAYERS, 2,
            size, dim, 64, dtype, zero,
        )  # fmt: skip
        assert status == 1, (size, dim, dtype)
    assert relative_error(
        run_block_distance(host_kernel, pool, *pairs, inv_freq), block_distance_float64(pool, *pairs, inv_freq)
    ) < KERNEL_RELATIVE_ERROR  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "interleaved", "heads", "size", "dim", "rotary"),
    [("bfloat16", False, 2, 32, 64, 64), ("int8", True, 2, 64, 128, 64), ("float8_e4m3fn", False, 1, 8, 72, 36)],
)
def test_a_kernel_compiled_for_one_shape_gives_the_bits_of_the_one_for_any(
    host_kernel, tmp_path, dtype, interleaved, heads, size, dim, rotary
):
    """The form that NVRTC compiles, launched as the Python host would."""
    variant = KernelVariant(dtype, LAYERS, heads, size, dim, rotary, interleaved)
    library = compile_for_host(tmp_path, "block_distance_nvrtc.cpp", *(f"{n}={v}" for n, v in variant.macros))
    pool, inv_freq = make_pool(getattr(torch, dtype), heads, size, dim), frequencies(rotary)
    new, old, delta = make_pairs(3, size)
    new[1], old[1] = -1, -1
    out = torch.full((3, LAYERS, 4), -1.0)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (new, old, delta, inv_freq, out)]
    status = library.memshare_block_distance_variant(
        ctypes.c_void_p(pool.data_ptr()), BLOCKS, *addresses, 3, num_layer_groups(3, LAYERS, SLOTS), variant.num_threads
    )
    assert status == 0
    assert torch.equal(out, run_block_distance(host_kernel, pool, new, old, delta, inv_freq, interleaved))


def test_rows_out_of_the_pool_are_nan_and_padding_is_zero(host_kernel):
    pool, inv_freq = make_pool(torch.float32), frequencies(64)
    new, old, delta = make_pairs(5, 16)
    new[0, 3] = BLOCKS * 16
    old[1, 0] = -2
    new[2, 5], old[2, 5] = -1, 7
    new[3] = old[3] = -1
    sums = run_block_distance(host_kernel, pool, new, old, delta, inv_freq)
    assert torch.isnan(sums[:3]).all()
    assert torch.equal(sums[3], torch.zeros(LAYERS, 4))
    assert torch.isfinite(sums[4]).all()
    assert torch.equal(sums.isnan(), block_distance(pool, new, old, delta, inv_freq).isnan())


@pytest.mark.parametrize("pairs", [0, 1])
def test_no_pair_and_one_pair(host_kernel, pairs):
    pool, inv_freq = make_pool(torch.float16), frequencies(64)
    new, old, delta = make_pairs(pairs, 16)
    sums = run_block_distance(host_kernel, pool, new, old, delta, inv_freq)
    assert sums.shape == (pairs, LAYERS, 4)
    assert relative_error(sums, block_distance_float64(pool, new, old, delta, inv_freq)) < KERNEL_RELATIVE_ERROR


def test_nan_in_the_pool_reaches_the_sums(host_kernel):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        pool = make_pool(dtype)
        pool[:, 1, 1, 0, :, 7] = float("nan")
        new, old, delta = make_pairs(1, 16)
        sums = run_block_distance(host_kernel, pool, new, old, delta, frequencies(64))
        assert torch.isfinite(sums[0, 0]).all(), dtype
        assert torch.isnan(sums[0, 1, 2:]).all(), dtype
