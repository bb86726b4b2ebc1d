"""Signatures of tokens: how little of a page has to be read to know whether it stands elsewhere too.

The redundancy of a page is the mean over its tokens of the largest cosine with any later resident token, a cosine
averaged over layers and KV heads. Exactly, that reads all of K. A signature is a random projection of a few layers to a
few numbers, normalised, so that cosines of signatures rank pages nearly as cosines of all of K do. Signatures are
written once, when a page is full, and stay on the host: 64 float32 numbers are 256 bytes a token, where a token of
SmolLM2-135M has 11,520 bytes of K in float16. On six real traces (``benchmarks/studies/signatures``) V of three layers
at 64 numbers ranks pages with a correlation of 0.94 to 0.97 with the exact measure, K with one of 0.97 to 0.99.

PyTorch, and the specification of the CUDA kernel of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.search.block_distance import rotate

K, V = 0, 1
"""Fields of the pool."""

WIDTH = 64
"""Numbers of a signature, unless told otherwise."""

_SEED = 2507_21433
_FIRST_PAGES = 64
_MOST_PRODUCTS = 1 << 20  # of new tokens with resident ones, worked out at once: 4 MiB


@dataclass(frozen=True)
class SignatureProjection:
    """What a signature is taken of.

    Attributes:
      layers: int32 ``[n]``, layers of the pool, ascending.
      field: ``K``, compared without its rotation, or ``V``, which has none.
      matrix: float32 ``[n, num_kv_heads, head_dim, width]``.
    """

    layers: np.ndarray
    field: int
    matrix: torch.Tensor

    @property
    def width(self) -> int:
        return self.matrix.shape[-1]


def make_projection(
    num_layers: int, num_kv_heads: int, head_dim: int, width: int = WIDTH, field: int = V
) -> SignatureProjection:
    """The fixed projection of a model: normal numbers from a seed, layers at a sixth, a half and five sixths.

    With 30 layers these are 5, 15 and 25; of fewer than three layers all are taken. The same on every machine.
    """
    layers = np.unique([num_layers // 6, num_layers // 2, 5 * num_layers // 6]).astype(np.int32)
    shape = (len(layers), num_kv_heads, head_dim, width)
    matrix = np.random.default_rng(_SEED).standard_normal(shape).astype(np.float32)
    return SignatureProjection(layers, field, torch.from_numpy(matrix))


def fields_of_pool(pool: torch.Tensor, projection: SignatureProjection) -> list[torch.Tensor]:
    """Views of what a signature reads of each chosen layer, ``[num_blocks, num_kv_heads, tokens_per_block, head_dim]``.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, any element type of a pool.

    Raises:
      ValueError: a projection for other layers or heads.
    """
    _, num_layers, _, num_kv_heads, _, head_dim = pool.shape
    count, heads, dim, _ = projection.matrix.shape
    if (
        (heads, dim) != (num_kv_heads, head_dim)
        or count != len(projection.layers)
        or projection.layers[-1] >= num_layers
    ):
        raise ValueError(
            f"the projection is for layers {projection.layers.tolist()} and {heads} KV heads of {dim}, got a pool of "
            f"{num_layers} layers and {num_kv_heads} KV heads of {head_dim}"
        )
    return [pool[:, layer, projection.field] for layer in projection.layers.tolist()]


def page_signatures(
    fields: list[torch.Tensor],
    block_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    projection: SignatureProjection,
) -> torch.Tensor:
    """Signatures of all tokens of some blocks.

    For each token: the vector of each chosen layer and KV head, un-rotated if it is K, brought to length 1 (so that
    every head weighs the same, and scales of quantized pools drop out), times its matrix; summed over layers and heads;
    brought to length 1. A vector or a sum of zeros stays zero.

    Args:
      fields: of ``fields_of_pool``, or the like of another pool.
      block_ids: int ``[blocks]``, physical blocks, full ones.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token; not read for V. Empty = K as stored.
      positions: int32 ``[blocks]``, position at which each block's first token was written; not read for V.
      projection: from ``make_projection``; its matrix is moved to the fields' device.

    Returns:
      float32 ``[blocks, tokens_per_block, width]``, on the fields' device.

    Raises:
      ValueError: a block outside the pool.
    """
    num_blocks, _, size, _ = fields[0].shape
    device = fields[0].device
    blocks = block_ids.to(device, torch.int64)
    if len(blocks) and (int(blocks.min()) < 0 or int(blocks.max()) >= num_blocks):
        raise ValueError(f"blocks must lie in [0, {num_blocks}), got {int(blocks.min())} to {int(blocks.max())}")
    rows = torch.stack([field[blocks] for field in fields], 1).float()  # [blocks, layers, heads, tokens, head_dim]
    rows = rows.permute(0, 3, 1, 2, 4)
    if projection.field == K and len(inv_freq):
        written = positions.to(device)[:, None] + torch.arange(size, device=device)
        rows = rotate(rows, -written, inv_freq.to(device))
    unit = torch.nn.functional.normalize(rows, dim=-1)
    # One product over layers, heads and dimensions: half the time of an einsum of the same.
    sums = unit.flatten(0, 1).flatten(1) @ projection.matrix.to(device).flatten(0, 2)
    return torch.nn.functional.normalize(sums.view(len(blocks), size, projection.width), dim=-1)


class SignatureIndex:
    """Redundancy of the pages of one request, kept up to date as it grows and as pages go.

    Only pages that may go some day need to be here, so not those of the prompt: whatever is later is generated too. A
    request that is paused keeps its index; its pages come back with the same text.

    A new page costs one product ``[resident tokens, width] x [width, tokens_per_block]``: 8,192 tokens at 64 numbers
    are 8 million multiplications. A page that goes has those tokens looked at again that had their nearest in it.
    Memory: ``4 * width + 8`` bytes a resident token.

    Args:
      tokens_per_page: tokens of a page.
      width: numbers of a signature.
    """

    def __init__(self, tokens_per_page: int, width: int = WIDTH) -> None:
        self._size = tokens_per_page
        # Of the resident pages, in ascending order: signatures; of each token the largest cosine with a later resident
        # one, -1 where there is none; and the page of that one.
        self._rows = np.zeros((_FIRST_PAGES, tokens_per_page, width), np.float32)
        self._best = np.full((_FIRST_PAGES, tokens_per_page), -1.0, np.float32)
        self._nearest = np.full((_FIRST_PAGES, tokens_per_page), -1, np.int32)
        self._pages = np.zeros(0, np.int32)  # resident ones, ascending
        self._known = -1  # the newest page ever taken

    @property
    def num_pages(self) -> int:
        """One more than the newest page that was taken."""
        return self._known + 1

    def extend(self, pages: Sequence[int] | np.ndarray, signatures: np.ndarray) -> None:
        """Takes pages that were filled.

        Args:
          pages: ``[n]``, logical pages of the request; ascending. Those that were taken before are passed over: their
            text is the same, as after a pause.
          signatures: float32 ``[n, tokens_per_page, width]``, normalised.
        """
        pages = np.asarray(pages, np.int32)
        if signatures.shape[1:] != self._rows.shape[1:] or len(signatures) != len(pages):
            raise ValueError(
                f"{len(pages)} pages need signatures {[len(pages), *self._rows.shape[1:]]}, got "
                f"{list(signatures.shape)}"
            )
        start = int(np.searchsorted(pages, self._known, side="right"))
        while start < len(pages):
            # As many as keep new * (resident + new) pages within the products that are worked out at once.
            resident, most = len(self._pages), _MOST_PRODUCTS // self._size**2
            stop = start + max(1, (math.isqrt(resident**2 + 4 * most) - resident) // 2)
            self._take(pages[start:stop], signatures[start:stop])
            start = stop

    def _take(self, pages: np.ndarray, signatures: np.ndarray) -> None:
        """All of the pages, none of which was taken before, or none, where memory is short."""
        count, stop = len(self._pages), len(self._pages) + len(pages)
        while stop > len(self._rows):
            self._grow()
        self._rows[count:stop], self._best[count:stop], self._nearest[count:stop] = signatures, -1.0, -1
        resident = np.append(self._pages, pages)
        if stop > 1:
            products = self._flat(count, stop) @ self._flat(0, stop - 1).T
            # Of each new page and each earlier token: the largest cosine with a token of that page.
            largest = products.reshape(len(pages), self._size, stop - 1, self._size).max(1)
            for place, page in enumerate(pages.tolist(), count):
                with_page, best = largest[place - count, :place], self._best[:place]
                self._nearest[:place][with_page > best] = page
                np.maximum(best, with_page, out=best)
        self._pages, self._known = resident, int(pages[-1])

    def forget(self, pages: np.ndarray) -> None:
        """Takes out pages that are resident no more; those that are unknown or gone already are passed over."""
        gone = np.zeros(self.num_pages + 1, bool)  # the last one is for tokens without a nearest page, -1
        gone[pages[pages < self.num_pages]] = True
        stays = np.flatnonzero(~gone[self._pages])
        kept = len(stays)
        if kept == len(self._pages):
            return
        first = int((stays == np.arange(kept)).sum())  # what lies before the first page that goes stays in its place
        for array in (self._rows, self._best, self._nearest):
            array[first:kept] = array[stays[first:]]
        self._pages = self._pages[stays]
        owners, tokens = np.nonzero(gone[self._nearest[:kept]])
        if not len(owners):
            return
        self._best[owners, tokens], self._nearest[owners, tokens] = -1.0, -1
        # Pages later than the first orphan's are looked at by all of them; products with earlier ones do not count.
        start = int(owners[0]) + 1
        if start == kept:
            return
        products = self._rows[owners, tokens] @ self._flat(start, kept).T
        products[np.arange(start, kept).repeat(self._size) <= owners[:, None]] = -np.inf
        at = products.argmax(1)
        best = products[np.arange(len(at)), at]
        found = best > -1.0
        owners, tokens = owners[found], tokens[found]
        self._best[owners, tokens] = best[found]
        self._nearest[owners, tokens] = self._pages[start + at[found] // self._size]

    def redundancy(self) -> np.ndarray:
        """Redundancy of each page, float32 ``[num_pages]`` by logical page.

        Mean over a page's tokens of the largest cosine with a token of any later resident page; -1 for the last one;
        NaN for pages that were never taken, such as the prompt's, or have gone.
        """
        result = np.full(self.num_pages, np.nan, np.float32)
        result[self._pages] = self._best[: len(self._pages)].mean(1)
        return result

    def _flat(self, start: int, stop: int) -> np.ndarray:
        """Signatures of the tokens of resident pages, by place: float32 ``[tokens, width]``, a view."""
        return self._rows[start:stop].reshape(-1, self._rows.shape[2])

    def _grow(self) -> None:
        more = len(self._rows)
        rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        best = np.concatenate([self._best, np.full((more, self._size), -1.0, np.float32)])
        nearest = np.concatenate([self._nearest, np.full((more, self._size), -1, np.int32)])
        self._rows, self._best, self._nearest = rows, best, nearest  # all or none, where memory is short
