"""Rotary frequencies of a checkpoint, for those who do not hold its model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def rotary_inv_freq(model_dir: Path) -> torch.Tensor:
    """float32 ``[head_dim / 2]``, radians per token, half-split layout; scaling as the checkpoint's config says.

    The families that engines are built for share transformers' rotary embedding of Llama.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    return LlamaRotaryEmbedding(config).inv_freq.float()
