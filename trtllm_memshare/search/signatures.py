"""Signatures of tokens: how little of a page has to be read to know whether it stands elsewhere too.

The redundancy of a page is the mean over its tokens of the largest cosine with any later resident token, a cosine
averaged over layers and KV heads. Exactly, that reads all of K. A signature is a random projection of a few layers to a
few numbers, normalised, so that cosines of signatures rank pages nearly as cosines of all of K do. Signatures are
written once, when a page is full; ``signature_index`` compares them. 64 float32 numbers are 256 bytes a token, where a
token of SmolLM2-135M has 11,520 bytes of K in float16. On six real traces (``benchmarks/studies/signatures``) V of
three layers at 64 numbers ranks pages with a correlation of 0.94 to 0.97 with the exact measure, K of 0.97 to 0.99.

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
    chosen = [field.index_select(0, blocks).transpose(1, 2) for field in fields]
    rows = torch.stack(chosen, 2).float()  # [blocks, tokens, layers, heads, head_dim]
    if projection.field == K and len(inv_freq):
        written = positions.to(device)[:, None] + torch.arange(size, device=device)
        rows = rotate(rows, -written, inv_freq.to(device))
    # One product over layers, heads and dimensions: half the time of an einsum of the same.
    sums = _to_length_1(rows).flatten(0, 1).flatten(1) @ projection.matrix.to(device).flatten(0, 2)
    return _to_length_1(sums).view(len(blocks), size, projection.width)


def _to_length_1(vectors: torch.Tensor) -> torch.Tensor:
    """Divides ``[..., n]`` by their lengths, in place: a copy of this size costs a CPU more than the division."""
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min_(1e-12))
