"""Share against accuracy over a setting: one variant, many values, the same problems, with 95 % intervals.

    python -m benchmarks.studies.sweeps.settings --variant aligned --values max_aliases=2 max_distance=0.35

A value may name several settings: `protected_tokens=32,protected_steps=1`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions, parse_setting
from trtllm_memshare.evaluation.benchmark_run import run_benchmark
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.statistics import wilson_interval

_KEPT = (
    "accuracy", "shared_block_fraction", "block_steps_per_request", "mean_output_tokens", "rejected", "refused",
    "paused_requests", "num_steps",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/tuning.jsonl"))
    parser.add_argument("--num-requests", type=int, help="first lines of the data set only")
    parser.add_argument("--variant", default="aligned")
    parser.add_argument("--values", nargs="+", required=True, metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--kv-cache-blocks", type=int, help="blocks of the KV pool (default: enough for every request)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each request, which scope=group may share")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling, 0 = greedy")
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    options = BenchmarkOptions(
        arguments.engine_dir,
        arguments.dataset,
        ("full",),
        kv_cache_blocks=arguments.kv_cache_blocks,
        num_requests=arguments.num_requests,
        samples=arguments.samples,
        temperature=arguments.temperature,
    )
    full = run_benchmark(options, command)
    rows = [{"values": "full", **{name: full["variants"][0][name] for name in _KEPT}}]
    for text in arguments.values:
        settings = tuple(parse_setting(part) for part in text.split(","))
        report = run_benchmark(replace(options, variants=(arguments.variant,), settings=settings), command)
        rows.append({"values": text, **{name: report["variants"][0][name] for name in _KEPT}})
    count, base = full["dataset"]["num_requests"], rows[0]["block_steps_per_request"]
    print(
        f"\n{arguments.variant}: {'values':<44} {'shared':>7} {'right':>7}  95 % interval   block-steps  steps  paused"
    )
    for row in rows:
        row["interval"] = wilson_interval(round(row["accuracy"] * count), count)
        low, high = row["interval"]
        print(
            f"{'':<{len(arguments.variant) + 2}}{row['values']:<44} {row['shared_block_fraction']:>7.1%} "
            f"{row['accuracy']:>7.1%}  {low:.1%} to {high:.1%}  {row['block_steps_per_request'] / base:.2f}         "
            f"{row['num_steps']:>6} {row['paused_requests']:>7}"
        )
    print(f"{count} problems of {arguments.dataset}")
    document = make_report(
        {
            "dataset": full["dataset"],
            "variant": arguments.variant,
            "kv_cache_blocks": full["kv_cache_blocks"],
            "samples": arguments.samples,
            "temperature": arguments.temperature,
            "rows": rows,
        },
        command,
    )
    publish(document, arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
