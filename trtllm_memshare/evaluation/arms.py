"""The arms of a fidelity curve: a variant, or a variant with settings, and budgets that make controls comparable."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_memshare.evaluation.benchmark import budget_share, streaming_window
from trtllm_memshare.evaluation.benchmark_options import parse_setting
from trtllm_memshare.evaluation.variants import make_variant
from trtllm_memshare.search.config import MemShareConfig


@dataclass(frozen=True)
class Arm:
    """``name``: as it was asked for. ``budget``: the setting to be matched to another arm's memory, None = nothing."""

    name: str
    config: MemShareConfig
    budget: str | None = None

    def with_memory_of(self, spans: list[tuple[int, int]], block_steps_per_request: float, size: int) -> Arm:
        """This arm with the budget at which it holds ``block_steps_per_request``; itself if it has none to match.

        Args:
          spans: tokens of the prompt and of the output of each request, with the full cache.
          size: tokens per block.
        """
        if self.budget is None:
            return self
        config, value = self.config, 0.0
        if self.budget == "budget_share":
            value = budget_share(spans, block_steps_per_request, config.protected_tokens, size)
        else:
            sink = config.streaming_sink_tokens if self.budget == "streaming_window_tokens" else 0
            value = streaming_window(spans, block_steps_per_request, sink, size)
        return Arm(self.name, config.model_copy(update={self.budget: value}))


def parse_arm(text: str, engine: MemShareConfig) -> Arm:
    """``VARIANT`` or ``VARIANT:KEY=VALUE,KEY=VALUE``, for example ``aligned:protected_tokens=32,protected_steps=1``.

    A budget that is given is kept; one that is not will be matched.

    Raises:
      UserError: unknown variant or setting, or a value out of range.
    """
    variant, _, rest = text.partition(":")
    settings = dict(parse_setting(part) for part in rest.split(",")) if rest else {}
    config = make_variant(variant, engine, **settings).config
    budget = None
    if config.control == "streaming":
        budget = "streaming_window_tokens"
    elif config.control in ("snapkv", "rkv"):
        budget = "budget_share" if config.budget == "share" else "budget_tokens"
    return Arm(text, config, None if budget in settings else budget)
