"""Chooses what computes the signatures of a pool's pages: the CUDA kernel, or the PyTorch specification elsewhere."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.search.cuda_signatures import CudaSignatures
from trtllm_memshare.search.signatures import SignatureProjection, page_signatures

log = logging.getLogger(__name__)


class PageSigner(Protocol):
    """Signs pages of one pool. ``description``: which implementation, and why."""

    description: str

    def page_signatures(self, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See ``search.signatures.page_signatures``: float32 ``[blocks, tokens_per_block, width]``."""


class ReferencePageSigner:
    """The PyTorch specification, on whatever device the pool is."""

    def __init__(
        self, fields: list[torch.Tensor], inv_freq: torch.Tensor, projection: SignatureProjection, reason: str
    ) -> None:
        self._fields, self._inv_freq, self._projection = fields, inv_freq, projection
        self.description = f"PyTorch reference ({reason})"

    def page_signatures(self, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See ``PageSigner``."""
        return page_signatures(self._fields, block_ids, self._inv_freq, positions, self._projection)


def make_page_signer(fields: list[torch.Tensor], inv_freq: torch.Tensor, projection: SignatureProjection) -> PageSigner:
    """The CUDA kernel for a pool on a CUDA device, the reference elsewhere.

    Where ``cuda.core`` is missing, or the kernel cannot be compiled or loaded, a pool on a CUDA device gets the
    reference too, and a warning says why.

    Args:
      fields: what is read of each chosen layer; see ``search.signatures.fields_of_pool``.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token; empty for a projection of V.

    Raises:
      ValueError: fields on a CUDA device, or a projection, that no kernel takes.
    """
    if not fields[0].is_cuda:
        return ReferencePageSigner(fields, inv_freq, projection, f"the pool is on {fields[0].device}")
    try:
        return CudaSignatures(fields, inv_freq, projection)
    except torch.cuda.OutOfMemoryError:
        raise  # the reference would want more of it
    except (UserError, RuntimeError, OSError) as error:
        log.warning("signatures of pages are computed by PyTorch, not by the CUDA kernel: %s", error)
        return ReferencePageSigner(fields, inv_freq, projection, shorten(str(error)))
