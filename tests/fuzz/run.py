"""Coverage-guided fuzzing of every parser (atheris): `python tests/fuzz/run.py --seconds 60`.

Each target runs in a process of its own, from the committed corpus; inputs that reach new code are kept in
--new-corpus. docs/reliability.md shows the table that it prints. atheris is for Linux and Python 3.11 or later.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
_TOTAL = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
_PEAK = re.compile(r"stat::peak_rss_mb:\s+(\d+)")
_SLOWEST = re.compile(r"stat::slowest_unit_time_sec:\s+(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, help="inputs for each target, in place of --seconds")
    parser.add_argument("--timeout", type=int, default=2, help="seconds of one input, by the clock; more if busy")
    parser.add_argument("--targets", nargs="*", default=[], help="default: all")
    parser.add_argument("--new-corpus", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzz.targets import NAMES

    rows: list[dict[str, object]] = []
    summary: dict[str, object] = {}
    for name in options.targets or NAMES:
        limit = f"-runs={options.runs}" if options.runs else f"-max_total_time={options.seconds}"
        started = time.monotonic()
        (row,) = fuzz([name], limit, options.new_corpus, options.timeout)
        rows.append({**row, "seconds": round(time.monotonic() - started)})
        print(json.dumps(rows[-1]), flush=True)
        summary = {"inputs": sum(int(str(row["inputs"])) for row in rows)}
        summary["failed"] = [row["target"] for row in rows if row["failed"]]
        if options.output_json:  # after every row: a run that is cut short keeps what it has
            command = " ".join(["python", *sys.argv])
            report = {"command": command, "targets": rows, **summary}
            options.output_json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(bool(summary["failed"]))


def fuzz(names: list[str], limit: str, kept: Path | None = None, timeout_s: int = 2) -> list[dict[str, object]]:
    """Each target until libFuzzer's ``limit``: how many inputs, and whether one failed.

    What they need is imported once, by a process that forks for each: importing takes longer than 1,000 inputs.
    """
    folder = Path(tempfile.mkdtemp()) if kept is None else kept
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--worker", str(folder), limit, str(timeout_s), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    codes = dict(line.split() for line in done.stdout.splitlines())
    if len(codes) < len(names):
        print(done.stderr[-3000:], file=sys.stderr)
    return [_row(name, folder / f"{name}.log", codes.get(name, "none")) for name in names]


def _row(name: str, path: Path, code: str) -> dict[str, object]:
    log = path.read_text(errors="replace") if path.exists() else ""

    def last(pattern: re.Pattern[str]) -> int:
        found = pattern.findall(log)
        return int(found[-1]) if found else 0

    row = {
        "target": name,
        "inputs": last(_TOTAL),
        "coverage": last(_COVERAGE),
        "peak_mb": last(_PEAK),
        "slowest_s": last(_SLOWEST),
        "failed": code != "0",
    }
    if row["failed"]:
        print(log[-3000:], file=sys.stderr)
    return row


def _work(folder: Path, limit: str, timeout_s: str, names: list[str]) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import atheris

    with atheris.instrument_imports(include=["trtllm_memshare", "json"]):
        from fuzz import targets

        for name in names:
            targets.find_target(name)
    for name in names:
        child = os.fork()
        if not child:
            log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            limits = [limit, f"-timeout={timeout_s}", "-rss_limit_mb=1500", "-max_len=4096", "-print_final_stats=1"]
            places = [f"-artifact_prefix={folder}/{name}-", str(folder / name), str(CORPUS / name)]
            atheris.Setup([name, *limits, *places], lambda data, name=name: targets.run_target(name, data) and None)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
        print(name, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        main()
