"""The attention that the blocks of a text receive: whether a block is still read, which no distance can know."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def block_attention(model: Any, token_ids: list[int], tokens_per_block: int) -> torch.Tensor:
    """Attention of each position on each full block, mean over layers and heads.

    Args:
      model: a transformers decoder that shows its attention (``attn_implementation="eager"``). It holds num_layers *
        num_heads * num_tokens squared weights at once.

    Returns:
      float32 ``[num_tokens, num_blocks]``; a row sums to 1 together with what a partial last block receives.

    Raises:
      ValueError: another attention implementation, which shows nothing.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(f"attention is shown by eager alone, got {model.config._attn_implementation}")
    ids = torch.tensor([token_ids], device=model.device)
    layers = model(ids, output_attentions=True, use_cache=False).attentions
    mean = sum(weights[0].float().mean(0) for weights in layers) / len(layers)
    num_blocks = len(token_ids) // tokens_per_block
    return mean[:, : num_blocks * tokens_per_block].unflatten(1, (num_blocks, tokens_per_block)).sum(-1)
