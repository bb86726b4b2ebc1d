"""What the whole study takes from nothing: every kind of row timed on a few texts, times the rows that are committed.

Each module runs as ``all.sh`` runs it, into a file of its own, and the time from row to row is taken. A kind is an arm
at a share, length of a page and length of a text; the full cache's row holds the full pass.

    python -m benchmarks.studies.real_model.row_times
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

try:
    from benchmarks.studies.real_model.timing import RESULTS, number_of_rows, parts, time_rows, time_whole
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.machine import describe_machine
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--texts", type=int, default=2, help="to time in each part (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "row_times.json")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for path, words in parts((Path(__file__).parent / "all.sh").read_text(encoding="utf-8")):
        if words[0] == "loops":
            found.append({"file": path.name, "core_hours": round(time_whole(words) / 3600, 3)})
        else:
            seconds = {kind: statistics.median(times) for kind, times in time_rows(words, arguments.texts).items()}
            rows = {kind: number_of_rows(path, words, kind) for kind in seconds}
            hours = sum(seconds[kind] * count for kind, count in rows.items()) / 3600
            found.append({"file": path.name, "rows": sum(rows.values()), "core_hours": round(hours, 3)})
            found[-1]["seconds_a_row"] = {"/".join(map(str, kind)): round(s, 2) for kind, s in seconds.items()}
        print(json.dumps({name: value for name, value in found[-1].items() if name != "seconds_a_row"}), flush=True)
    total = round(sum(part["core_hours"] for part in found), 2)
    document = {"machine": describe_machine(), "texts": arguments.texts, "core_hours": total, "parts": found}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    run_command_line(main)
