"""vLLM alone against vLLM with memory pressure: same model, pool, requests and answers' lengths, on a CPU.

Prompts are problems of recorded DeepSeek-R1 traces, answers get a share of their traces' lengths and no end token. The
demand is what all requests in flight hold at their ends; pools are parts of it. Every arm is a process of its own. All
requests are there at the start. Seconds are counted twice: on the clock, and as the process's own CPU time, which other
work on the machine does not lengthen; the engine runs on one thread.

With ``--free`` the model is asked in its chat template and ends its answers itself, sampled at temperature 0.6 with a
seed for each request; ``--longest-answer`` is the most, and the demand is that of answers which are all so long. What
was given up then changes what is written, and how much.

With ``--replay`` answers are the traces' texts, the same in every arm, and the loss of these texts is told: a small
model that answers greedily repeats itself, the more so the more was taken from it, and repeats go below the floor.

The arms: ``vllm`` is vLLM as it comes. ``admission`` is our admission alone, nothing retired. A number is ``min_kept``
with the need ``redundancy``; ``random`` and ``age`` are needs at ``min_kept`` 0.5; ``default`` is our default.
``paper-0.62`` is the published method at that ``min_kept``: the page that is nearest to an earlier one goes, and that
one is read in its place. With ``-skip`` after its name an arm of ours leaves null entries out of attention, and
needs no null pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.evaluation.document import document_of_runs, make_report, write_report
    from trtllm_memshare.evaluation.vllm_run import run_engine
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT, VllmWork
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["vllm", "admission", "0.75", "0.5", "0.25", "random"])
    parser.add_argument("--admission", default="lookahead", choices=["vllm", "lookahead", "max-tokens"])
    parser.add_argument("--output-json", type=Path, help="runs are added to those of the same workload in it")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--free", action="store_true", help="answers as long as the model makes them")
    answers.add_argument("--replay", action="store_true", help="answers are the traces' texts, the same in all arms")
    parser.add_argument("--run-arm", nargs=2, metavar=("ARM", "BLOCKS"), help=argparse.SUPPRESS)
    VllmWork.add_options(
        parser, requests=12, in_flight=8, shorter_by=16, longest_answer=256, block_size=32, protected_tokens=32
    )
    options = parser.parse_args()
    work = VllmWork.from_options(options)
    if options.run_arm:
        run = run_engine(work, options.run_arm[0], options.admission, int(options.run_arm[1]))
        print(json.dumps({name: value for name, value in run.items() if name != "answers"}))
        return
    report = make_report({})
    workload = {**work.describe(options.admission), "free": work.free, "replay": work.replay}
    document = document_of_runs(workload, options.output_json)
    for part in options.parts:
        for arm in options.arms:
            run = {"part": part, "arm": arm, **report, **_in_process(arm, work.pool_blocks(part))}
            document["runs"].append(run)
            print(_line(run), flush=True)
            if options.output_json:
                write_report(document, options.output_json)


def _in_process(arm: str, blocks: int) -> dict[str, Any]:
    line = [sys.executable, *sys.argv, "--run-arm", arm, str(blocks)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"arm {arm} with {blocks} blocks failed: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _line(run: dict[str, Any]) -> str:
    rate = run["answer_tokens"] / run["cpu_seconds"]
    latency, count = run["cpu_latency"], len(run["answer_lengths"])
    return (
        f"1/{run['part']} {run['arm']:<10} {run['blocks']} blocks: {run['cpu_seconds']:.0f} CPU s, "
        f"{run['seconds']:.0f} s, {count / run['cpu_seconds']:.3f} requests and {rate:.0f} tokens a CPU s, mean answer "
        f"{run['answer_tokens'] / count:.0f}, {run['own_ends']} ended by the model, in flight "
        f"{run['mean_in_flight']:.1f}, preempted {run['preemptions']:.0f}, p50 {latency['p50']:.0f}, p99 "
        f"{latency['p99']:.0f} CPU s, retired {run['retired']}"
    )


if __name__ == "__main__":
    run_command_line(main)
