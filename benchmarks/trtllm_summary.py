"""What benchmarks/trtllm_suite.sh has run, in NVIDIA's order: accuracy, activity, speed, gates.

1. Accuracy: how many answers are right, where the data set has answers, against TensorRT-LLM alone. Batches differ from
   run to run, so TensorRT-LLM alone need not repeat itself to the bit: differences are held against two runs of it.
2. Activity: pages shared and given up. An arm in which nothing was is not reported, and the suite fails.
3. A/B: the same command with one setting changed.
4. Gates: shadow changes no token where TensorRT-LLM alone repeats itself; no error of ours; no request failed; accuracy
   and throughput no further below TensorRT-LLM alone than the limits say.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.trtllm_suite import Answers, failed_gates, is_active, read_arms
    from trtllm_memshare.report.trtllm_suite import suite_table
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what trtllm_suite.sh wrote")
    parser.add_argument("--arms", nargs="+", default=["alone_again", "shadow", "aligned", "lexical"])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    rows = read_arms(options.folder, options.arms, Answers.find(options.dataset, options.model))
    active, failures = [arm for arm, row in rows.items() if is_active(arm, row)], failed_gates(rows)
    print(suite_table(rows))
    print("4 gates: " + ("all passed" if not failures else "; ".join(failures)))
    if active:
        publish(make_report({"arms": rows, "active": active, "failures": failures}), options.folder / "summary.json")
    if failures:
        raise UserError(f"{len(failures)} gates failed: {failures[0]}")


if __name__ == "__main__":
    run_command_line(main)
