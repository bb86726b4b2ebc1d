"""The CUDA search: what its host refuses, on every machine; what its kernel computes, where a GPU is."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from search.float64_reference import block_distance_float64, relative_error
from tolerances import KERNEL_RELATIVE_ERROR

from trtllm_memshare.search.block_search import make_block_search
from trtllm_memshare.search.cuda_block_distance import CudaBlockDistance, check_launch, check_pairs, check_pool
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, KernelVariant, kernel_source
from trtllm_memshare.search.types import PairBatch

BLOCKS, LAYERS, HEADS, SIZE, DIM = 7, 3, 2, 16, 64
INV_FREQ = (1.0 / 1e6 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)).float()


def make_pairs(count: int, undo_rope: bool = True, seed: int = 0, size: int = SIZE) -> PairBatch:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, (BLOCKS - 1) * size, (2, count, 1))
    new, old = (first + np.arange(size)).astype(np.int32)
    delta = rng.integers(-32768, 32768, (count, size)).astype(np.int32)
    return PairBatch(new, old, delta, undo_rope)


def tensors(pairs: PairBatch):
    return tuple(torch.from_numpy(a) for a in (pairs.new_rows, pairs.old_rows, pairs.position_delta))


def make_pool(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(2))
    return (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)


def changed(pairs: PairBatch, name: str, pair: int, token: int, value: int) -> PairBatch:
    array = getattr(pairs, name).copy()
    array[pair, token] = value
    return dataclasses.replace(pairs, **{name: array})


def test_rows_out_of_the_pool_and_rows_without_a_partner_are_refused_by_place():
    pairs = make_pairs(3)
    check_pairs(pairs, BLOCKS, SIZE)
    check_pairs(changed(changed(pairs, "new_rows", 1, 4, -1), "old_rows", 1, 4, -1), BLOCKS, SIZE)
    with pytest.raises(ValueError, match=r"old_rows\[2, 5\] must lie in the pool's rows 0..111 or be -1, got 112"):
        check_pairs(changed(pairs, "old_rows", 2, 5, BLOCKS * SIZE), BLOCKS, SIZE)
    with pytest.raises(ValueError, match=r"new_rows\[0, 0\] must lie in .* got -2"):
        check_pairs(changed(pairs, "new_rows", 0, 0, -2), BLOCKS, SIZE)
    with pytest.raises(ValueError, match=r"rows \[1, 3\] must both be -1 or neither, got -1 and \d+"):
        check_pairs(changed(pairs, "new_rows", 1, 3, -1), BLOCKS, SIZE)


def test_shapes_and_dtypes_of_rows_are_checked():
    pairs = make_pairs(3)
    with pytest.raises(ValueError, match=r"old_rows must be int32 .* = \[3, 16\], got int32 \[2, 16\]"):
        check_pairs(dataclasses.replace(pairs, old_rows=pairs.old_rows[:2]), BLOCKS, SIZE)
    with pytest.raises(ValueError, match=r"position_delta must be int32 .*, got int64 \[3, 16\]"):
        check_pairs(dataclasses.replace(pairs, position_delta=pairs.position_delta.astype(np.int64)), BLOCKS, SIZE)
    with pytest.raises(ValueError, match=r"new_rows must be int32 .* = \[3, 32\]"):
        check_pairs(pairs, BLOCKS, 32)


def test_pools_that_no_kernel_takes_are_refused():
    with pytest.raises(ValueError, match=r"must be \[num_blocks, .*\], got \[7, 3, 16\]"):
        check_pool(torch.zeros(7, 3, 16))
    with pytest.raises(ValueError, match=r"must be one of float32, .* got float64"):
        check_pool(torch.zeros(2, 1, 2, 1, 16, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        check_pool(torch.zeros(2, 1, 2, 1, 64, 16).transpose(-1, -2))
    with pytest.raises(ValueError, match="needs a pool on a CUDA device, got cpu"):
        check_pool(make_pool(torch.float16))


def test_the_reference_refuses_as_many_pairs_as_the_kernel_would():
    search = make_block_search(make_pool(torch.float32), INV_FREQ, max_pairs=2)
    assert search.compare(make_pairs(2)).read()[0].shape == (2, LAYERS, 4)
    with pytest.raises(ValueError, match="at most 2 pairs fit one search, got 3"):
        search.compare(make_pairs(3))


def test_tensors_that_the_kernel_cannot_take_by_address_are_refused():
    pool, (new, old, delta) = make_pool(torch.float32), tensors(make_pairs(3))
    sums = torch.zeros(3, LAYERS, 4)
    check_launch(pool, new, old, delta, sums)
    for name, changed_tensors, message in (
        ("old_rows", (new, old.long(), delta, sums), "got contiguous torch.int64"),
        ("new_rows", (new.T.contiguous().T, old, delta, sums), "got not contiguous torch.int32"),
        ("position_delta", (new, old, delta[:2], sums), r"on cpu, got contiguous torch.int32 \[2, 16\]"),
        ("distances", (new, old, delta, sums.double()), "got contiguous torch.float64"),
        ("distances", (new, old, delta, sums[:, :1]), "got not contiguous"),
        ("new_rows", (new.to("meta"), old, delta, sums), "on cpu, got .* on meta"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be contiguous .*({message})"):
            check_launch(pool, *changed_tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_block": 4}, "tokens_per_block must be between 8 and 128, got 4"),
        ({"head_dim": 288}, "head_dim must be even and between 32 and 256, got 288"),
        ({"head_dim": 65}, "head_dim must be even and between 32 and 256, got 65"),
        ({"rotary_dim": 130}, "rotary_dim must be even and at most head_dim 128, got 130"),
        ({"num_layers": 0}, "needs layers and KV heads, got 0 and 4"),
        ({"dtype": "float8_e5m2"}, "must be one of float32, float16, bfloat16, float8_e4m3fn, int8, got float8_e5m2"),
    ],
)
def test_variants_are_checked_before_anything_is_compiled(change, message):
    known = {"dtype": "bfloat16", "num_layers": 28, "num_kv_heads": 4, "tokens_per_block": 32, "head_dim": 128,
             "rotary_dim": 128}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        KernelVariant(**{**known, **change})


@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotary_dim", "interleaved", "vector", "threads"),
    [
        ("bfloat16", 128, 128, False, 8, 256),
        ("bfloat16", 64, 64, False, 8, 128),
        ("bfloat16", 72, 72, False, 1, 256),  # 36 does not divide into eights
        ("bfloat16", 80, 80, False, 8, 160),
        ("bfloat16", 128, 0, False, 8, 256),
        ("float8_e4m3fn", 64, 32, False, 16, 64),
        ("float8_e4m3fn", 64, 16, False, 1, 256),
        ("float32", 32, 24, False, 4, 128),
        ("float32", 32, 24, True, 4, 128),
    ],
)
def test_vectors_are_as_wide_as_rope_partners_allow(dtype, head_dim, rotary_dim, interleaved, vector, threads):
    variant = KernelVariant(dtype, 2, 2, 32, head_dim, rotary_dim, interleaved)
    assert (variant.vector_elements, variant.num_threads) == (vector, threads)


def test_the_source_stands_alone():
    source = kernel_source()
    assert "#include" not in source
    assert source.count("struct PoolShape {") == 1
    assert 'extern "C" __global__' in source


def cuda_search(dtype: torch.dtype, tmp_path, interleaved: bool = False):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool = make_pool(dtype).cuda()
    return pool, CudaBlockDistance(pool, INV_FREQ, max_pairs=8, interleaved=interleaved, cache_dir=tmp_path)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a pool: heads, tokens of a block, head_dim and rotary_dim."""

    heads: int
    size: int
    dim: int
    rotary: int


