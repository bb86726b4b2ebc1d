"""Step boundaries of the served model's tokenizer."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.steps import BoundaryTokens


def boundary_tokens(model_config: Any, protected_steps: int) -> BoundaryTokens:
    """Classes of token ids, which pressure reads for ``protected_steps`` alone: with 0 there are none.

    Args:
      model_config: vLLM's.

    Raises:
      UserError: steps are to be protected, and the model is served without a tokenizer.
    """
    if protected_steps == 0:
        return BoundaryTokens.from_texts([])
    if model_config.skip_tokenizer_init:
        raise UserError(
            f"protected_steps {protected_steps} needs the tokenizer, which says where steps begin, got "
            f"skip_tokenizer_init (leave it out, or set protected_steps to 0)"
        )
    from vllm.tokenizers import cached_tokenizer_from_config

    return BoundaryTokens.from_tokenizer(cached_tokenizer_from_config(model_config), model_config.get_vocab_size())
