"""How much of a text stage 1 brings within reach of sharing: token ids alone, no model and no K or V."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.steps import BoundaryTokens


@dataclass(frozen=True)
class Reach:
    """Of one text.

    Attributes:
      num_tokens: prompt and output.
      generated_blocks: blocks filled by the output.
      candidates: pairs of blocks that stage 1 offered.
      shared_blocks: blocks that would have been freed had stage 2 accepted every pair.
      us_per_token: processor time of stage 1 and the remaps, microseconds for each token of the output; other work on
        the machine does not count.
    """

    num_tokens: int
    generated_blocks: int
    candidates: int
    shared_blocks: int
    us_per_token: float

    @property
    def ratio(self) -> float:
        """Share of the generated blocks, in [0, 1]."""
        return self.shared_blocks / self.generated_blocks if self.generated_blocks else 0.0


def measure_reach(
    config: MemShareConfig, prompt: list[int], output: list[int], size: int, boundaries: BoundaryTokens
) -> Reach:
    """Feeds a text to the cache manager as the executor does, and takes every pair that stage 1 offers as equal.

    Args:
      config: its protections and limits hold as in serving.
      prompt, output: token ids; those of the prompt are never within reach.
      size: tokens per block.
    """
    config = config.model_copy(update={"accept_all": True, "shadow": False})
    policy = SharingPolicy(config)
    num_tokens = len(prompt) + len(output)
    num_blocks = num_tokens // size + 1
    manager = KVCacheManager(num_blocks, 1, size, num_blocks, 1, config, make_matcher_factory(config, size, boundaries))
    manager.add_sequence(0, np.array(prompt, np.int32))
    seconds, stride = 0.0, config.search_interval
    for start in range(0, len(output), stride):
        part = output[start : start + stride]
        manager.append_tokens(0, part)
        manager.mark_computed(0, len(prompt) + start + len(part))
        started = time.process_time()
        manager.apply(policy.decide(manager.candidates(), None))
        seconds += time.process_time() - started
    shared = manager.stats().shared
    generated = manager.remove_sequence(0).generated_blocks
    return Reach(num_tokens, generated, policy.num_candidates, shared, seconds / max(1, len(output)) * 1e6)
