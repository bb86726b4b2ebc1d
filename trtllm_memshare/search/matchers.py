"""Chooses stage 1 by the settings."""

from __future__ import annotations

from collections.abc import Callable

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.run_matcher import RunMatcher
from trtllm_memshare.search.step_matcher import StepMatcher
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Matcher


def make_matcher_factory(
    config: MemShareConfig, tokens_per_block: int, boundaries: BoundaryTokens
) -> Callable[[int], Matcher]:
    """A function that makes stage 1 for a request, given its number of prompt tokens."""
    kind = RunMatcher if config.matcher == "runs" else StepMatcher
    return lambda num_prompt_tokens: kind(config, tokens_per_block, num_prompt_tokens, boundaries)
