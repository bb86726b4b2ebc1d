"""What pressure does to vLLM's schedule, counted in steps: its own scheduler, the texts of traces, no model.

The same work as ``vllm_pressure.py``: how many steps all requests take, how many are in flight, who is preempted, and
how many tokens are computed, those computed again after a preemption included. Nothing here depends on the machine.
Steps have times too, by the model of a GPU's in ``trtllm_memshare/evaluation/step_model.py``. With ``--cache`` the pool
is shared as by another model's layers (``trtllm_memshare/evaluation/cache_forms.py``): give arms that end in ``-skip``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.cache_forms import FORMS, blocks_at_end, demand
    from trtllm_memshare.evaluation.document import make_report, write_report
    from trtllm_memshare.evaluation.vllm_run import make_groups, run_scheduler
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT, VllmWork
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["vllm", "admission", "0.75", "0.5", "0.25"])
    parser.add_argument("--admissions", nargs="+", default=["lookahead"], help="vllm, lookahead or max-tokens")
    parser.add_argument(
        "--cache", nargs="+", default=["full"], choices=sorted(FORMS), help="whose layers share the pool"
    )
    parser.add_argument("--output-json", type=Path)
    VllmWork.add_options(
        parser, requests=48, in_flight=16, shorter_by=4, longest_answer=1024, block_size=16, protected_tokens=128
    )
    options = parser.parse_args()
    # Texts may be longer than the model of the tokenizer could read: no model runs.
    os.environ.update(ENVIRONMENT, VLLM_ALLOW_LONG_MAX_MODEL_LEN="1")
    whole = VllmWork.from_options(options)
    lengths = [len(prompt) + length for prompt, length in whole.requests]
    caches, runs = {}, []
    for name in options.cache:
        work = replace(whole, block_size=FORMS[name].block_size or whole.block_size)
        groups = make_groups(work, FORMS[name])
        wanted = demand(groups, lengths, work.in_flight)
        full, held = blocks_at_end(groups, round(sum(lengths) / len(lengths)))
        caches[name] = {"block_size": work.block_size, "demand_blocks": wanted, "share_of_full_attention": full / held}
        for part in options.parts:
            for arm in options.arms:
                for admission in options.admissions if arm != "vllm" else ["vllm"]:
                    run = {"cache": name, "part": part, "arm": arm, "admission": admission}
                    runs.append(run | run_scheduler(work, arm, admission, -(-wanted // part) + 2, groups))
                    print(_line(runs[-1]), flush=True)
    if options.output_json:
        write_report(
            make_report({"workload": whole.describe(admission=None), "caches": caches, "runs": runs}),
            options.output_json,
        )


def _line(run: dict[str, Any]) -> str:
    return (
        f"{run['cache']} 1/{run['part']} {run['arm']:<10} {run['admission']:<10} {run['blocks']} blocks: "
        f"{run['steps']} steps, "
        f"in flight {run['mean_in_flight']:.1f}, preempted {run['preemptions']}, computed {run['tokens_computed']}, "
        f"p50 {run['p50_steps']:.0f}, p99 {run['p99_steps']:.0f}, retired {run['retired']}"
    )


if __name__ == "__main__":
    run_command_line(main)
