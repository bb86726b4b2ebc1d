"""Whether a waiting request may join: could everybody, brought down to the floor, go on for some tokens more?

vLLM admits what fits now and preempts when it stops fitting. The same question, and the same arithmetic, as our own
executor's admission (``search.floors``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.floors import blocks_at_floors, most_protected
from trtllm_memshare.vllm.relief import Relief
from trtllm_memshare.vllm.settings import Admission


def admits(
    request: Any,
    running: Sequence[Any],
    relief: Relief,
    admission: Admission,
    config: MemShareConfig,
    num_blocks: int,
    block_size: int,
) -> bool:
    """Whether the pool holds ``request`` beside those that run. Always where nobody runs: somebody must get on.

    Args:
      request, running: vLLM's requests.
      relief: knows what each of them may give up.
      admission: see ``VllmOptions``.
      config: what is protected, and how many tokens each must be able to write under ``lookahead``.
      num_blocks: the pool without null pages.
      block_size: tokens of a block.
    """
    if admission == "vllm" or not running:
        return True
    requests = [*running, request]
    longest = np.array([r.num_prompt_tokens + r.max_tokens for r in requests])
    now = np.array([r.num_tokens for r in requests])
    options = [relief.pages(r.request_id).options for r in requests]
    held = blocks_at_floors(
        longest if admission == "max-tokens" else np.minimum(longest, now + config.lookahead_tokens),
        np.array([r.num_prompt_tokens for r in requests]),
        np.array([o.min_kept if o.memshare else 1.0 for o in options]),
        most_protected(config),
        block_size,
        np.array([relief.pages(r.request_id).num_retired for r in requests]),
    )
    return held <= num_blocks
