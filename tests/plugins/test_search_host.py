"""The host side of the CUDA search, with a device that the host plays: staging, turns, streams, threads.

The kernel is its host build, called by the addresses that a launch is given. What a GPU does with them is tested where
there is one (``tests/search/test_cuda_block_distance.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from search.float64_reference import relative_error
from tolerances import KERNEL_RELATIVE_ERROR

from trtllm_memshare.search import block_search, cuda_block_distance
from trtllm_memshare.search.block_distance import block_distance, pairs_on
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, num_layer_groups
from trtllm_memshare.search.types import PairBatch

BLOCKS, LAYERS, HEADS, SIZE, DIM = 7, 3, 2, 16, 64
MULTIPROCESSORS, RESIDENT = 4, 2  # of the played device
INV_FREQ = (1.0 / 1e4 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)).float()


class PlayedDevice:
    """``cuda.core``'s launch over the host kernel, and a record of what was asked of it."""

    def __init__(self, library) -> None:
        self._library = library
        self.bound, self.wrapped, self.handle, self.compiled = 0, [], 0, []
        self.Stream = SimpleNamespace(from_handle=lambda handle: self.wrapped.append(handle) or f"stream {handle}")
        self.LaunchConfig = SimpleNamespace

    def Device(self, index):
        return SimpleNamespace(set_current=self._bind)

    def _bind(self) -> None:
        self.bound += 1

    def compile(self, variant, arch, cache_dir):
        self.compiled.append((variant.rotary_dim, arch))
        occupancy = SimpleNamespace(max_active_blocks_per_multiprocessor=lambda threads, shared: RESIDENT)
        return SimpleNamespace(get_kernel=lambda name: SimpleNamespace(variant=variant, occupancy=occupancy))

    def launch(self, stream, config, kernel, pool, num_blocks, new_rows, old_rows, delta, inv_freq, distances):
        variant = kernel.variant
        assert stream == f"stream {self.handle}"
        count, groups = config.grid
        assert groups == num_layer_groups(count, variant.num_layers, MULTIPROCESSORS * RESIDENT)
        assert config.block == variant.num_threads
        read = lambda kind, address: kind.from_address(address).value  # noqa: E731
        status = self._library.memshare_block_distance(
            ctypes.c_void_p(read(ctypes.c_longlong, pool)), read(ctypes.c_int, num_blocks),
            *(ctypes.c_void_p(a) for a in (new_rows, old_rows, delta, inv_freq, distances)), count, variant.num_layers,
            variant.num_kv_heads, variant.tokens_per_block, variant.head_dim, variant.rotary_dim,
            ELEMENT_TYPES[variant.dtype].code, int(variant.interleaved),
        )  # fmt: skip
        assert status == 0


class PlayedEvent:
    def __init__(self, **_) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other) -> float:
        return 2.0


@pytest.fixture
def device(host_kernel, monkeypatch):
    played = PlayedDevice(host_kernel)
    monkeypatch.setattr(cuda_block_distance, "check_pool", lambda pool: None)
    monkeypatch.setattr(cuda_block_distance, "import_cuda_core", lambda: played)
    monkeypatch.setattr(cuda_block_distance, "compile_variant", played.compile)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=played.handle))
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    return played


@pytest.fixture
def search(device):
    pool = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(2))
    return cuda_block_distance.CudaBlockDistance(pool, INV_FREQ, max_pairs=8)


def pairs_of(count: int, seed: int, undo_rope: bool = True) -> PairBatch:
    rng = np.random.default_rng(seed)
    new, old = (rng.integers(0, (BLOCKS - 1) * SIZE, (2, count, 1)) + np.arange(SIZE)).astype(np.int32)
    return PairBatch(new, old, rng.integers(-999, 999, (count, SIZE)).astype(np.int32), undo_rope)


def expected(search, pairs: PairBatch) -> np.ndarray:
    inv_freq = INV_FREQ if pairs.undo_rope else INV_FREQ[:0]
    return block_distance(search._pool, *pairs_on(torch.device("cpu"), pairs), inv_freq).double().numpy()


