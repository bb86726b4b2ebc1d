"""What pressure does to vLLM's schedule, counted in steps: its own scheduler, the texts of traces, no model.

The same work as ``vllm_pressure.py``: how many steps all requests take, how many are in flight, who is preempted, and
how many tokens are computed, those computed again after a preemption included. Nothing here depends on the machine.
Steps have times too, by the model of a GPU's in ``trtllm_memshare/evaluation/step_model.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, write_report
    from trtllm_memshare.evaluation.vllm_run import run_scheduler
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT, VllmWork
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["vllm", "admission", "0.75", "0.5", "0.25"])
    parser.add_argument("--admissions", nargs="+", default=["lookahead"], help="vllm, lookahead or max-tokens")
    parser.add_argument("--output-json", type=Path)
    VllmWork.add_options(
        parser, requests=48, in_flight=16, shorter_by=4, longest_answer=1024, block_size=16, protected_tokens=128
    )
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    work = VllmWork.from_options(options)
    runs = []
    for part in options.parts:
        for arm in options.arms:
            for admission in options.admissions if arm != "vllm" else ["vllm"]:
                run = {"part": part, "arm": arm, "admission": admission}
                runs.append(run | run_scheduler(work, arm, admission, work.pool_blocks(part)))
                print(_line(runs[-1]), flush=True)
    if options.output_json:
        write_report(make_report({"workload": work.describe(admission=None), "runs": runs}), options.output_json)


def _line(run: dict[str, Any]) -> str:
    return (
        f"1/{run['part']} {run['arm']:<10} {run['admission']:<10} {run['blocks']} blocks: {run['steps']} steps, "
        f"in flight {run['mean_in_flight']:.1f}, preempted {run['preemptions']}, computed {run['tokens_computed']}, "
        f"p50 {run['p50_steps']:.0f}, p99 {run['p99_steps']:.0f}, retired {run['retired']}"
    )


if __name__ == "__main__":
    run_command_line(main)
