"""What the whole study takes from nothing: every kind of row timed on a few texts, times the rows that are committed.

Each command of ``all.sh`` runs into a file of its own, and the time from row to row is taken. A kind is an arm at a
share, length of a page and length of a text; the full cache's row holds the full pass. A command of arms that were
timed before is not timed again; a share that was not timed takes what a half takes, as a quarter and three quarters do.

    python -m benchmarks.studies.real_model.row_times
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

try:
    from benchmarks.studies.real_model.timing import RESULTS, arms_of, kind_of, parts, time_rows, time_whole
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.machine import describe_machine
    from trtllm_memshare.evaluation.real_rows import read_rows
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--texts", type=int, default=2, help="to time in each part (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "row_times.json")
    arguments = parser.parse_args()
    before = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    machine = before.get("machine") or describe_machine()  # of the last command that was timed
    found: dict[str, dict[str, Any]] = {part["file"]: part for part in before.get("parts", [])}
    for path, words in parts((Path(__file__).parent / "all.sh").read_text(encoding="utf-8")):
        part = found.setdefault(path.name, {"file": path.name, "rows": 0, "core_hours": 0.0})
        seconds = part.get("seconds_a_row", {})
        if words[0] == "loops":
            part["core_hours"] = part["core_hours"] or round(time_whole(words) / 3600, 3)
        elif not seconds or not set(arms_of(words)) <= {kind.split("/")[0] for kind in seconds}:
            times, machine = time_rows(words, arguments.texts), describe_machine()
            part["seconds_a_row"] = {
                **{"/".join(map(str, kind)): round(statistics.median(of_kind), 2) for kind, of_kind in times.items()},
                **seconds,
            }
        if "seconds_a_row" in part:
            rows = Counter("/".join(map(str, kind_of(row))) for row in read_rows(path))
            hours = sum(_seconds(part["seconds_a_row"], kind) * count for kind, count in rows.items()) / 3600
            part["rows"], part["core_hours"] = sum(rows.values()), round(hours, 3)
        total = round(sum(part["core_hours"] for part in found.values()), 2)
        document = {"machine": machine, "texts": arguments.texts, "core_hours": total}
        arguments.output.write_text(json.dumps({**document, "parts": list(found.values())}, indent=1) + "\n")
        print(json.dumps({name: part.get(name) for name in ("file", "rows", "core_hours")}), flush=True)


def _seconds(timed: dict[str, float], kind: str) -> float:
    arm, _, *others = kind.split("/")
    return timed[kind] if kind in timed else timed.get("/".join([arm, "0.5", *others]), 0.0)


if __name__ == "__main__":
    run_command_line(main)
