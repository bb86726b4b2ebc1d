"""Host time that sharing adds to an iteration of TensorRT-LLM's PyTorch backend, measured on the tests' fake manager.

256 requests decode real reasoning text with the overlap scheduler's delay of one token. Timed is what runs inside the
manager's `prepare_resources` and `copy_batch_block_offsets` beyond TensorRT-LLM's own work: reading tokens, stage 1,
candidates, decisions, page lists, rows. What a GPU does by itself is left to a stand-in: the comparison returns at once
with a distance of 0, so that everything is shared, which is the most work for the host; page copies and the gather run
on tiny tensors on the CPU and count in full. The launch of the CUDA kernel is not in it. Preset `pressure` has room for
three quarters of the pages, so that the others go; how redundant each page is, a GPU says.

    PYTHONPATH=tests python -m trtllm_pytorch.pytorch_hook

The last line is JSON; times in milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trtllm_pytorch.hook_cost import measure

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--min-length", type=int, default=1000, help="tokens of a request at the start")
    parser.add_argument("--max-length", type=int, default=8000)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600, help="iterations that count")
    parser.add_argument("--admitted-per-step", type=int, default=2, help="prompts that one forward pass takes")
    parser.add_argument("--warm-up", type=int, default=150, help="iterations before, that admit all requests")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the one with the median mean counts")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'preset':<10} {'mean ms':>8} {'p50':>6} {'p99':>6} {'max':>6}  {'fake iteration':>14} {'freed':>7}")
    for preset in (None, "aligned", "lexical", "pressure"):
        rounds = sorted((measure(options, preset) for _ in range(options.repeat)), key=lambda r: r["hook_ms_mean"])
        row = rows[preset or "unpatched"] = rounds[len(rounds) // 2]
        times = " ".join(f"{row[f'hook_ms_{n}']:>6.3f}" for n in ("p50", "p99", "max"))
        print(
            f"{preset or 'unpatched':<10} {row['hook_ms_mean']:>8.3f} {times}  {row['iteration_ms_mean']:>14.3f} "
            f"{row.get('blocks_shared', 0):>7}"
        )
    publish(
        make_report(
            {
                "requests": options.requests,
                "tokens_per_block": options.tokens_per_block,
                "lengths": [options.min_length, options.max_length],
                "steps": options.steps,
                "rows": rows,
            },
            " ".join(["PYTHONPATH=tests python -m trtllm_pytorch.pytorch_hook", *sys.argv[1:]]),
        ),
        options.output_json,
    )


if __name__ == "__main__":
    run_command_line(main)