SHAPES = [
    Shape(2, 16, 64, 64),
    Shape(4, 32, 128, 128),
    Shape(3, 32, 128, 64),  # partial rotary
    Shape(1, 8, 72, 36),  # single elements
    Shape(1, 128, 256, 256),
    Shape(2, 64, 128, 0),  # no rotary at all
]


def compare_with_float64(shape: Shape, dtype: torch.dtype, interleaved: bool, cache_dir) -> None:
    """Every count of pairs gives the bits that the same pairs have among others, near the sums in float64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.randn(
        BLOCKS, LAYERS, 2, shape.heads, shape.size, shape.dim, generator=torch.Generator().manual_seed(3)
    )
    pool = (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)
    inv_freq = (1.0 / 1e6 ** (torch.arange(0, shape.rotary, 2, dtype=torch.float64) / max(1, shape.rotary))).float()
    search = CudaBlockDistance(pool.cuda(), inv_freq, max_pairs=8, interleaved=interleaved, cache_dir=cache_dir)
    pairs = make_pairs(8, size=shape.size)
    for pair, token in ((1, 0), (5, shape.size - 1)):
        pairs = changed(changed(pairs, "new_rows", pair, token, -1), "old_rows", pair, token, -1)
    first = search.compare(pairs).read()[0].copy()
    exact = block_distance_float64(pool, *tensors(pairs), inv_freq, interleaved)
    assert relative_error(first, exact) < KERNEL_RELATIVE_ERROR
    for count in (8, 3, 1):
        part = PairBatch(pairs.new_rows[:count], pairs.old_rows[:count], pairs.position_delta[:count])
        np.testing.assert_array_equal(search.compare(part).read()[0], first[:count])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in ELEMENT_TYPES], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_float64_and_bit_for_bit_with_itself(shape, dtype, interleaved, tmp_path):
    compare_with_float64(shape, dtype, interleaved, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in ELEMENT_TYPES], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_small_cases_for_the_sanitizer(shape, dtype, tmp_path):
    """Few and small: a sanitizer makes a kernel a hundred times slower. gpu_suite.sh picks them by this name."""
    compare_with_float64(shape, dtype, False, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_k_is_compared_as_stored_where_rope_is_not_undone(dtype, tmp_path):
    pool, search = cuda_search(dtype, tmp_path)
    pairs = make_pairs(8, undo_rope=False)
    exact = block_distance_float64(pool.cpu(), *tensors(pairs), INV_FREQ[:0])
    assert relative_error(search.compare(pairs).read()[0], exact) < KERNEL_RELATIVE_ERROR


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements(tmp_path):
    """4.3 GB of int8: a row's offset there does not fit 32 bits, signed or not."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layers, heads, size, dim = 28, 8, 32, 128
    block = layers * 2 * heads * size * dim
    blocks = (1 << 32) // block + 8
    if torch.cuda.mem_get_info()[0] < blocks * block + (2 << 30):
        pytest.skip(f"the pool takes {blocks * block / 1e9:.1f} GB, {torch.cuda.mem_get_info()[0] / 1e9:.1f} are free")
    pool = torch.zeros((blocks, layers, 2, heads, size, dim), dtype=torch.int8, device="cuda")
    assert pool[:-4].numel() > 1 << 32
    generator = torch.Generator(device="cuda").manual_seed(0)
    pool[-4:] = torch.randint(-100, 100, pool[-4:].shape, dtype=torch.int8, device="cuda", generator=generator)
    last = pool[-4:].cpu()
    slots = np.arange(size, dtype=np.int32)
    rows = np.stack([slots, size + slots, 2 * size + slots])
    delta = np.full_like(rows, 321)
    near = PairBatch(rows, rows[::-1] + 5, delta)
    far = PairBatch(rows + (blocks - 4) * size, near.old_rows + (blocks - 4) * size, delta)
    inv_freq = (1.0 / 1e6 ** (torch.arange(0, dim, 2) / dim)).float()
    sums = CudaBlockDistance(pool, inv_freq, max_pairs=4, cache_dir=tmp_path).compare(far).read()[0]
    exact = block_distance_float64(last, *tensors(near), inv_freq)
    assert relative_error(sums, exact) < KERNEL_RELATIVE_ERROR


