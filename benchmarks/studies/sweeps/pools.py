"""Throughput against the size of the KV pool, with and without sharing, and the ceiling that memory alone sets.

Each point is a run of `full`, `full-guaranteed` and `aligned` with a pool of a share of `full`'s measured peak demand.
The ceiling is 1 / (1 - saved), where saved is the share of a request's resident blocks that sharing frees when memory
does not bind: with a step time that did not depend on the batch, no more could be gained. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from benchmarks.studies.sweeps.sweep import measure_pools, pools_table
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
    from trtllm_memshare.evaluation.benchmark_run import run_benchmark
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.report.plots import plot_pressure
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


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
    figures = measure_pools(options, arguments.shares, arguments.repeat, lambda o: run_benchmark(o, command))
    print(f"\n{pools_table(figures)}")
    document = make_report(figures, command)
    if arguments.plot is not None:
        plot_pressure(document, arguments.plot)
    publish(document, arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
