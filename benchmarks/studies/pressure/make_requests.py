"""Writes real reasoning traces as requests with written outputs, for ``inflight_batching.py --replay``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.real_texts import read_traces, token_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="whose tokenizer cuts the traces")
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=512, help="written tokens of each request")
    parser.add_argument("--max-prompt-tokens", type=int, default=128, help="longer problems are passed over")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/data/trace_requests.jsonl"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    length, rows = options.max_prompt_tokens + options.output_tokens, list[str]()
    for text in token_texts(read_traces(), tokenizer, length):
        if text.num_prompt_tokens <= options.max_prompt_tokens and len(rows) < options.num_requests:
            row = {
                "task_id": len(rows),
                "prompt": text.trace.prompt,
                "output": tokenizer.decode(text.ids[text.num_prompt_tokens :]),
                "output_tokens": options.output_tokens,
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    options.output.write_text("".join(rows), encoding="utf-8")
    print(f"{len(rows)} requests: {options.output}")


if __name__ == "__main__":
    run_command_line(main)