@pytest.mark.gpu
def test_a_thread_that_torch_has_not_used_launches_too(tmp_path):
    """A new thread has no CUDA context, and the search hands its launch to the driver."""
    pool, search = cuda_search(torch.float16, tmp_path)
    pairs = make_pairs(4)
    expected = search.compare(pairs).read()[0].copy()
    inputs, sums = [t.cuda() for t in tensors(pairs)], torch.zeros(4, LAYERS, 4, device=pool.device)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(search.launch, *inputs, sums).result()
    torch.cuda.synchronize()
    np.testing.assert_array_equal(sums.cpu().numpy(), expected)


@pytest.mark.gpu
def test_results_of_the_last_search_survive_the_next(tmp_path):
    _, search = cuda_search(torch.bfloat16, tmp_path)
    batches = [make_pairs(8, seed=seed) for seed in range(2)]
    pending = [search.compare(pairs) for pairs in batches]
    sums = [p.read()[0].copy() for p in pending]
    assert not np.array_equal(*sums)
    for pairs, expected in zip(batches, sums, strict=True):
        np.testing.assert_array_equal(search.compare(pairs).read()[0], expected)


@pytest.mark.gpu
def test_inside_a_captured_graph_with_padding_and_a_row_out_of_the_pool(tmp_path):
    _, search = cuda_search(torch.float16, tmp_path)
    pairs = make_pairs(4)
    expected = search.compare(pairs).read()[0].copy()
    new_rows, old_rows, delta = (t.cuda() for t in tensors(pairs))
    new_rows[1], old_rows[1] = -1, -1
    new_rows[2, 7] = BLOCKS * SIZE
    distances = torch.full((4, LAYERS, 4), -1.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search.launch(new_rows, old_rows, delta, distances)
    for _ in range(2):
        distances.fill_(-1)
        graph.replay()
        got = distances.cpu().numpy()
        np.testing.assert_array_equal(got[[0, 3]], expected[[0, 3]])
        assert (got[1] == 0).all()
        assert np.isnan(got[2]).all()


@pytest.mark.gpu
def test_more_pairs_than_fit_are_refused(tmp_path):
    _, search = cuda_search(torch.float16, tmp_path)
    with pytest.raises(ValueError, match="at most 8 pairs fit one search, got 9"):
        search.compare(make_pairs(9))
    assert search.compare(make_pairs(0)).read()[0].shape == (0, LAYERS, 4)
