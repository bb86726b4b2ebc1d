"""Writes real reasoning traces as requests with written outputs, for ``inflight_batching.py --replay``.

With ``--in-flight`` it also says what they hold at most: the scheduler and the cache serve them without a model, in a
pool in which nobody waits (``peak_demand_blocks``, of 16 tokens). With ``--arms`` they do so in ``--kv-cache-blocks``
too, arm by arm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

try:
    from transformers import AutoTokenizer

    from benchmarks.studies.pressure.modelless import TOKENS_PER_BLOCK, serve
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.evaluation.dataset import read_dataset
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.real_texts import cut_traces
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="whose tokenizer cuts the traces")
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=704, help="of a request, problem and written text")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths, drawn from a quarter of that upwards")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/data/trace_requests.jsonl"))
    parser.add_argument("--in-flight", type=int, help="outstanding at any time: measure the demand")
    parser.add_argument("--demand-json", type=Path, help="where the demand is written")
    parser.add_argument("--kv-cache-blocks", type=int, help="a pool for --arms")
    parser.add_argument("--arms", nargs="+", default=[], metavar="VARIANT", help="served in it without a model")
    options = parser.parse_args()
    if options.in_flight is not None and options.in_flight < 1:
        raise UserError(f"--in-flight must be at least 1, got {options.in_flight} (12 requests at a time: 12)")
    if options.arms and not (options.in_flight and options.kv_cache_blocks):
        raise UserError("--arms needs --in-flight and --kv-cache-blocks, got no number for one of them (give both)")
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    rows = []
    for index, (prompt, output) in enumerate(
        cut_traces(tokenizer, options.num_requests, options.max_tokens, options.seed)
    ):
        texts = {"prompt": tokenizer.decode(prompt), "output": tokenizer.decode(output)}
        rows.append(json.dumps({"task_id": index, **texts, "output_tokens": len(output)}, ensure_ascii=False) + "\n")
    options.output.write_text("".join(rows), encoding="utf-8")
    print(f"{len(rows)} requests: {options.output}")
    if options.in_flight is not None:
        demand = measure_demand(options.output, tokenizer, options.in_flight, options.arms, options.kv_cache_blocks)
        publish(make_report(demand), options.demand_json)


def measure_demand(
    requests: Path, tokenizer: Any, in_flight: int, arms: list[str], blocks: int | None
) -> dict[str, Any]:
    """What the requests of a file hold at most when nobody waits for memory, how long they are, and arms in a pool."""
    items = read_dataset(requests, tokenizer)
    texts = [(item.input_ids, item.output_ids or []) for item in items]
    longest = max(len(prompt) + len(output) for prompt, output in texts)
    enough = in_flight * (longest // TOKENS_PER_BLOCK + 2)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, len(tokenizer))
    return {
        "num_requests": len(texts),
        "in_flight": in_flight,
        "mean_written_tokens": mean(len(output) for _, output in texts),
        "longest_request_tokens": longest,
        "peak_demand_blocks": serve("full", texts, boundaries, enough, in_flight)["peak_blocks"],
        **({"kv_cache_blocks": blocks} if arms else {}),
        **({"variants": [serve(arm, texts, boundaries, blocks or 0, in_flight) for arm in arms]} if arms else {}),
    }


if __name__ == "__main__":
    run_command_line(main)
