"""Transformers' own continuous batching, for a comparison of our executor with somebody else's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_memshare.evaluation.dataset import DatasetItem

Served = tuple[float, list[list[int]]]
"""Seconds for all requests, and the output ids of each in their order."""


@dataclass(frozen=True)
class Round:
    """Seconds of both in one round, and the share of requests to which both gave the same tokens."""

    ours: float
    theirs: float
    same_tokens: float


def run_in_turns(ours: Callable[[], Served], theirs: Callable[[], Served], num_rounds: int) -> Iterator[Round]:
    """Serves the same requests with one, then with the other, in every round."""
    for _ in range(num_rounds):
        our_seconds, our_outputs = ours()
        their_seconds, their_outputs = theirs()
        same = sum(a == b for a, b in zip(our_outputs, their_outputs, strict=True)) / len(our_outputs)
        yield Round(our_seconds, their_seconds, same)


def summarize_rounds(rounds: Sequence[Round], num_requests: int) -> dict[str, Any]:
    """Requests a second by each one's median round, ``ratio`` by the median of the rounds' own ratios.

    ``same_tokens`` is that of the round in which it was least.
    """
    ours, theirs = [r.ours for r in rounds], [r.theirs for r in rounds]
    return {
        "full_seconds": ours,
        "transformers_seconds": theirs,
        "full_req_s": num_requests / statistics.median(ours),
        "transformers_req_s": num_requests / statistics.median(theirs),
        "ratio": statistics.median(r.theirs / r.ours for r in rounds),
        "same_tokens": min(r.same_tokens for r in rounds),
    }


def run_transformers(
    model: Any, items: Sequence[DatasetItem], eos: int, page_size: int, num_blocks: int, max_batch_tokens: int
) -> Served:
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
