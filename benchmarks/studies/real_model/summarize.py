"""Makes the tables and the picture of docs/real_model.md from the committed rows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.real_rows import read_rows
    from trtllm_memshare.report.generation import generation_tables
    from trtllm_memshare.report.real_model import fill_page, page_tables, summary
    from trtllm_memshare.report.real_model_plots import plot_loss_and_recall
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

ROWS = Path("benchmarks/results/real_model.jsonl")
RESULTS = Path("benchmarks/studies/real_model/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, default=ROWS, help="default: %(default)s")
    parser.add_argument("--recall", type=Path, default=RESULTS / "recall.jsonl", help="default: %(default)s")
    parser.add_argument("--loops", type=Path, default=RESULTS / "loops.json", help="default: %(default)s")
    parser.add_argument("--generation", type=Path, default=RESULTS / "generation.jsonl", help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="fill this page's tables, e.g. docs/real_model.md")
    parser.add_argument("--plot", type=Path, help="write the picture")
    arguments = parser.parse_args()
    rows, recall_rows = read_rows(arguments.rows), read_rows(arguments.recall)
    loops = json.loads(arguments.loops.read_text())
    tables = page_tables(rows, recall_rows, loops) | generation_tables(read_rows(arguments.generation))
    if arguments.page is not None:
        fill_page(arguments.page, tables)
    if arguments.plot is not None:
        plot_loss_and_recall(rows, recall_rows, arguments.plot)
    print("\n\n".join(f"{name}\n{table}" for name, table in tables.items()))
    print(json.dumps(summary(rows, recall_rows)))


if __name__ == "__main__":
    run_command_line(main)
