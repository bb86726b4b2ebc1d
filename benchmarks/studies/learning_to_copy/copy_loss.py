"""Whether a model looks back at all: what it never reads can be taken from its cache unseen."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def copy_loss(model: Any, length: int, first_id: int = 0, batch: int = 4, seed: int = 0) -> float:
    """Loss on the second copy of ``length`` random tokens, in nats per token.

    Near 0 for a model that finds the earlier copy and continues it; ln vocab_size or more for one that goes by the last
    few tokens.

    Args:
      model: a transformers decoder with its own attention.
      first_id: smallest token id drawn, to leave special tokens out.
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(first_id, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    logits = model(torch.cat([once, once], 1)[:, :-1], use_cache=False).logits[:, length:].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), once[:, 1:].flatten()))
