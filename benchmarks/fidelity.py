"""What sharing costs against the memory it frees: presets, settings and controls at equal memory.

    python benchmarks/fidelity.py --dataset benchmarks/data/evaluation.jsonl --arms aligned lexical streaming
    python benchmarks/fidelity.py --dataset benchmarks/data/tuning.jsonl --arms aligned aligned:max_distance=0.35

For each arm: accuracy with its 95 % interval and paired tests, and, teacher-forced on the full cache's own transcripts
(or on the data set's `output`), the Kullback-Leibler divergence from the full cache and the perplexity. The full cache
is always measured. Nothing reported depends on the clock. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.arms import parse_arm
    from trtllm_memshare.evaluation.curve import CurveOptions, measure_curve
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.session import Session
    from trtllm_memshare.evaluation.variants import VARIANTS
    from trtllm_memshare.report.fidelity import fidelity_table, plot_fidelity
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines with answers, or with output")
    parser.add_argument("--num-problems", type=int, help="first lines of the data set only")
    parser.add_argument(
        "--arms", nargs="+", required=True, metavar="ARM", help=f"VARIANT[:KEY=VALUE,...]; {', '.join(VARIANTS)}"
    )
    parser.add_argument("--match", default="aligned", help="arm whose memory the controls' budgets are matched to")
    parser.add_argument("--against", nargs="*", default=["full", "aligned"], help="arms of the paired tests")
    parser.add_argument(
        "--replay-problems", type=int, default=100, help="problems read teacher-forced (default 100; 0 = none)"
    )
    parser.add_argument("--no-accuracy", action="store_true", help="teacher-forced scores alone")
    parser.add_argument("--keep-dir", type=Path, help="folder in which generations are kept for later runs")
    parser.add_argument("--samples", type=int, default=1, help="answers to each problem, which scope=group may share")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the full cache and of every arm, 0 = greedy")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    session = Session(
        arguments.engine_dir,
        arguments.dataset,
        arguments.num_problems,
        arguments.device,
        arguments.keep_dir,
        arguments.samples,
        arguments.temperature,
    )
    arms = [parse_arm(text, session.engine.memshare) for text in arguments.arms]
    options = CurveOptions(
        arguments.replay_problems, not arguments.no_accuracy, arguments.match, tuple(arguments.against)
    )

    def document(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "engine_dir": str(arguments.engine_dir),
            "dataset": str(arguments.dataset),
            "num_problems": len(session.items),
            "replay_problems": min(arguments.replay_problems, len(session.items)),
            "samples": arguments.samples,
            "temperature": arguments.temperature,
            "match": arguments.match,
            "against": arguments.against,
            "arms": entries,
        }

    def show(so_far: list[dict[str, Any]]) -> None:
        print(fidelity_table(document(so_far)), file=sys.stderr)

    entries = measure_curve(session, arms, options, show)
    report = make_report(document(entries))
    print(fidelity_table(report))
    if arguments.plot is not None:
        plot_fidelity(report, arguments.plot)
    publish(report, arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
