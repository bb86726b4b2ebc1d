"""Stage 2 on a CUDA device: launches the kernel of ``plugins/kernels`` on the caller's stream, never synchronises."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.search.kernel_compiler import compile_variant, import_cuda_core, loading
from trtllm_memshare.search.kernel_source import ENTRY_POINT, KernelVariant, num_layer_groups
from trtllm_memshare.search.types import PairBatch

_INPUTS = 3  # new rows, old rows, position delta


@dataclass
class _Staging:
    """One of two sets of buffers: the host fills one while the device may still read the other.

    Attributes:
      host: int32 ``[3 * max_pairs * tokens_per_block]``, pinned. Flat: a search of fewer pairs takes a contiguous
        front part, since torch copies strided memory through a temporary and waits for it.
      device: the same on the device.
      distances: float32 ``[max_pairs, num_layers, 4]``, device.
      sums: the same, pinned.
      copied: recorded after the host buffer has been read.
    """

    host: torch.Tensor
    device: torch.Tensor
    distances: torch.Tensor
    sums: torch.Tensor
    copied: torch.cuda.Event


@dataclass(frozen=True)
class PendingDistances:
    """Sums on their way to the host. ``read`` waits for them."""

    sums: torch.Tensor
    started: torch.cuda.Event
    ended: torch.cuda.Event

    def read(self) -> tuple[np.ndarray, float]:
        """float32 ``[pairs, num_layers, 4]``, valid until the search after next, and the device seconds it took."""
        self.ended.synchronize()
        return self.sums.numpy(), self.started.elapsed_time(self.ended) * 1e-3


class CudaBlockDistance:
    """The block distance over one pool.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, contiguous, on a CUDA device;
        fp32, fp16, bf16, fp8 e4m3 or int8.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token.
      max_pairs: most pairs of one search.
      interleaved: RoPE turns neighbouring elements (GPT-J) instead of halves.
      cache_dir: where cubins are kept; None = ``~/.cache/trtllm_memshare``.

    Attributes:
      arch: such as ``sm_90``.
      description: which implementation this is.

    Raises:
      ValueError: a pool, dtype or shape that no kernel takes; nothing has been compiled then.
      UserError: ``cuda.core`` is missing.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        inv_freq: torch.Tensor,
        max_pairs: int,
        interleaved: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        check_pool(pool)
        self._pool, self._max_pairs, self._interleaved = pool, max_pairs, interleaved
        self._cache_dir = cache_dir or Path.home() / ".cache" / "trtllm_memshare"
        self._inv_freq = inv_freq.to(pool.device, torch.float32).contiguous()
        self._core = import_cuda_core()
        self.arch = "sm_{}{}".format(*torch.cuda.get_device_capability(pool.device))
        self.description = f"CUDA kernel for {self.arch}, compiled by NVRTC"
        self._kernels: dict[bool, tuple[KernelVariant, Any]] = {}
        self._slots: dict[bool, int] = {}  # blocks of each that the device runs at a time
        self._bound = threading.local()
        self._streams: dict[int, Any] = {}  # by torch's handle; wrapping one takes longer than the rest of a launch
        # The kernel reads these two on the device, as the TensorRT plugin does.
        self._pool_pointer = torch.tensor([pool.data_ptr()], dtype=torch.int64, device=pool.device)
        self._num_blocks = torch.tensor([pool.shape[0]], dtype=torch.int32, device=pool.device)
        self._staging = [self._new_staging() for _ in range(2)]
        self._turn = 0

    def compare(self, pairs: PairBatch) -> PendingDistances:
        """Enqueues copy in, kernel and copy out on torch's current stream.

        Raises:
          ValueError: shapes that do not agree, more than max_pairs, or rows out of the pool; nothing is launched.
        """
        check_pairs(pairs, self._pool.shape[0], self._pool.shape[4])
        check_count(len(pairs), self._max_pairs)
        with torch.cuda.device(self._pool.device):  # the thread's own device may be another
            return self._compare(pairs)

    def _compare(self, pairs: PairBatch) -> PendingDistances:
        count = len(pairs)
        staging = self._staging[self._turn]
        self._turn = 1 - self._turn
        staging.copied.synchronize()  # of the search before last: long past
        used = _INPUTS * pairs.new_rows.size
        np.stack(
            (pairs.new_rows, pairs.old_rows, pairs.position_delta),
            out=staging.host[:used].numpy().reshape(_INPUTS, *pairs.new_rows.shape),
        )
        stream = torch.cuda.current_stream(self._pool.device)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record(stream)
        staging.device[:used].copy_(staging.host[:used], non_blocking=True)
        staging.copied.record(stream)
        new_rows, old_rows, delta = staging.device[:used].view(_INPUTS, *pairs.new_rows.shape)
        self.launch(new_rows, old_rows, delta, staging.distances[:count], pairs.undo_rope)
        sums = staging.sums[:count].copy_(staging.distances[:count], non_blocking=True)
        ended.record(stream)
        return PendingDistances(sums, started, ended)

    def launch(
        self,
        new_rows: torch.Tensor,
        old_rows: torch.Tensor,
        position_delta: torch.Tensor,
        distances: torch.Tensor,
        undo_rope: bool = True,
    ) -> None:
        """Enqueues the kernel alone on torch's current stream of the pool's device.

        Can be captured once ``kernel`` has compiled and loaded it.

        Args:
          new_rows, old_rows, position_delta: int32 ``[pairs, tokens_per_block]``, contiguous, device. Rows are checked
            by the kernel only: one out of the pool makes its pair NaN. Pairs of -1 return at once.
          distances: float32 ``[pairs, num_layers, 4]``, device, written.
          undo_rope: compare K after undoing the rotation between the two positions.

        Raises:
          ValueError: a tensor of another shape, dtype or device, or one that is not contiguous; nothing is launched.
        """
        count = new_rows.shape[0]
        check_launch(self._pool, new_rows, old_rows, position_delta, distances)
        if not count:
            return
        device = self._pool.device
        with torch.cuda.device(device):
            self._bind_thread()
            variant, kernel = self.kernel(undo_rope)
            grid = (count, num_layer_groups(count, variant.num_layers, self._slots[undo_rope]))
            config = self._core.LaunchConfig(grid=grid, block=variant.num_threads)
            arguments = (
                self._pool_pointer,
                self._num_blocks,
                new_rows,
                old_rows,
                position_delta,
                self._inv_freq,
                distances,
            )
            stream = self._wrapped(torch.cuda.current_stream(device).cuda_stream)
            self._core.launch(stream, config, kernel, *(a.data_ptr() for a in arguments))

    def kernel(self, undo_rope: bool = True) -> tuple[KernelVariant, Any]:
        """The variant and its loaded kernel; compiles on first use. Raises RuntimeError or OSError where it cannot."""
        if undo_rope not in self._kernels:
            rotary_dim = 2 * len(self._inv_freq) if undo_rope else 0
            variant = variant_of(self._pool, rotary_dim, self._interleaved)
            code = compile_variant(variant, self.arch, self._cache_dir)
            with torch.cuda.device(self._pool.device), loading(ENTRY_POINT, self.arch):
                self._bind_thread()
                kernel = code.get_kernel(ENTRY_POINT)
                resident = kernel.occupancy.max_active_blocks_per_multiprocessor(variant.num_threads, 0)
                multiprocessors = torch.cuda.get_device_properties(self._pool.device).multi_processor_count
                self._slots[undo_rope] = multiprocessors * resident
                self._kernels[undo_rope] = variant, kernel
        return self._kernels[undo_rope]

    def _bind_thread(self) -> None:
        """Gives a thread that torch has not used yet the device's context: the driver launches into the current one."""
        if not getattr(self._bound, "done", False):
            self._core.Device(self._pool.device.index).set_current()
            self._bound.done = True

    def _wrapped(self, handle: int) -> Any:
        """``cuda.core``'s object for a stream of torch, whose streams live as long as the process."""
        if handle not in self._streams:
            self._streams[handle] = self._core.Stream.from_handle(handle)
        return self._streams[handle]

    def _new_staging(self) -> _Staging:
        _, num_layers, _, _, tokens_per_block, _ = self._pool.shape
        rows = torch.empty(_INPUTS * self._max_pairs * tokens_per_block, dtype=torch.int32)
        sums = torch.empty((self._max_pairs, num_layers, 4), dtype=torch.float32)
        device = self._pool.device
        return _Staging(rows.pin_memory(), rows.to(device), sums.to(device), sums.pin_memory(), torch.cuda.Event())


