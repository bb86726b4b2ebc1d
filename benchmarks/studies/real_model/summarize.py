"""Draws the picture of docs/real_model.md and counts what stands behind it; ``benchmarks.pages.fill`` fills tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.real_rows import read_rows
    from trtllm_memshare.report.real_model import summary
    from trtllm_memshare.report.real_model_plots import plot_loss_and_recall
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

ROWS = Path("benchmarks/results/real_model.jsonl")
RECALL = Path("benchmarks/studies/real_model/results/recall.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, default=ROWS, help="default: %(default)s")
    parser.add_argument("--recall", type=Path, default=RECALL, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="write the picture")
    arguments = parser.parse_args()
    rows, recall_rows = read_rows(arguments.rows), read_rows(arguments.recall)
    if arguments.plot is not None:
        plot_loss_and_recall(rows, recall_rows, arguments.plot)
    print(json.dumps(summary(rows, recall_rows)))


if __name__ == "__main__":
    run_command_line(main)
