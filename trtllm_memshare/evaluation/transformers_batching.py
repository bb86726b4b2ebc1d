"""Transformers' own continuous batching, for a comparison of our executor with somebody else's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from trtllm_memshare.evaluation.dataset import DatasetItem


def run_transformers(
    model: Any, items: Sequence[DatasetItem], eos: int, page_size: int, num_blocks: int, max_batch_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds and output ids of ``generate_batch``, greedy, every answer as long as the first item allows.

    Args:
      model: a causal language model of transformers.
      eos: token that ends an answer.
      page_size: tokens of a page of its cache.
      num_blocks: pages.
      max_batch_tokens: tokens of a step.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(
        max_new_tokens=items[0].output_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True
    )
    batching = ContinuousBatchingConfig(
        page_size=page_size, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, allow_block_sharing=False
    )
    started = time.perf_counter()
    outputs = model.generate_batch(
        [i.input_ids for i in items], generation_config=generation, continuous_batching_config=batching, warmup=False
    )
    seconds = time.perf_counter() - started
    ordered = sorted(outputs.values(), key=lambda o: int(o.request_id.rsplit("_", 1)[-1]))
    return seconds, [list(o.generated_tokens) for o in ordered]
