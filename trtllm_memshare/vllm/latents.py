"""Multi-head latent attention (MLA), as DeepSeek-R1 has it: what such a layer's cache holds instead of K and V.

Of each token there is one latent, from which K and V of all heads are made, and one key that carries its position::

    [blocks, tokens, latent then key]          DeepSeek-R1: 512 and 64 numbers

Signatures of pages read latents. Like V these have no rotation, and all that V says lies in them.
"""

from __future__ import annotations

from typing import Any

import torch

_PIECE = 128
"""Numbers of a latent that are taken for a KV head's vector where it divides into them: kernels take up to 256."""

Shape = tuple[int, int]


def keeps_latents(layer: Any) -> bool:
    """Whether an attention layer of vLLM is one of MLA."""
    return hasattr(layer, "kv_lora_rank")


def key_and_value_shapes(layer: Any) -> tuple[Shape, Shape]:
    """Vectors of a token and their length, as K and as V; of MLA the key with the position, and a latent's pieces."""
    if not keeps_latents(layer):
        return (layer.num_kv_heads, layer.head_size), (layer.num_kv_heads, layer.head_size)
    rank = layer.kv_lora_rank
    length = _PIECE if rank % _PIECE == 0 else rank
    return (1, layer.qk_rope_head_dim), (rank // length, length)


def pieces_of_latents(layer: Any, cache: torch.Tensor) -> torch.Tensor:
    """Latents in a layer's cache, ``[blocks, tokens, numbers]``: a view ``[blocks, pieces, tokens, length]``.

    Raises:
      ValueError: a cache of another form.
    """
    numbers, shape = layer.kv_lora_rank + layer.qk_rope_head_dim, list(getattr(cache, "shape", ()))
    if len(shape) != 3 or shape[2] != numbers:
        raise ValueError(f"a layer's cache must be [blocks, tokens, {numbers}], got {shape}")
    _, pieces = key_and_value_shapes(layer)
    return cache[..., : layer.kv_lora_rank].unflatten(-1, pieces).transpose(1, 2)
