"""Shape of the model of the traces, and the head it is given to start with."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

_SHARPNESS = 8.0  # logits by which the token before is ahead of its neighbours: it gets 99.9 % of the weight
_SLOWEST = 0.05  # radians per token; slower pairs hardly tell neighbours apart


def model_config(vocab_size: int, context: int, eos_id: int, pad_id: int, **changes: Any) -> Qwen2Config:
    """1.2 million parameters, with ``changes`` to any of Qwen2Config's settings.

    A head finds an earlier copy by those pairs of dimensions that hardly turn on the way to it. Heads of 64 at the
    rotary base of Qwen2 have 14 pairs that turn less than a radian over 2,048 tokens, heads of 32 at base 10,000 two.
    """
    settings = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        **changes,
    }
    return Qwen2Config(
        vocab_size=vocab_size, max_position_embeddings=context, eos_token_id=eos_id, pad_token_id=pad_id, **settings
    )


@torch.no_grad()
def look_one_back(model: Qwen2ForCausalLM) -> None:
    """Sets the biases of the first head of layer 0 so that it reads the token before, whatever stands where.

    Continuing an earlier copy takes two heads in a row: one tells each token what stood before it, the next looks for
    the token that was told of the present one (an induction head). The second is learned in some hundred steps once
    the first is there; without it, none came about in as many. Training is free to undo it.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    head_dim = int(config.head_dim)
    speeds = rope_theta(config) ** (-torch.arange(head_dim // 2) * 2.0 / head_dim)
    fast = (speeds > _SLOWEST).float()
    at_distance_0_or_2 = float((fast * (1.0 - torch.cos(speeds))).sum())
    size = math.sqrt(_SHARPNESS * math.sqrt(head_dim) / at_distance_0_or_2) * fast
    still = torch.zeros_like(size)
    attention.k_proj.bias[:head_dim] = torch.cat([size, still])
    attention.q_proj.bias[:head_dim] = torch.cat([size * torch.cos(speeds), -size * torch.sin(speeds)])


def rope_theta(config: Any) -> float:
    """Base of the rotary frequencies, where transformers 5 keeps it and where 4 does."""
    return float((getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta)
