"""KV redundancy on a worker: signatures of full pages, read out of vLLM's own cache when the scheduler asks for them.

On a GPU a kernel reads: vLLM's backends (FlashAttention, FlashInfer, Triton, FlexAttention) see a layer's cache as
``[blocks, KV heads, tokens, 2 * head size]``, K in front of V, in one of several orders in memory. Elsewhere, and where
a GPU's cache turns out otherwise, PyTorch reads V from the places at which it is found (``placed_values.py``). Of MLA
latents are read in place of V (``latents.py``); they lie alike on every device. Sources say where V is and nothing
promises it. So a start writes random V through the backend's own operator and signs it where we read: what comes back
decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.page_signer import make_page_signer
from trtllm_memshare.search.signatures import SignatureProjection, make_projection, page_signatures
from trtllm_memshare.vllm.cache_elements import elements, rounded, write_elements
from trtllm_memshare.vllm.latents import keeps_latents, key_and_value_shapes, pieces_of_latents
from trtllm_memshare.vllm.placed_values import PlacedValues

log = logging.getLogger(__name__)

_ERROR = 1e-3  # of a number of a signature; those of other text differ by a tenth


class PageSignatures(Protocol):
    """Signs full pages of vLLM's pool. ``projection``: what is signed; ``description``: by what; ``device``: where."""

    projection: SignatureProjection
    description: str
    device: torch.device

    def of_blocks(self, block_ids: np.ndarray) -> torch.Tensor:
        """Signatures of full blocks, float32 ``[blocks, tokens_per_block, width]``, normalised, on ``device``."""


class CacheSignatures:
    """Signatures of pages by the CUDA kernel, or by PyTorch without a GPU or where ``cuda.core`` is missing.

    Args:
      layers: vLLM's attention layers, first to last, caches in place.
      block_size: tokens of the scheduler's blocks; a backend may have cut each into several of its own.

    Raises:
      ValueError: a cache of another form, or one that no kernel takes.
    """

    def __init__(self, layers: list[Any], block_size: int) -> None:
        self.projection = make_projection(len(layers), *key_and_value_shapes(layers[0])[1])
        fields = _values(layers, self.projection)
        self._signer = make_page_signer(fields, torch.empty(0), self.projection)  # V is not rotated
        self._block_size, self._parts = block_size, torch.arange(block_size // fields[0].shape[2], dtype=torch.int32)
        self.description, self.device = self._signer.description, fields[0].device

    def of_blocks(self, block_ids: np.ndarray) -> torch.Tensor:
        """See ``PageSignatures``."""
        own = (torch.from_numpy(block_ids).int()[:, None] * len(self._parts) + self._parts).flatten()
        signatures = self._signer.page_signatures(own, torch.zeros_like(own))
        return signatures.view(len(block_ids), self._block_size, self.projection.width)


class PlacedSignatures:
    """Signatures of pages by PyTorch, from wherever the backend keeps V.

    Args:
      layers: vLLM's attention layers, first to last, caches in place.
      block_size: tokens of the scheduler's blocks.
      num_blocks: of the scheduler's pool.
      spare_block: for trials, see ``trial_block``; it is overwritten.

    Raises:
      ValueError: V is not found, see ``PlacedValues``.
    """

    def __init__(self, layers: list[Any], block_size: int, num_blocks: int, spare_block: int) -> None:
        self.projection = make_projection(len(layers), layers[0].num_kv_heads, layers[0].head_size)
        chosen = [layers[index] for index in self.projection.layers.tolist()]
        self._values = [PlacedValues(layer, block_size, num_blocks, spare_block) for layer in chosen]
        self.description, self.device = "PyTorch, V by its places in a block", layers[0].kv_cache.device

    def of_blocks(self, block_ids: np.ndarray) -> torch.Tensor:
        """See ``PageSignatures``."""
        fields = [values.of_blocks(torch.from_numpy(block_ids).long()) for values in self._values]
        own = torch.arange(len(block_ids))
        return page_signatures(fields, own, torch.empty(0), own, self.projection)


def open_signatures(
    device: torch.device, layers: list[Any], num_blocks: int, block_size: int, spare_block: int
) -> PageSignatures:
    """What signs pages on this worker: the kernel on a GPU whose cache is as we read it, else PyTorch.

    Args:
      device: the worker's.
      num_blocks, block_size: of the scheduler's pool.
      spare_block: for trials, see ``trial_block``; it is overwritten.

    Raises:
      UserError: neither finds V.
    """
    ways: list[Callable[[], PageSignatures]] = []
    if device.type == "cuda" or keeps_latents(layers[0]):
        ways.append(lambda: CacheSignatures(layers, block_size))
    if not keeps_latents(layers[0]):
        ways.append(lambda: PlacedSignatures(layers, block_size, num_blocks, spare_block))
    reasons: list[str] = []
    for way in ways:
        try:
            signatures = way()
            reason = _what_differs(signatures, layers, block_size, spare_block)
        except ValueError as error:
            reason = str(error)
        if not reason:
            told = log.warning if reasons else log.info
            told("KV redundancy is read from vLLM's cache: %s", "; not ".join([signatures.description, *reasons]))
            return signatures
        reasons.append(reason)
    raise UserError(
        f"KV redundancy cannot be read from vLLM's cache: {'; '.join(reasons)} (choose need surprisal or age)"
    )


def _values(layers: list[Any], projection: SignatureProjection) -> list[torch.Tensor]:
    """V of the chosen layers, ``[blocks, KV heads, tokens, head size]``, views. Raises ValueError for another form."""
    fields = []
    for index in projection.layers.tolist():
        if keeps_latents(layers[index]):
            fields.append(pieces_of_latents(layers[index], elements(layers[index], layers[index].kv_cache)))
            continue
        cache, heads, dim = layers[index].kv_cache, layers[index].num_kv_heads, layers[index].head_size
        shape = list(getattr(cache, "shape", ()))
        if len(shape) != 4 or (shape[1], shape[3]) != (heads, 2 * dim):
            raise ValueError(f"a layer's cache must be [blocks, {heads}, tokens, {2 * dim}], got {shape}")
        fields.append(elements(layers[index], cache)[..., dim:])
    return fields


def _what_differs(signatures: PageSignatures, layers: list[Any], block_size: int, block: int) -> str:
    """Writes random K and V into a block through the backend and signs it; empty if that is what was written."""
    generator = torch.Generator().manual_seed(0)
    written = []
    for index in signatures.projection.layers.tolist():
        layer, cache = layers[index], layers[index].kv_cache
        key, value = (
            rounded(layer, torch.randn(block_size, *shape, generator=generator))
            for shape in key_and_value_shapes(layer)
        )
        slots = torch.arange(block * block_size, (block + 1) * block_size, device=cache.device)
        write_elements(layer, key, value, slots)
        written.append(value.transpose(0, 1)[None])
    first = torch.zeros(1, dtype=torch.int32)
    expected = page_signatures(written, first, torch.empty(0), first, signatures.projection)
    difference = float((signatures.of_blocks(np.array([block])) - expected).abs().max())
    return "" if difference < _ERROR else f"V that was written is not what is read there, by up to {difference:.2g}"
