"""Null pages on their way from an engine into a runner's pool."""

from __future__ import annotations

from dataclasses import replace

import torch

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.engine.null_page import NullPageSet, stored_keys
from trtllm_memshare.errors import UserError


def write_null_pages(pool: torch.Tensor, null_page_set: NullPageSet) -> None:
    """Writes null pages into the first blocks of a pool: every token of a page has its band's K, and V 0.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``; its first blocks are modified.

    Raises:
      UserError: the pages leave no block for requests, or are for other layers or heads.
    """
    blocks = null_page_blocks(null_page_set, tuple(pool.shape), pool.dtype)
    pool[: len(blocks)] = blocks.to(pool.device)


def null_page_blocks(null_page_set: NullPageSet, pool_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The blocks as they lie in the pool: ``[num_bands, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.

    Raises:
      UserError: see ``write_null_pages``.
    """
    num_blocks, num_layers, _, num_kv_heads, tokens_per_block, head_dim = pool_shape
    keys = null_page_set.keys
    if tuple(keys.shape[1:]) != (num_layers, num_kv_heads, head_dim):
        raise UserError(
            f"null pages are for layers, KV heads and head_dim {list(keys.shape[1:])}, got a pool of "
            f"{[num_layers, num_kv_heads, head_dim]} (build the engine again)"
        )
    if len(keys) >= num_blocks:
        raise UserError(
            f"the KV pool has {num_blocks} blocks, of which null pages take {len(keys)} (set --kv-cache-blocks to more)"
        )
    blocks = torch.zeros((len(keys), num_layers, 2, num_kv_heads, tokens_per_block, head_dim), dtype=dtype)
    blocks[:, :, 0] = stored_keys(keys, dtype)[:, :, :, None]
    return blocks


def place_of(null_page_set: NullPageSet) -> NullPages:
    """Where ``write_null_pages`` puts them: the first blocks, in order of position."""
    return NullPages(range(null_page_set.num_bands), null_page_set.bands.tolist())


def of_rank(
    null_page_set: NullPageSet, num_layers: int, num_kv_heads: int, pp_rank: int, tp_rank: int, tp_size: int
) -> NullPageSet:
    """The part of one rank: its layers, and its KV heads by TensorRT-LLM's mapping.

    With 2 KV heads on 4 tensor-parallel ranks, ranks 0 and 1 hold head 0 and ranks 2 and 3 head 1; with 8 on 4, rank 1
    holds heads 2 and 3.

    Args:
      num_layers, num_kv_heads: of the rank.
    """
    total = null_page_set.keys.shape[2]
    first = tp_rank * num_kv_heads if total >= tp_size else tp_rank * total // tp_size
    layers = slice(pp_rank * num_layers, (pp_rank + 1) * num_layers)
    return replace(null_page_set, keys=null_page_set.keys[:, layers, first : first + num_kv_heads])
