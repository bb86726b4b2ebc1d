"""In-flight batching with and without MemShare: same engine, same requests, same KV pool.

Runs every variant over a data set and reports throughput, latency, accuracy and memory, as a table, JSON and a
picture. The last line on stdout is the report as JSON, without timelines. With --model or -m, `memshare bench` hands
everything on to trtllm-bench instead, but --null-pages FOLDER or --null-entries skip and --memshare-config FILE, which
set MemShare in TensorRT-LLM's PyTorch backend.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(command: str, arguments: list[str]) -> None:
    """Runs it; see ``--help``."""
    if any(a in ("-m", "--model") or a.startswith("--model=") for a in arguments):
        from trtllm_memshare.trtllm.pytorch.wrap import main as run_trtllm_bench

        run_trtllm_bench("bench", arguments)
        return
    # Imports of torch and transformers take seconds, which trtllm-bench need not wait for.
    from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
    from trtllm_memshare.evaluation.benchmark_run import run_benchmark
    from trtllm_memshare.evaluation.variants import VARIANTS
    from trtllm_memshare.report.benchmark_report import publish_benchmark
    from trtllm_memshare.serving.scheduler import MAX_UTILIZATION, POLICIES

    parser = argparse.ArgumentParser(
        prog=command, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="JSON lines: task_id, prompt, messages or input_ids, output_tokens[, answer]",
    )
    parser.add_argument(
        "--chat-template", action="store_true", help="prompts are a user's messages: put each into the model's template"
    )
    parser.add_argument(
        "--add-special-tokens",
        choices=("auto", "yes", "no"),
        default="auto",
        help="that the tokenizer puts around a prompt, such as BOS; auto: unless the prompt begins with it",
    )
    parser.add_argument("--kv-cache-blocks", type=int, help="blocks of the KV pool (default: enough for every request)")
    parser.add_argument(
        "--kv-cache-share",
        type=float,
        help="instead: pool as a share in (0, 1] of the full cache's measured peak demand",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        help=f"NAME[:KEY=VALUE,...]; {', '.join(VARIANTS)} (default: full, aligned and the engine's own preset)",
    )
    parser.add_argument("--concurrency", type=int, help="most requests outstanding (default: all)")
    parser.add_argument("--request-rate", type=float, help="mean arrivals per second (default: as fast as possible)")
    parser.add_argument("--num-requests", type=int, help="first lines of the data set only")
    parser.add_argument("--samples", type=int, default=1, help="answers to each request, which scope=group may share")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling, 0 = greedy")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all variants; times are medians")
    parser.add_argument("--scheduler-policy", default=MAX_UTILIZATION, choices=POLICIES)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings laid over those of sharing variants"
    )
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG: throughput, blocks in use and requests in flight over time")
    parser.add_argument("--output-texts", type=Path, help="JSON lines with what the first variant generated")
    parser.add_argument(
        "--read-null", action="store_true", help="torch runner: read null entries instead of skipping them (the same)"
    )
    parser.add_argument(
        "--read-aliases",
        choices=("fold", "repeat"),
        default="fold",
        help="read a block that a table names m times once, weighted (fold), or m times, as TensorRT-LLM does (repeat)",
    )
    parser.add_argument(
        "--engine-cuda-graphs", action="store_true", help="CUDA graphs of a TensorRT engine's pure decode steps"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="requests generate the outputs of the data set, whatever the model says: equal texts in all arms, and the "
        "loss on them",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    options = BenchmarkOptions.from_arguments(parser.parse_args(arguments))
    report = run_benchmark(options, command=" ".join(["python", *sys.argv]))
    if not report:
        return  # not rank 0
    publish_benchmark(report, options)
    for variant in report["variants"]:
        variant.pop("timeline")
    print(json.dumps(report))
