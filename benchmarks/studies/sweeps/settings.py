"""Share against accuracy over a setting: one variant, many values, the same problems, with 95 % intervals.

    python -m benchmarks.studies.sweeps.settings --variant aligned --values max_aliases=2 max_distance=0.35

A value may name several settings: `protected_tokens=32,protected_steps=1`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from benchmarks.studies.sweeps.sweep import settings_table, sweep_settings
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
    from trtllm_memshare.evaluation.benchmark_run import run_benchmark
    from trtllm_memshare.evaluation.document import make_report, publish
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


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
    figures = sweep_settings(options, arguments.variant, arguments.values, lambda o: run_benchmark(o, command))
    print(f"\n{settings_table(figures)}\n{figures['dataset']['num_requests']} problems of {arguments.dataset}")
    publish(make_report(figures, command), arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
