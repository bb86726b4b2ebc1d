"""A model of a real model's size with random weights: it costs what a trained one costs, and says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.runners.torch.attention import IMPLEMENTATION

TOKENIZER_SIZE = 8192
"""Words of the tokenizer that cuts the traces; no shape has fewer."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder by its config class and sizes."""

    config_class: type
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float

    def config(self, max_position: int) -> Any:
        """The transformers config."""
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=max_position,
            rope_theta=self.rope_theta,
            tie_word_embeddings=False,
        )


SHAPES = {
    "DeepSeek-R1-Distill-Qwen-7B": ModelShape(Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 1e4),
    "DeepSeek-R1-Distill-Llama-8B": ModelShape(LlamaConfig, 4096, 14336, 32, 32, 8, 128256, 5e5),
    "SmolLM2-135M": ModelShape(LlamaConfig, 576, 1536, 30, 9, 3, 49152, 1e5),
    "small": ModelShape(Qwen2Config, 128, 256, 4, 4, 2, TOKENIZER_SIZE, 1e4),  # for machines without a GPU
}


def make_model(shape: ModelShape, max_position: int, device: str) -> Any:
    """The model with random weights, bf16 on a GPU and fp32 elsewhere, built where it will run."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = shape.config(max_position)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype)
    return model.eval()


def zero_null_page(config: Any, num_positions: int) -> NullPageSet:
    """A page that serves all positions, for a model with random weights."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.zeros(1, config.num_hidden_layers, config.num_key_value_heads, head_dim)
    gaps = torch.full((1, config.num_hidden_layers, config.num_attention_heads), -torch.inf)
    return NullPageSet(keys, np.array([0, num_positions], np.int32), gaps)
