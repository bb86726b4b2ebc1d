"""A model without its weights, built by transformers on the meta device: the tensors that the architecture needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, shorten


@dataclass(frozen=True)
class Skeleton:
    """What transformers makes of a checkpoint's config.json.

    Attributes:
      shapes: of every parameter and saved buffer, by name.
      is_tied: the output layer is the embedding; ``lm_head.weight`` need not be stored.
      head_dim: of attention, the class's own default where the file gives none (Qwen3: 128).
    """

    shapes: dict[str, tuple[int, ...]]
    is_tied: bool
    head_dim: int
    num_kv_heads: int
    vocab_size: int


def read_skeleton(model_dir: Path, architecture: str) -> Skeleton:
    """Builds the model that ``config.json`` describes; no memory is taken and no file but the config is read.

    Args:
      architecture: the class that ``config.json`` names.

    Raises:
      UserError: transformers cannot build it, or builds another class.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        attention = model.model.layers[0].self_attn
        head_dim = int(attention.head_dim)
        num_kv_heads = int(config.num_key_value_heads)
    except Exception as error:  # whatever a foreign library makes of a foreign file
        raise UserError(
            f"{model_dir / 'config.json'} describes no model that transformers can build: {describe(error)} (take the "
            f"model's own file)"
        ) from error
    if type(model).__name__ != architecture:
        raise UserError(
            f"{model_dir / 'config.json'} names architecture {architecture}, but its model_type is that of "
            f"{type(model).__name__} (take the model's own file)"
        )
    return Skeleton(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        is_tied=bool(config.tie_word_embeddings),
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
    )


def describe(error: Exception) -> str:
    """The first line of a foreign library's error, with its type where the text says little."""
    lines = str(error).strip().splitlines()
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
