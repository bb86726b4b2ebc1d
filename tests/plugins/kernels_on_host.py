"""The CUDA kernels as they are, compiled for the host over ``cuda_on_host`` and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_memshare.search.cuda_signatures import SignatureVariant
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES
from trtllm_memshare.search.signatures import SignatureProjection

HOST = Path(__file__).resolve().parent / "cuda_on_host"
KERNELS = Path(__file__).resolve().parents[2] / "plugins" / "kernels"
SIGNATURES_ENTRY = KERNELS.parent / "tensorrt" / "page_signatures_export.cpp"
# The kernels load vectors in one branch and use them in another of the same condition, which g++ does not follow.
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def find_compiler() -> str:
    """g++ or clang++; the test is skipped where there is neither."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the kernels for the host")
    return compiler


def compile_for_host(folder: Path, source: str, *macros: str, also: Sequence[Path] = ()) -> ctypes.CDLL:
    """Builds a file of ``cuda_on_host`` with what it includes, and other sources, as a shared library and loads it."""
    library = folder / f"{Path(source).stem}.so"
    command = [find_compiler(), *FLAGS, *(f"-D{m}" for m in macros), f"-I{HOST}", f"-I{KERNELS}", "-shared", "-fPIC"]
    subprocess.run([*command, *map(str, (HOST / source, *also, HOST / "run.cpp")), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def run_block_distance(library, pool, new_rows, old_rows, position_delta, inv_freq, interleaved=False) -> torch.Tensor:
    """Same arguments and result as ``block_distance``."""
    num_blocks, num_layers, _, num_kv_heads, tokens_per_block, head_dim = pool.shape
    assert pool.is_contiguous()
    rows = [np.ascontiguousarray(a.numpy(), np.int32) for a in (new_rows, old_rows, position_delta)]
    frequencies = np.ascontiguousarray(inv_freq.numpy(), np.float32)
    out = np.full((len(rows[0]), num_layers, 4), -1, np.float32)
    status = library.memshare_block_distance(
        ctypes.c_void_p(pool.data_ptr()), num_blocks, *map(address, rows), address(frequencies), address(out),
        len(rows[0]), num_layers, num_kv_heads, tokens_per_block, head_dim, 2 * len(frequencies),
        ELEMENT_TYPES[str(pool.dtype).removeprefix("torch.")].code, int(interleaved),
    )  # fmt: skip
    assert status == 0
    return torch.from_numpy(out)


class SignaturesOnHost:
    """``CudaSignatures`` with its kernel compiled for the host."""

    description = "the kernel, on the host"

    def __init__(
        self, fields: list[torch.Tensor], inv_freq: torch.Tensor, projection: SignatureProjection, folder: Path
    ):
        self._take(fields, inv_freq, projection)
        macros = (f"{name}={value}" for name, value in self._variant.macros)
        folder = folder / str(abs(hash(self._variant)))
        folder.mkdir(exist_ok=True)
        self.library = compile_for_host(folder, "page_signatures_nvrtc.cpp", *macros)

    def _take(self, fields: list[torch.Tensor], inv_freq: torch.Tensor, projection: SignatureProjection) -> None:
        self._fields = [field.as_subclass(torch.Tensor) for field in fields]
        self._inv_freq, self._matrix = inv_freq, projection.matrix
        self._variant = SignatureVariant.of(self._fields, 2 * len(inv_freq), projection)

    def page_signatures(self, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Same arguments and result as those of ``CudaSignatures``."""
        out = torch.full((len(block_ids), self._variant.tokens_per_block, self._variant.width), -7.0)
        if not len(block_ids):
            return out
        fields = torch.tensor([field.data_ptr() for field in self._fields])
        tensors = (fields, block_ids.int(), positions.int(), self._inv_freq, self._matrix, out)
        assert self._launch([ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors], len(block_ids)) == 0
        return out

    def _launch(self, addresses: list[ctypes.c_void_p], count: int) -> int:
        num_blocks = len(self._fields[0])
        return self.library.memshare_page_signatures_variant(addresses[0], num_blocks, *addresses[1:], count)


class SignatureShape(ctypes.Structure):
    """``MemShareSignatureShape`` of ``plugins/tensorrt/page_signatures_export.h``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "num_layers", "num_kv_heads", "tokens_per_block", "head_dim")),
        *((name, ctypes.c_int) for name in ("rotary_dim", "field", "width")),
        *((f"{name}_stride", ctypes.c_longlong) for name in ("block", "head", "token")),
    ]

    @staticmethod
    def of(variant: SignatureVariant) -> SignatureShape:
        return SignatureShape(
            ELEMENT_TYPES[variant.dtype].code, variant.num_chosen, variant.num_kv_heads, variant.tokens_per_block,
            variant.head_dim, variant.rotary_dim, variant.field, variant.width, *variant.strides,
        )  # fmt: skip


class SignaturesOfLibrary(SignaturesOnHost):
    """The same by the plugin library's entry and its kernels for any shape."""

    def __init__(self, fields: list[torch.Tensor], inv_freq: torch.Tensor, projection: SignatureProjection, library):
        self._take(fields, inv_freq, projection)
        self.library = library

    def _launch(self, addresses: list[ctypes.c_void_p], count: int) -> int:
        num_blocks, shape = ctypes.c_int(len(self._fields[0])), SignatureShape.of(self._variant)
        return self.library.memshare_page_signatures(
            addresses[0], ctypes.byref(num_blocks), *addresses[1:], count, ctypes.byref(shape), None
        )