def variant_of(pool: torch.Tensor, rotary_dim: int, interleaved: bool) -> KernelVariant:
    """The kernel that compares rows of ``pool``. Raises ValueError if there is none."""
    _, num_layers, _, num_kv_heads, tokens_per_block, head_dim = pool.shape
    dtype = str(pool.dtype).removeprefix("torch.")
    return KernelVariant(dtype, num_layers, num_kv_heads, tokens_per_block, head_dim, rotary_dim, interleaved)


def check_pool(pool: torch.Tensor) -> None:
    """Raises ValueError unless ``pool`` has TensorRT-LLM's shape, is contiguous and lies on a CUDA device."""
    if pool.ndim != 6 or pool.shape[2] != 2:
        raise ValueError(
            f"the KV pool must be [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], got "
            f"{list(pool.shape)}"
        )
    variant_of(pool, 0, False)
    if not pool.is_contiguous() or pool.data_ptr() % 16:
        raise ValueError(f"the KV pool must be contiguous and aligned to 16 bytes, got strides {list(pool.stride())}")
    if not pool.is_cuda:
        raise ValueError(f"the CUDA search needs a pool on a CUDA device, got {pool.device} (use block_distance there)")


def check_count(count: int, max_pairs: int) -> None:
    """Raises ValueError for more pairs than a search has buffers for."""
    if count > max_pairs:
        raise ValueError(f"at most {max_pairs} pairs fit one search, got {count} (raise max_pairs)")


