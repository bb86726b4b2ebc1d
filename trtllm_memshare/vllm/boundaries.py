"""Step boundaries of the served model's tokenizer."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.steps import BoundaryTokens


def boundary_tokens(model_config: Any) -> BoundaryTokens:
    """Classes of token ids; ``model_config`` is vLLM's. Raises UserError for a model served without a tokenizer."""
    if model_config.skip_tokenizer_init:
        raise UserError("MemShare needs the tokenizer for step boundaries, got skip_tokenizer_init (leave it out)")
    from vllm.tokenizers import cached_tokenizer_from_config

    return BoundaryTokens.from_tokenizer(cached_tokenizer_from_config(model_config), model_config.get_vocab_size())
