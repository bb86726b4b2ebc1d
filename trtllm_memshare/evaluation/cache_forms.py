"""Caches of models that have other layers than those of full attention, as vLLM lays them out in one pool.

Layers, heads and windows are those of the models' own ``config.json``; blocks of 544 tokens are what vLLM makes of
Qwen3-Next's states in bfloat16. Imports vLLM when it is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheForm:
    """Layers of one model.

    Attributes:
      full, windows, states: layers of full attention, with sliding windows, with one state for each request.
      kv_heads, head_size: of all layers of attention.
      window: tokens that a layer with a window sees.
      block_size: tokens of a block; None = whatever is asked for.
    """

    full: int
    kv_heads: int
    head_size: int
    windows: int = 0
    window: int = 0
    states: int = 0
    block_size: int | None = None

    def groups(self, config: Any, block_size: int) -> list[Any]:
        """vLLM's ``KVCacheGroupSpec`` of each group, by vLLM's own rules, for a ``VllmConfig``."""
        import torch

        try:
            from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
        except ModuleNotFoundError:  # before 0.33
            from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

        config.cache_config.kv_cache_layout = "LBNHC"  # any that has layers outermost; an engine would choose it
        shape = {"block_size": block_size, "num_kv_heads": self.kv_heads, "head_size": self.head_size}
        full = FullAttentionSpec(**shape, dtype=torch.bfloat16)
        specs: dict[str, Any] = {f"full.{i}": full for i in range(self.full)}
        if self.windows:
            window = SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=self.window)
            specs |= {f"window.{i}": window for i in range(self.windows)}
        if self.states:
            state = {"shapes": ((1,),), "dtypes": (torch.bfloat16,), "page_size_padded": full.page_size_bytes}
            specs |= {f"state.{i}": MambaSpec(config.model_config.max_model_len, **state) for i in range(self.states)}
        return list(get_kv_cache_groups(config, specs))


FORMS = {
    "full": CacheForm(1, 1, 64),
    "gpt-oss-120b": CacheForm(18, 8, 64, windows=18, window=128),
    "gemma-3-27b": CacheForm(10, 16, 128, windows=52, window=1024),
    "qwen3-next-80b": CacheForm(12, 2, 256, states=36, block_size=544),
}


_FULL = "FullAttentionSpec"


def blocks_at_end(groups: Sequence[Any], num_tokens: int) -> tuple[int, int]:
    """Blocks that a request holds that has written so many tokens: of full attention, and of all groups."""
    held = [_held(group.kv_cache_spec, num_tokens) for group in groups]
    full = (n for n, group in zip(held, groups, strict=True) if type(group.kv_cache_spec).__name__ == _FULL)
    return sum(full), sum(held)


def demand(groups: Sequence[Any], lengths: Iterable[int], in_flight: int) -> int:
    """Blocks that so many requests hold at their ends, by the mean of all of them."""
    final = [blocks_at_end(groups, length)[1] for length in lengths]
    return round(sum(final) / len(final) * in_flight)


def _held(spec: Any, num_tokens: int) -> int:
    blocks = -(-num_tokens // spec.block_size)
    window = getattr(spec, "sliding_window", None)
    return blocks if window is None else min(blocks, -(-(window - 1) // spec.block_size) + 1)