def test_searches_of_any_size_in_turn_give_the_sums_of_the_specification(search, device):
    """Two are under way at a time; fewer pairs than fit take the front of the buffers."""
    batches = [pairs_of(count, seed) for seed, count in enumerate((8, 3, 0, 1, 8))]
    pending = []
    for index, pairs in enumerate(batches):
        pending.append(search.compare(pairs))
        for late in range(max(0, index - 1), index + 1):
            sums, seconds = pending[late].read()
            assert relative_error(sums, expected(search, batches[late])) < KERNEL_RELATIVE_ERROR
            assert seconds == pytest.approx(2e-3)
    assert device.compiled == [(DIM, "sm_90")]


def test_k_as_stored_takes_a_kernel_of_its_own(search, device):
    for undo_rope in (True, False, True):
        pairs = pairs_of(4, 3, undo_rope)
        assert relative_error(search.compare(pairs).read()[0], expected(search, pairs)) < KERNEL_RELATIVE_ERROR
    assert device.compiled == [(DIM, "sm_90"), (0, "sm_90")]


def test_a_stream_is_wrapped_once_and_a_thread_bound_once(search, device):
    for device.handle in (0, 77, 0, 77):
        search.compare(pairs_of(2, 0)).read()
    assert device.wrapped == [0, 77]
    assert device.bound == 1
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            thread.submit(search.compare, pairs_of(2, 0)).result()
    assert device.bound == 2


class OnCuda(torch.Tensor):
    """A pool that says it is on a GPU."""

    @property
    def is_cuda(self):
        return True


class DriverError(Exception):
    """As ``cuda.core``'s, whose type is private and derives from nothing else."""


def test_both_kernels_are_compiled_before_the_first_search(device):
    pool = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(2))
    search = block_search.make_block_search(pool.as_subclass(OnCuda), INV_FREQ, max_pairs=8)
    assert search.description == "CUDA kernel for sm_90, compiled by NVRTC"
    assert device.compiled == [(DIM, "sm_90"), (0, "sm_90")]
    search.compare(pairs_of(2, 0)).read()
    assert len(device.compiled) == 2


@pytest.mark.parametrize("fault", ["compile", "undo_rope", "source", "load"])
def test_a_kernel_that_cannot_be_compiled_or_loaded_leaves_the_search_to_pytorch(device, monkeypatch, caplog, fault):
    """At the start and with a warning: in a step it would end requests."""
    working = device.compile

    def compile_variant(variant, arch, cache_dir):
        if fault == "compile" or (fault == "undo_rope" and not variant.rotary_dim):
            raise RuntimeError(f"block_distance does not compile for {arch}: invalid architecture")
        if fault == "source":
            raise FileNotFoundError(2, "No such file or directory", "block_distance.cuh")
        code = working(variant, arch, cache_dir)
        if fault == "load":
            code.get_kernel = refuse
        return code

    def refuse(name):
        raise DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")

    monkeypatch.setattr(cuda_block_distance, "compile_variant", compile_variant)
    pool = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(2))
    search = block_search.make_block_search(pool.as_subclass(OnCuda), INV_FREQ, max_pairs=8)
    said = {
        "source": "[Errno 2] No such file or directory: 'block_distance.cuh'",
        "load": "block_distance for sm_90 cannot be loaded: CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available",
    }.get(fault, "block_distance does not compile for sm_90: invalid architecture")
    assert search.description == f"PyTorch reference ({said})"
    warning = f"blocks are compared by PyTorch, not by the CUDA kernel: {said}"
    assert [record.getMessage() for record in caplog.records] == [warning]
    sums, _ = search.compare(pairs_of(3, 1)).read()
    assert relative_error(sums, expected(search, pairs_of(3, 1))) < KERNEL_RELATIVE_ERROR


def test_memory_that_is_not_there_is_no_reason_for_a_slower_search(device, monkeypatch):
    def compile_variant(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_block_distance, "compile_variant", compile_variant)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block_search.make_block_search(torch.zeros(2, 1, 2, 1, 16, 64).as_subclass(OnCuda), INV_FREQ, max_pairs=8)


def test_more_pairs_than_fit_and_tensors_that_do_not_are_refused_before_a_launch(search, device):
    with pytest.raises(ValueError, match="at most 8 pairs fit one search, got 9"):
        search.compare(pairs_of(9, 0))
    rows = [torch.from_numpy(a) for a in (pairs_of(2, 0).new_rows, pairs_of(2, 0).old_rows)]
    with pytest.raises(ValueError, match=r"^position_delta must be contiguous"):
        search.launch(*rows, rows[0].long(), torch.zeros(2, LAYERS, 4))
    assert device.wrapped == []
