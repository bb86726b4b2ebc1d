"""Decode in Triton against float64, on the CPU through Triton's interpreter, or compiled where a GPU is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from runners.test_flashinfer_decode import FakeGraph, step_batch
from runners.test_torch_runner import SIZE, batch_of, make_manager
from tolerances import DECODE_ERROR, SAME_LOGITS

from trtllm_memshare.cache.offsets import hide_blocks
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.page_lists import PageLists, list_pages
from trtllm_memshare.runners.torch.paged_decode import choose_decode
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA, and for Linux only")
from trtllm_memshare.runners.torch import paged_decode, triton_decode
from trtllm_memshare.runners.torch.triton_decode import (
    TritonDecode,
    num_rows,
    num_splits,
    shared_bytes,
    tokens_a_turn,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with numpy, which knows no bf16.
DTYPES = list(DECODE_ERROR) if DEVICE == "cuda" else ["float32", "float16"]
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_decode, "_ENOUGH_PROGRAMS", 24)


def make_pool(dtype, num_layers=2, num_kv_heads=2, tokens=16, dim=64) -> torch.Tensor:
    shape = (9, num_layers, 2, num_kv_heads, tokens, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)


def exact(pool, layer, query, pages: PageLists, scaling) -> torch.Tensor:
    """Attention in float64, each entry of a list with its weight."""
    out = torch.empty(query.shape, dtype=torch.float64)
    tokens, group = pool.shape[4], query.shape[1] // pool.shape[3]
    for row, last in enumerate(pages.last_page_len.tolist()):
        part = slice(pages.indptr[row], pages.indptr[row + 1])
        blocks = torch.from_numpy(pages.indices[part].astype(np.int64))
        length = (len(blocks) - 1) * tokens + last
        k, v = (pool[:, layer, f].cpu().double()[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for f in range(2))
        weight = torch.from_numpy(pages.log_counts[part]).double().repeat_interleave(tokens)[:length]
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        scores = (k @ query[row].cpu().double()[:, :, None])[..., 0] * scaling + weight
        out[row] = (scores.softmax(-1)[:, None] @ v)[:, 0]
    return out


def lists(*requests: tuple[list[int], int], counts: dict[int, int] | None = None) -> PageLists:
    pages = [block for blocks, _ in requests for block in blocks]
    indptr = np.cumsum([0, *(len(blocks) for blocks, _ in requests)])
    weights = np.log([(counts or {}).get(block, 1) for block in pages]).astype(np.float32)
    last = np.array([last for _, last in requests], np.int32)
    return PageLists(indptr.astype(np.int32), np.array(pages, np.int32), weights, last)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "tokens", "dim"), [(2, 3, 16, 64), (1, 7, 32, 128), (4, 1, 8, 16), (1, 2, 128, 16)]
)
def test_against_float64(name, num_kv_heads, group, tokens, dim):
    """Requests of one page, of a partial one, and of more pages than a program takes in a turn, or of longer ones."""
    dtype, tolerance = getattr(torch, name), DECODE_ERROR[name]
    pool = make_pool(dtype, 2, num_kv_heads, tokens, dim)
    compute = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    query = torch.randn(3, num_kv_heads * group, dim, generator=torch.Generator().manual_seed(1)).to(compute).to(DEVICE)
    pages = lists(([4], tokens), ([2], 3), ([*range(9), 3, 3, 8, 1, 0, 7], tokens - 1), counts={5: 3})
    decode = TritonDecode(pool, num_kv_heads * group, compute)
    decode.plan(pages, 0.3)
    for layer in range(2):
        got = decode.attend(layer, query).cpu().double()
        torch.testing.assert_close(got, exact(pool, layer, query, pages, 0.3), rtol=tolerance, atol=tolerance)


def test_few_requests_are_cut_into_parts_and_many_are_not(monkeypatch):
    pool = make_pool(torch.float32, num_kv_heads=1, tokens=8, dim=16)
    query = torch.randn(30, 1, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pages = lists(*([([i % 9, 3, 5], 1 + i % 8) for i in range(30)]))
    whole, parts = TritonDecode(pool, 1, torch.float32), TritonDecode(pool, 1, torch.float32)
    monkeypatch.setattr(triton_decode, "_ENOUGH_PROGRAMS", 24)
    whole.plan(pages, 1.0)
    parts.plan(lists(([1, 3, 5], 2)), 1.0)
    out = whole.attend(1, query)
    torch.testing.assert_close(parts.attend(1, query[1:2]), out[1:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.cpu().double(), exact(pool, 1, query, pages, 1.0), rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    assert [num_splits(n) for n in (0, 1, 4, 264, 265, 528, 4096)] == [64, 64, 64, 2, 1, 1, 1]


def test_a_page_that_no_list_names_is_not_read():
    """NaN in a null page and in an evicted one; an alias counts as often as it is named and is read once."""
    pool = make_pool(torch.float32, num_layers=3, num_kv_heads=1, tokens=SIZE, dim=16)
    pool[[0, 6]] = float("nan")
    batch = step_batch([[4, 0, 7, 7, 7, 2], [0, None, 5]], [5 * SIZE + 3, 3 * SIZE])
    batch = dataclasses.replace(batch, block_offsets=hide_blocks(batch.block_offsets, [0], 3))
    pages = list_pages(batch, 3, SIZE, fold=True)
    assert sorted(pages.indices[: pages.indptr[1]].tolist()) == [2, 4, 7]
    assert pages.indices[pages.indptr[1] - 1] == 2
    query = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    decode = TritonDecode(pool, 2, torch.float32)
    decode.plan(pages, 0.5)
    once = decode.attend(0, query)
    decode.plan(list_pages(batch, 3, SIZE), 0.5)
    assert torch.isfinite(once).all()
    torch.testing.assert_close(decode.attend(0, query), once, rtol=1e-5, atol=1e-6)


def test_buffers_of_a_captured_step_keep_their_place():
    pool = make_pool(torch.float32)
    decode = TritonDecode(pool, 4, torch.float32, fixed_batch=2, max_pages=5)
    places = [buffer.data_ptr() for buffer in decode._buffers]
    query = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for pages in (lists(([1, 2, 3], 4), ([5, 6], 1)), lists(([7], 2), ([8], 16))):
        decode.plan(pages, 0.2)
        torch.testing.assert_close(
            decode.attend(1, query).cpu().double(), exact(pool, 1, query, pages, 0.2), rtol=1e-5, atol=1e-6
        )
    assert [buffer.data_ptr() for buffer in decode._buffers] == places
    with pytest.raises(ValueError, match="a captured step has 2 requests and at most 5 pages, got 2 and 6"):
        decode.plan(lists(([1, 2, 3], 4), ([5, 6, 7], 1)), 0.2)


def test_the_runner_with_triton_gives_the_logits_of_pytorch(tmp_path):
    """Mixed and pure decode steps, without graphs and with them."""
    model = load_model(write_random_checkpoint(tmp_path, "qwen3", head_dim=32), DEVICE)  # a search takes no smaller one
    graph = {} if DEVICE == "cuda" else {"new_graph": FakeGraph}
    runners = [
        TorchRunner(model, 40, SIZE, decode="pytorch"),
        TorchRunner(model, 40, SIZE, decode="triton", use_graphs=False),
        TorchRunner(model, 40, SIZE, decode="triton", **graph),
    ]
    assert runners[1].decode_description.startswith("Triton ")
    assert runners[2].decode_description.endswith("CUDA graphs for pure decode steps")
    rng = np.random.default_rng(0)
    tokens = {i: rng.integers(4, 70, n) for i, n in enumerate((40, 23, 31))}
    managers = [make_manager(r) for r in runners]
    for request, ids in tokens.items():
        for manager in managers:
            assert manager.add_sequence(request, ids.astype(np.int32))
    for requests, lengths, chunks, contexts in [
        ([0, 1, 2], [30, 20, 28], [30, 20, 28], 3),
        ([2, 0, 1], [29, 31, 21], [1, 1, 1], 0),
        ([2, 0], [31, 32], [2, 1], 1),
    ]:
        expected, *others = [
            runner.step(runner.prepare(batch_of(manager, requests, lengths, chunks, tokens, contexts))).logits
            for runner, manager in zip(runners, managers, strict=True)
        ]
        for logits in others:
            torch.testing.assert_close(logits, expected, **SAME_LOGITS)


def test_what_attends_is_chosen_and_said():
    pool = make_pool(torch.bfloat16)
    with pytest.raises(UserError, match=r"unknown decode attention tritom \(did you mean triton"):
        choose_decode(pool, 4, torch.bfloat16, "tritom")
    assert choose_decode(pool, 4, torch.bfloat16, "pytorch").make is None
    assert choose_decode(pool, 4, torch.bfloat16, "triton").reads_once
    odd = make_pool(torch.bfloat16, dim=48)
    with pytest.raises(UserError, match=r"triton cannot run: Triton takes powers of two .* got 16 and 48"):
        choose_decode(odd, 4, torch.bfloat16, "triton")
    with pytest.raises(UserError, match="takes no int8 pool"):
        choose_decode(make_pool(torch.int8), 4, torch.bfloat16, "triton")
    if DEVICE == "cpu":
        assert choose_decode(pool, 4, torch.bfloat16).description == "PyTorch (the pool is on cpu)"


class OnCuda(torch.Tensor):
    """A pool that says it is on a GPU."""

    @property
    def is_cuda(self):
        return True


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "there", "reason"),
    [
        (torch.bfloat16, 256, (8, 9), 99, None),
        (torch.float32, 256, (12, 0), 99, None),
        (torch.float32, 512, (7, 5), 64, "needs 98 KiB of shared memory at head_dim 512, got 64"),
        (torch.float32, 1024, (8, 9), 99, "needs 194 KiB of shared memory at head_dim 1024, got 99"),
        (torch.float32, 1024, (9, 0), 227, None),
        (torch.float8_e4m3fn, 64, (8, 0), 163, "reads fp8 e4m3 from sm_89 on, got sm_80"),
        (torch.float8_e4m3fn, 64, (8, 9), 99, None),
    ],
)
def test_a_card_that_cannot_hold_a_turn_gets_another_attention(monkeypatch, dtype, dim, capability, there, reason):
    """Triton itself would say it at the first step, inside a request."""
    properties = types.SimpleNamespace(shared_memory_per_block_optin=there << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(paged_decode, "find_flashinfer", lambda *_: (None, "FlashInfer is not there"))
    pool = torch.zeros(2, 1, 2, 1, 128, dim, dtype=dtype).as_subclass(OnCuda)
    compute = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    kind = choose_decode(pool, 4, compute)
    if reason is None:
        assert kind.description.startswith("Triton ")
    else:
        assert kind.make is None
        assert kind.description.startswith("PyTorch (FlashInfer is not there; Triton")
        assert reason in kind.description


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from trtllm_memshare.runners.torch.triton_decode import _attend_part, _join_parts

def compiled(kernel, types, sizes, arch):
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in sizes.items()}
    # As a launch finds them: addresses and offsets are multiples of 16, which decides what is staged.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind != "fp32"}
    signature = dict(zip(names, [*types, *["constexpr"] * len(sizes)]))
    made = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32))
    return made.metadata.shared, len(made.asm["cubin"])

for case in sys.argv[1:]:
    query, pool, *numbers = case.split(",")
    splits, group, rows, tokens, dim, turn, arch = map(int, numbers)
    types = f"*{query} *{pool} *i32 *i32 *fp32 *i32 *{query} *fp32 *fp32 i32 i32 i32 fp32".split()
    sizes = dict(SPLITS=splits, KV_HEADS=4, GROUP=group, ROWS=rows, TOKENS=tokens, DIM=dim, TURN=turn)
    print(*compiled(_attend_part, types, sizes, arch))
print(*compiled(_join_parts, ["*fp32", "*fp32", "*bf16"], dict(SPLITS=8, PADDED=8, DIM=128), 90))
"""
BYTES = {"fp32": 4, "bf16": 2, "fp8e4nv": 1}
COMPILED = [  # query, pool, splits, group, tokens, dim, architecture
    ("bf16", "bf16", 1, 7, 32, 128, 90),
    ("bf16", "fp8e4nv", 8, 7, 32, 128, 90),
    ("bf16", "bf16", 8, 64, 16, 128, 100),
    ("bf16", "bf16", 8, 4, 128, 256, 80),
    ("bf16", "fp8e4nv", 8, 8, 128, 256, 89),
    ("fp32", "fp32", 8, 4, 128, 256, 120),
    ("fp32", "fp32", 8, 20, 16, 128, 80),
    ("fp32", "bf16", 8, 3, 64, 64, 90),
]


@pytest.fixture(scope="module")
def shared_memory(tmp_path_factory) -> dict:
    """Case -> bytes of shared memory of a block, and the bytes that were reckoned; one process compiles them all."""
    reckoned, arguments = [], []
    for query, pool, splits, group, tokens, dim, arch in COMPILED:
        rows, sizes = num_rows(group), (BYTES[query], BYTES[pool])
        turn = tokens_a_turn(dim, rows, *sizes)
        reckoned.append(shared_bytes(turn, dim, rows, *sizes))
        arguments.append(",".join(map(str, (query, pool, splits, group, rows, tokens, dim, turn, arch))))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert all(cubin > 0 for _, cubin in lines)
    return {case: (shared, limit) for case, (shared, _), limit in zip(COMPILED, lines, reckoned, strict=False)}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
def test_the_kernels_compile_without_a_gpu_and_fit_the_smallest_shared_memory(shared_memory, case):
    shared, reckoned = shared_memory[case]
    assert shared <= reckoned <= 99 << 10
