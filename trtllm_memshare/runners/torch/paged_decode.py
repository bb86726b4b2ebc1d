"""What attends for generation requests: FlashInfer where it is installed, else Triton, else PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.runners.torch.flashinfer_decode import FlashInferDecode, find_flashinfer, make_workspace
from trtllm_memshare.runners.torch.page_lists import PageLists

CHOICES = ("auto", "flashinfer", "triton", "pytorch")


class PagedDecode(Protocol):
    """Decode attention over a pool, by lists of pages."""

    def plan(self, pages: PageLists, scaling: float) -> None:
        """Prepares one step for all layers; ``scaling`` is a factor on the logits."""

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of one layer: query ``[batch, num_heads, head_dim]`` -> the same shape."""


MakeDecode = Callable[[int | None, int], PagedDecode]
"""``(fixed_batch, max_pages)``, see ``FlashInferDecode``; None = any batch, no graph."""


@dataclass(frozen=True)
class DecodeKind:
    """What was chosen.

    Attributes:
      description: of it, and why it is that.
      make: None = PyTorch attends, from the groups of the step's plan.
      reads_once: whether it reads a page once however often a table names it.
    """

    description: str
    make: MakeDecode | None = None
    reads_once: bool = True


def choose_decode(pool: torch.Tensor, num_heads: int, dtype: torch.dtype, wanted: str = "auto") -> DecodeKind:
    """The decode attention for a pool.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      num_heads: query heads.
      dtype: of the model's activations.
      wanted: one of ``CHOICES``; auto = the first that can run.

    Raises:
      UserError: an unknown name, or one that cannot run here; the message says why.
    """
    if wanted not in CHOICES:
        raise UserError(f"unknown decode attention {wanted} ({nearest(wanted, CHOICES)})")
    if wanted == "pytorch":
        return DecodeKind("PyTorch (as asked for)")
    reasons = []
    if wanted in ("auto", "flashinfer"):
        flashinfer, said = find_flashinfer(pool, dtype)
        if flashinfer is not None:
            return flashinfer_kind(flashinfer, said, pool, num_heads, dtype)
        reasons.append(said)
    if wanted in ("auto", "triton"):
        kind, said = _find_triton(pool, num_heads, dtype, needs_gpu=wanted == "auto")
        if kind is not None:
            return kind
        reasons.append(said)
    if wanted != "auto":
        raise UserError(f"decode attention {wanted} cannot run: {reasons[-1]} (leave it at auto)")
    return DecodeKind(f"PyTorch ({'; '.join(dict.fromkeys(reasons))})")


def flashinfer_kind(
    flashinfer: Any, description: str, pool: torch.Tensor, num_heads: int, dtype: torch.dtype
) -> DecodeKind:
    """FlashInfer, or a stand-in for its module. All wrappers of a pool share one workspace: they run in turn."""
    workspace = make_workspace(pool.device)

    def make(fixed_batch: int | None, max_pages: int) -> PagedDecode:
        return FlashInferDecode(flashinfer, pool, num_heads, dtype, workspace, fixed_batch, max_pages)

    return DecodeKind(description, make, reads_once=False)


def _find_triton(
    pool: torch.Tensor, num_heads: int, dtype: torch.dtype, needs_gpu: bool
) -> tuple[DecodeKind | None, str]:
    if needs_gpu and not pool.is_cuda:
        return None, f"the pool is on {pool.device}"
    try:
        import triton

        from trtllm_memshare.runners.torch import triton_decode
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    if why := triton_decode.why_not(pool, num_heads, dtype):
        return None, why

    def make(fixed_batch: int | None, max_pages: int) -> PagedDecode:
        return triton_decode.TritonDecode(pool, num_heads, dtype, fixed_batch, max_pages)

    return DecodeKind(f"Triton {triton.__version__}, every page read once", make), ""
