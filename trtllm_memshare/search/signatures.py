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

from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.search.block_distance import rotate

K, V = 0, 1
"""Fields of the pool."""

WIDTH = 64
"""Numbers of a signature, unless told otherwise."""

_SEED = 2507_21433
_FIRST_ROWS = 1024


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
    sums = torch.einsum("btlhd,lhdw->btw", unit, projection.matrix.to(device))
    return torch.nn.functional.normalize(sums, dim=-1)


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
        self._rows = np.zeros((_FIRST_ROWS * tokens_per_page // 16, width), np.float32)
        self._best = np.full(len(self._rows), -1.0, np.float32)  # largest cosine with a later resident token
        self._nearest = np.full(len(self._rows), -1, np.int32)  # the page of that token, -1 = there is none
        self._pages = np.zeros(0, np.int32)  # resident ones, ascending; their tokens lie in this order
        self._known = -1  # the newest page ever appended

    @property
    def num_pages(self) -> int:
        """One more than the newest page that was appended."""
        return self._known + 1

    def append(self, page: int, signatures: np.ndarray) -> None:
        """Takes a page that was filled.

        Args:
          page: logical page of the request; ascending. One that was appended before is passed over: its text is the
            same, as after a pause.
          signatures: float32 ``[tokens_per_page, width]``, normalised.
        """
        if page <= self._known:
            return
        if signatures.shape != (self._size, self._rows.shape[1]):
            raise ValueError(
                f"page {page} needs signatures [{self._size}, {self._rows.shape[1]}], got {list(signatures.shape)}"
            )
        count = len(self._pages) * self._size
        self._improve(slice(0, count), signatures @ self._rows[:count].T, np.full(1, page, np.int32))
        if count + self._size > len(self._rows):
            self._grow()
        self._rows[count : count + self._size] = signatures
        self._best[count : count + self._size] = -1.0
        self._nearest[count : count + self._size] = -1
        self._pages = np.append(self._pages, np.int32(page))
        self._known = page

    def forget(self, pages: np.ndarray) -> None:
        """Takes out pages that are resident no more; those that are unknown or gone already are passed over."""
        stays = ~np.isin(self._pages, pages)
        if stays.all():
            return
        rows = np.repeat(stays, self._size)
        count, kept = len(rows), int(rows.sum())
        for array in (self._rows, self._best, self._nearest):
            array[:kept] = array[:count][rows]
        self._pages = self._pages[stays]
        orphans = np.flatnonzero(np.isin(self._nearest[:kept], pages) & (self._nearest[:kept] >= 0))
        if not len(orphans):
            return
        self._best[orphans], self._nearest[orphans] = -1.0, -1
        # Later pages of the first orphan's are looked at by all of them; products with earlier ones do not count.
        first = int(orphans[0]) // self._size + 1
        later = self._pages[first:]
        products = self._rows[first * self._size : kept] @ self._rows[orphans].T
        products[np.repeat(later, self._size)[:, None] <= np.repeat(self._pages, self._size)[orphans]] = -np.inf
        self._improve(orphans, products, later)

    def redundancy(self) -> np.ndarray:
        """Redundancy of each page, float32 ``[num_pages]`` by logical page.

        Mean over a page's tokens of the largest cosine with a token of any later resident page; -1 for the last one;
        NaN for pages that were never appended, such as the prompt's, or have gone.
        """
        result = np.full(self.num_pages, np.nan, np.float32)
        count = len(self._pages) * self._size
        result[self._pages] = self._best[:count].reshape(-1, self._size).mean(1)
        return result

    def _improve(self, rows: slice | np.ndarray, products: np.ndarray, pages: np.ndarray) -> None:
        """Takes cosines ``[tokens of pages, rows]`` with later tokens into account."""
        if not products.size:
            return
        at = products.argmax(0)
        best = products[at, np.arange(products.shape[1])]
        better = best > self._best[rows]
        self._best[rows] = np.where(better, best, self._best[rows])
        self._nearest[rows] = np.where(better, pages[at // self._size], self._nearest[rows])

    def _grow(self) -> None:
        more = len(self._rows) + self._size
        self._rows = np.concatenate([self._rows, np.zeros((more, self._rows.shape[1]), np.float32)])
        self._best = np.concatenate([self._best, np.full(more, -1.0, np.float32)])
        self._nearest = np.concatenate([self._nearest, np.full(more, -1, np.int32)])
