"""Writes real reasoning traces as requests with written outputs, for ``inflight_batching.py --replay``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.real_texts import cut_traces
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="whose tokenizer cuts the traces")
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=704, help="of a request, problem and written text")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths, drawn from a quarter of that upwards")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/data/trace_requests.jsonl"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    rows = []
    for index, (prompt, output) in enumerate(
        cut_traces(tokenizer, options.num_requests, options.max_tokens, options.seed)
    ):
        texts = {"prompt": tokenizer.decode(prompt), "output": tokenizer.decode(output)}
        rows.append(json.dumps({"task_id": index, **texts, "output_tokens": len(output)}, ensure_ascii=False) + "\n")
    options.output.write_text("".join(rows), encoding="utf-8")
    print(f"{len(rows)} requests: {options.output}")


if __name__ == "__main__":
    run_command_line(main)
