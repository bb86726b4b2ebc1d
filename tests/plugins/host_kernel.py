"""The kernel's arithmetic compiled for the host and called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

from trtllm_memshare.search.kernel_source import ELEMENT_TYPES

KERNELS = Path(__file__).resolve().parents[2] / "plugins" / "kernels"
STRICT = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]


def compile_host_kernel(compiler: str, folder: Path) -> ctypes.CDLL:
    """Builds ``block_distance_host.cpp`` as a shared library and loads it."""
    library = folder / "libblock_distance_host.so"
    source = KERNELS / "block_distance_host.cpp"
    subprocess.run([compiler, *STRICT, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run_host_kernel(library, pool, new_rows, old_rows, position_delta, inv_freq, interleaved=False) -> torch.Tensor:
    """Same arguments and result as ``block_distance``."""
    num_blocks, num_layers, _, num_kv_heads, tokens_per_block, head_dim = pool.shape
    assert pool.is_contiguous()
    rows = [np.ascontiguousarray(a.numpy(), np.int32) for a in (new_rows, old_rows, position_delta)]
    frequencies = np.ascontiguousarray(inv_freq.numpy(), np.float32)
    out = np.full((len(rows[0]), num_layers, 4), -1, np.float32)
    status = library.memshare_block_distance_host(
        ctypes.c_void_p(pool.data_ptr()), num_blocks, *(a.ctypes.data_as(ctypes.c_void_p) for a in rows),
        frequencies.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), len(rows[0]), num_layers,
        num_kv_heads, tokens_per_block, head_dim, 2 * len(frequencies),
        ELEMENT_TYPES[str(pool.dtype).removeprefix("torch.")].code, int(interleaved),
    )  # fmt: skip
    assert status == 0
    return torch.from_numpy(out)
