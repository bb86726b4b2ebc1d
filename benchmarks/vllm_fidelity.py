"""What vLLM says after pages were retired, against a masked replay of the same texts that never saw those pages.

Requests run through vLLM in a pool too small for them. Which page went when is noted. Then transformers reads each text
with those pages masked from then on, and the log-probabilities of the tokens that vLLM sampled are compared. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.vllm_fidelity import BLOCK_SIZE, compare_with_replay, through_vllm
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--null-pages", type=Path, default=Path("models/smollm2-null"), help="of vllm calibrate")
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_math500.jsonl"))
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=224)
    parser.add_argument("--min-kept", type=float, default=0.25)
    parser.add_argument("--need", default="redundancy")
    parser.add_argument("--null-entries", choices=("read", "skip"), default="read")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    problems = [json.loads(line)["problem"] for line in options.traces.read_text().splitlines()[: options.requests]]
    texts = through_vllm(
        options.model_dir, options.null_pages, problems, options.answer_tokens,
        min_kept=options.min_kept, need=options.need, null_entries=options.null_entries,
    )  # fmt: skip
    result = make_report({
        "model": options.model_dir.name, "requests": len(texts), "answer_tokens": options.answer_tokens,
        "min_kept": options.min_kept, "need": options.need, "null_entries": options.null_entries,
        "block_size": BLOCK_SIZE,
        **compare_with_replay(texts, MaskedReplay(options.model_dir)),
    })  # fmt: skip
    publish(result, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