def check_launch(
    pool: torch.Tensor,
    new_rows: torch.Tensor,
    old_rows: torch.Tensor,
    position_delta: torch.Tensor,
    distances: torch.Tensor,
) -> None:
    """Raises ValueError unless the kernel can take the tensors' addresses as they are; looks at no element."""
    rows = (new_rows.shape[0], pool.shape[4])
    named = {
        "new_rows": (new_rows, torch.int32, rows),
        "old_rows": (old_rows, torch.int32, rows),
        "position_delta": (position_delta, torch.int32, rows),
        "distances": (distances, torch.float32, (rows[0], pool.shape[1], 4)),
    }
    for name, (tensor, dtype, shape) in named.items():
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == pool.device
        if not fits or not tensor.is_contiguous():
            form = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)} on {pool.device}, got {form} {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def check_pairs(pairs: PairBatch, num_blocks: int, tokens_per_block: int) -> None:
    """Checks on the host what the kernel would answer with NaN.

    Args:
      pairs: rows to compare.
      num_blocks, tokens_per_block: of the pool.

    Raises:
      ValueError: arrays that are not int32 of one shape ``[pairs, tokens_per_block]``, a row out of the pool, or a row
        without a partner; the message names the first one.
    """
    named = {"new_rows": pairs.new_rows, "old_rows": pairs.old_rows, "position_delta": pairs.position_delta}
    shape = (len(pairs.new_rows), tokens_per_block)
    for name, array in named.items():
        if array.shape != shape or array.dtype != np.int32:
            raise ValueError(
                f"{name} must be int32 [pairs, tokens_per_block] = {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
    num_rows = num_blocks * tokens_per_block
    for name in ("new_rows", "old_rows"):
        outside = (named[name] < -1) | (named[name] >= num_rows)
        if outside.any():
            pair, token = np.argwhere(outside)[0]
            raise ValueError(
                f"{name}[{pair}, {token}] must lie in the pool's rows 0..{num_rows - 1} or be -1, got "
                f"{named[name][pair, token]}"
            )
    unpaired = (pairs.new_rows == -1) != (pairs.old_rows == -1)
    if unpaired.any():
        pair, token = np.argwhere(unpaired)[0]
        raise ValueError(
            f"rows [{pair}, {token}] must both be -1 or neither, got {pairs.new_rows[pair, token]} and "
            f"{pairs.old_rows[pair, token]}"
        )
