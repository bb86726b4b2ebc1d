"""What sharing needs to know of the model that TensorRT-LLM serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.engine.calibrated_weights import check_weights, find_weights
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.trtllm.pytorch.guards import comparison_reasons, model_reasons, window_reasons


@dataclass(frozen=True)
class ModelFacts:
    """What sharing needs of the model: ``config``, its Hugging Face configuration."""

    config: Any

    @classmethod
    def of(cls, model_config: Any) -> ModelFacts:
        """From TensorRT-LLM's ``ModelConfig``; of a model for several kinds of input the part for text."""
        config = model_config.pretrained_config
        return cls(config.get_text_config() if hasattr(config, "get_text_config") else config)

    def fits(self, arguments: dict[str, Any]) -> bool:
        """Whether a KV cache manager made with these keyword arguments is this model's, by its geometry."""
        c, heads = self.config, arguments.get("num_kv_heads")
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        per_layer = set(heads) if isinstance(heads, (list, tuple)) else {heads}
        expected = {getattr(c, "num_key_value_heads", None) or c.num_attention_heads}
        return (arguments.get("num_layers"), per_layer, arguments.get("head_dim")) == (
            c.num_hidden_layers,
            expected,
            head_dim,
        )

    def boundaries(self, tokenizer_dir: str | None) -> BoundaryTokens:
        """Step boundaries of the model's tokenizer.

        Raises:
          UserError: there is no tokenizer in the directory.
        """
        from transformers import AutoTokenizer

        source = tokenizer_dir or getattr(self.config, "_name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tokenizer in {source!r}: {str(error).splitlines()[0]} (set tokenizer_dir in the settings file)"
            ) from error
        return BoundaryTokens.from_tokenizer(tokenizer, self.config.vocab_size)

    def reasons(self) -> list[str]:
        """Why this model cannot be served with sharing."""
        return model_reasons(self.config)

    def comparison_reasons(self) -> list[str]:
        """Why keys of this model cannot be compared after undoing their rotation."""
        return comparison_reasons(self.config)

    def window_reasons(self) -> list[str]:
        """Those of ``reasons`` that hold where nothing is compared."""
        return window_reasons(self.config)

    def check_null_pages(self, path: Path) -> None:
        """Raises UserError for null pages that were calibrated on another model; see ``check_weights``."""
        name = getattr(self.config, "_name_or_path", "")
        check_weights(path, name or "the model that is served", find_weights(name) if name else None)

    def inv_freq(self) -> torch.Tensor:
        """float32 ``[rotary_dim / 2]``, radians per token."""
        # Of the classes that are alike for the other models, the one that minds partial_rotary_factor.
        from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

        return Phi3RotaryEmbedding(config=self.config).inv_freq.float()
