"""Throughput against the size of the KV pool, with and without sharing, and the ceiling that memory alone sets.

Each point is a run of `full`, `full-guaranteed` and `aligned` with a pool of a share of `full`'s measured peak demand.
The ceiling is 1 / (1 - saved), where saved is the share of a request's resident blocks that sharing frees when memory
does not bind: with a step time that did not depend on the batch, no more could be gained. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.benchmark_run import run_benchmark
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.report.plots import plot_pressure

_KEPT = (
    "variant", "request_throughput_req_s", "correct_answers_per_s", "accuracy", "shared_block_fraction",
    "mean_requests_in_flight", "mean_resident_blocks_per_request", "paused_requests", "mean_step_ms",
    "mean_output_tokens", "search_time_fraction",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--num-requests", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    options = BenchmarkOptions(
        arguments.engine_dir, arguments.dataset, ("full", "aligned"), num_requests=arguments.num_requests
    )
    free = {v["variant"]: v for v in run_benchmark(options, command)["variants"]}
    demand = free["full"]["peak_used_blocks"]
    saved = 1 - free["aligned"]["mean_resident_blocks_per_request"] / free["full"]["mean_resident_blocks_per_request"]
    points: list[dict[str, Any]] = []
    for share in arguments.shares:
        blocks = max(1, round(demand * share))
        three = replace(
            options, variants=("full", "full-guaranteed", "aligned"), kv_cache_blocks=blocks, repeat=arguments.repeat
        )
        variants = [{name: v[name] for name in _KEPT} for v in run_benchmark(three, command)["variants"]]
        by_name = {v["variant"]: v for v in variants}
        best = max(by_name[n]["request_throughput_req_s"] for n in ("full", "full-guaranteed"))
        best_right = max(by_name[n]["correct_answers_per_s"] for n in ("full", "full-guaranteed"))
        points.append(
            {
                "share": share,
                "kv_cache_blocks": blocks,
                "ratio": by_name["aligned"]["request_throughput_req_s"] / best,
                "right_ratio": by_name["aligned"]["correct_answers_per_s"] / best_right,
                "in_flight_ratio": by_name["aligned"]["mean_requests_in_flight"]
                / by_name["full"]["mean_requests_in_flight"],
                "step_time_ratio": by_name["aligned"]["mean_step_ms"] / by_name["full"]["mean_step_ms"],
                "variants": variants,
            }
        )
    ceiling = 1 / (1 - saved)
    print(f"\n{'pool / demand':>13} {'blocks':>7} {'req/s ratio':>12} {'in flight':>10} {'step time':>10}")
    for p in points:
        print(
            f"{p['share']:>13.3f} {p['kv_cache_blocks']:>7} {p['ratio']:>12.2f} {p['in_flight_ratio']:>10.2f} "
            f"{p['step_time_ratio']:>10.2f}"
        )
    print(f"ratios: aligned over the better full; ceiling 1 / (1 - {saved:.2f}) = {ceiling:.2f}")
    document = make_report(
        {
            "dataset": {"path": str(arguments.dataset), "num_requests": arguments.num_requests},
            "peak_demand_blocks": demand,
            "resident_blocks_saved": saved,
            "ceiling": ceiling,
            "points": points,
        },
        command,
    )
    if arguments.plot is not None:
        plot_pressure(document, arguments.plot)
    publish(document, arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
