"""Serving without a model: real scheduler, cache and pressure over texts whose lengths alone matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from trtllm_memshare.evaluation.benchmark import Load, run_variant
from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.variants import Variant, parse_variant
from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

TOKENS_PER_BLOCK = 16


class ModellessRunner:
    """Computes nothing: every token is as likely as another, and the script says which one comes."""

    num_layers, tokens_per_block, skips_entries, null_pages = 1, TOKENS_PER_BLOCK, True, None

    def __init__(self, num_blocks: int, vocab_size: int) -> None:
        self.num_blocks, self.vocab_size = num_blocks, vocab_size
        self._logits = torch.zeros(1, vocab_size)

    def reserve_null_pages(self, are_used: bool) -> None:
        """It has none."""

    def prepare(self, batch: StepBatch) -> StepBatch:
        return batch

    def step(self, batch: StepBatch) -> StepOutput:
        return StepOutput(self._logits.expand(len(batch.chunk_lengths), -1), None)


def modelless_variant(name: str) -> Variant:
    """An arm whose pages are ranked by age: which pages go changes no schedule, and there is no K or V to look at."""
    variant = parse_variant(name, make_config("off"))
    if variant.config.preset != "pressure":
        return variant
    return replace(variant, config=variant.config.model_copy(update={"need": "age"}))


def serve(
    name: str, texts: list[tuple[list[int], list[int]]], boundaries: BoundaryTokens, num_blocks: int, in_flight: int
) -> dict[str, Any]:
    """Serves all texts and returns what the schedule was like.

    Args:
      name: of the arm, see ``evaluation.variants``.
      texts: (prompt, output) of each request, token ids.
      num_blocks: the pool.
      in_flight: most requests that are outstanding at once; the next one arrives when one has ended.
    """
    items = [DatasetItem(i, prompt, len(output), None, output) for i, (prompt, output) in enumerate(texts)]
    longest = max(len(prompt) + len(output) for prompt, output in texts)
    load = Load(in_flight, 2048, longest + 1, "MAX_UTILIZATION", (), concurrency=in_flight, replay=True)
    runner = ModellessRunner(num_blocks, len(boundaries.blank))
    entry = run_variant(modelless_variant(name), runner, boundaries, items, load, lambda *_: False).entry
    return {
        "variant": entry["variant"],
        "num_blocks": num_blocks,
        "num_steps": entry["num_steps"],
        "modelled_gpu": entry["modelled_gpu"],
        "modelled_gpu_null_read": entry["modelled_gpu_null_read"],
        "mean_in_flight": entry["mean_requests_in_a_step"],
        "peak_blocks": entry["peak_used_blocks"],
        "paused_requests": entry["paused_requests"],
        "recomputed_tokens": entry["recomputed_tokens"],
        "shared_block_fraction": entry["shared_block_fraction"],
        "pressure": entry["pressure"],
        "machinery_time_fraction": entry["search_time_fraction"],
    }
