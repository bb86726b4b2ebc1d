"""Signatures of tokens on a CUDA device: the kernel of ``plugins/kernels/page_signatures.cuh`` on torch's stream.

``search.signatures`` is its specification. Nothing here synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.search.kernel_compiler import compile_source, import_cuda_core, loading
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, KernelVariant, kernel_source
from trtllm_memshare.search.signatures import SignatureProjection

SOURCE = "page_signatures_nvrtc.cu"
TOKENS_OF_BLOCK = 8
"""Tokens of a page that one thread block signs."""

_SIGN_THREADS = 256
_MAX_WIDTH = 64


@dataclass(frozen=True)
class SignatureVariant:
    """The kernel compiled for the fields of one pool and a projection.

    Attributes:
      dtype, num_kv_heads, tokens_per_block, head_dim, rotary_dim: see ``KernelVariant``.
      num_chosen: layers of the projection.
      strides: elements from one block, KV head and token to the next.
      field: 0 = K, 1 = V.
      width: numbers of a signature.

    Raises:
      ValueError: a dtype, shape or width that no kernel takes.
    """

    dtype: str
    num_chosen: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    rotary_dim: int
    strides: tuple[int, int, int]
    field: int
    width: int

    def __post_init__(self) -> None:
        KernelVariant(
            self.dtype, self.num_chosen, self.num_kv_heads, self.tokens_per_block, self.head_dim, self.rotary_dim
        )
        if not 0 < self.width <= _MAX_WIDTH or self.width % 4:
            raise ValueError(
                f"the width of a signature must be a multiple of 4 and at most {_MAX_WIDTH}, got {self.width}"
            )

    @staticmethod
    def of(fields: list[torch.Tensor], rotary_dim: int, projection: SignatureProjection) -> SignatureVariant:
        """For what a projection reads; see ``search.signatures.fields_of_pool``.

        Raises:
          ValueError: as above, or fields that one launch cannot read together.
        """
        like = {(field.dtype, field.device, field.shape, field.stride()) for field in fields}
        count, heads, head_dim, width = projection.matrix.shape
        _, num_kv_heads, size, dim = fields[0].shape
        if len(like) > 1 or fields[0].stride(-1) != 1 or (len(fields), num_kv_heads, dim) != (count, heads, head_dim):
            raise ValueError(
                f"a projection of {count} layers reads as many fields [num_blocks, {heads}, tokens_per_block, "
                f"{head_dim}] of one kind, a vector's elements side by side, got "
                f"{[(list(field.shape), field.stride()) for field in fields]}"
            )
        dtype = str(fields[0].dtype).removeprefix("torch.")
        strides = (fields[0].stride(0), fields[0].stride(1), fields[0].stride(2))
        return SignatureVariant(dtype, count, heads, size, head_dim, rotary_dim, strides, projection.field, width)

    @property
    def macros(self) -> list[tuple[str, str]]:
        """Definitions that turn the source into this variant."""
        shape = (self.num_chosen, self.num_kv_heads, self.tokens_per_block, self.head_dim, self.rotary_dim)
        return [
            ("MEMSHARE_ELEMENT", ELEMENT_TYPES[self.dtype].cuda_name),
            ("MEMSHARE_SHAPE", ",".join(map(str, shape))),
            ("MEMSHARE_STRIDES", ",".join(map(str, self.strides))),
            ("MEMSHARE_CHOSEN", f"{self.field},{self.width}"),
        ]


def compile_signatures(variant: SignatureVariant, arch: str, cache_dir: Path | None = None, logs: Any = None) -> Any:
    """The kernel as a ``cuda.core.ObjectCode``; arguments and errors as ``compile_variant``."""
    try:
        return compile_source(kernel_source(SOURCE), "page_signatures", variant.macros, arch, cache_dir, logs)
    except RuntimeError as error:
        raise RuntimeError(f"page_signatures does not compile for {arch}, {variant}: {error}") from error


class CudaSignatures:
    """Signs pages of one pool.

    Args:
      fields: of the chosen layers, on a CUDA device; see ``search.signatures.fields_of_pool``.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token, half-split layout; not read for V.
      projection: from ``make_projection``.
      cache_dir: where cubins are kept; None = ``~/.cache/trtllm_memshare``.

    Raises:
      ValueError: fields, a dtype, shape or width that no kernel takes; nothing has been compiled then.
      UserError: ``cuda.core`` is missing.
      RuntimeError, OSError: the kernel cannot be compiled or loaded.
    """

    def __init__(
        self,
        fields: list[torch.Tensor],
        inv_freq: torch.Tensor,
        projection: SignatureProjection,
        cache_dir: Path | None = None,
    ) -> None:
        self.variant = SignatureVariant.of(fields, 2 * len(inv_freq), projection)
        device = fields[0].device
        if device.type != "cuda":
            raise ValueError(f"the CUDA kernel needs a pool on a CUDA device, got {device} (use page_signatures there)")
        self._fields, self._device = fields, device  # their memory must not go
        self._core = import_cuda_core()
        self._inv_freq = inv_freq.to(device, torch.float32).contiguous()
        self._matrix = projection.matrix.to(device, torch.float32).contiguous()
        self._addresses = torch.tensor([field.data_ptr() for field in fields], dtype=torch.int64, device=device)
        self._num_blocks = torch.tensor([len(fields[0])], dtype=torch.int32, device=device)
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        code = compile_signatures(self.variant, arch, cache_dir or Path.home() / ".cache" / "trtllm_memshare")
        self.description = f"CUDA kernel for {arch}"
        with torch.cuda.device(device), loading("page_signatures", arch):
            self._core.Device(device.index).set_current()
            self._sign = code.get_kernel("page_signatures")

    def page_signatures(self, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float32 ``[blocks, tokens_per_block, width]`` on the device; see ``search.signatures.page_signatures``.

        A block outside the pool is not read and gives NaN.
        """
        device, count = self._device, len(block_ids)
        size = self.variant.tokens_per_block
        out = torch.empty((count, size, self.variant.width), dtype=torch.float32, device=device)
        if count:
            blocks, written = (t.to(device, torch.int32).contiguous() for t in (block_ids, positions))
            self._launch(
                (count, -(-size // TOKENS_OF_BLOCK)), self._addresses, self._num_blocks, blocks, written,
                self._inv_freq, self._matrix, out,
            )  # fmt: skip
        return out

    def _launch(self, grid: tuple[int, int], *tensors: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            self._core.Device(self._device.index).set_current()
            stream = self._core.Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)
            config = self._core.LaunchConfig(grid=grid, block=_SIGN_THREADS)
            self._core.launch(stream, config, self._sign, *(t.data_ptr() for t in tensors))
