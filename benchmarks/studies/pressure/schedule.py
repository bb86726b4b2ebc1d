"""Pools and floors at size: the schedule of every arm over real traces, without a model.

What requests wait for, how many are in flight, who is paused and how many steps it all takes follow from lengths, pools
and floors alone; the text decides which pages repeat. So the scheduler, the cache and pressure run as they are, the
model is left out, and steps are given the times of a bandwidth model (**modelled, not measured**). Loss and measured
times are ``inflight_batching.py --replay``'s.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.benchmark import Load, run_variant
from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.document import make_report, write_report
from trtllm_memshare.evaluation.real_texts import cut_traces
from trtllm_memshare.evaluation.variants import Variant, parse_variant
from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

_SIZE = 16
_ARMS = (
    "full",
    "full-guaranteed",
    *(f"pressure:min_kept={kept}" for kept in ("1", "0.75", "0.5", "0.5,overcommit=1.5", "0.25")),
)


class ModellessRunner:
    """Computes nothing: every token is as likely as another, and the script says which one comes."""

    num_layers, tokens_per_block, skips_entries, null_pages = 1, _SIZE, True, None

    def __init__(self, num_blocks: int, vocab_size: int) -> None:
        self.num_blocks, self.vocab_size = num_blocks, vocab_size
        self._logits = torch.zeros(1, vocab_size)

    def prepare(self, batch: StepBatch) -> StepBatch:
        return batch

    def step(self, batch: StepBatch) -> StepOutput:
        return StepOutput(self._logits.expand(len(batch.chunk_lengths), -1), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="whose tokenizer cuts the traces")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=1536, help="of a request, problem and written text")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0], help="of the peak demand")
    parser.add_argument("--arms", nargs="+", default=_ARMS, metavar="VARIANT")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, len(tokenizer))
    texts = cut_traces(tokenizer, options.num_requests, options.max_tokens, options.seed)
    items = [DatasetItem(i, prompt, len(output), None, output) for i, (prompt, output) in enumerate(texts)]
    demand = sum(-(-(len(prompt) + len(output)) // _SIZE) for prompt, output in texts)
    load = Load(64, 2048, options.max_tokens + 1, "MAX_UTILIZATION", (), replay=True)
    rows = []
    shares = " ".join(f"{share:g}" for share in options.shares)
    command = f"python -m benchmarks.studies.pressure.schedule --model-dir models/smollm2 --shares {shares}"
    for share in options.shares:
        runner = ModellessRunner(round(share * demand), len(tokenizer))
        for name in options.arms:
            variant = _variant(name)
            entry = run_variant(variant, runner, boundaries, items, load, lambda *_: False).entry
            rows.append(_row(entry, share, runner.num_blocks))
            print(json.dumps(rows[-1]), flush=True)
            report = {"num_requests": len(items), "max_tokens": options.max_tokens, "demand_blocks": demand}
            if options.output_json is not None:
                write_report(make_report({**report, "rows": rows}, command), options.output_json)


def _variant(name: str) -> Variant:
    """An arm whose pages are ranked by age: which pages go changes no schedule, and there is no K or V to look at."""
    variant = parse_variant(name, make_config("off"))
    if variant.config.preset != "pressure":
        return variant
    return replace(variant, config=variant.config.model_copy(update={"need": "age"}))


def _row(entry: dict[str, Any], share: float, num_blocks: int) -> dict[str, Any]:
    in_flight = entry["timeline"]["requests_in_flight"]
    return {
        "variant": entry["variant"],
        "pool_share": share,
        "num_blocks": num_blocks,
        "num_steps": entry["num_steps"],
        "modelled_gpu": entry["modelled_gpu"],
        "mean_in_flight": sum(in_flight) / len(in_flight),
        "paused_requests": entry["paused_requests"],
        "recomputed_tokens": entry["recomputed_tokens"],
        "shared_block_fraction": entry["shared_block_fraction"],
        "pressure": entry["pressure"],
        "machinery_time_fraction": entry["search_time_fraction"],
    }


if __name__ == "__main__":
    run_command_line(main)
