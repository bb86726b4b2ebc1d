"""Paired tests over several reports of benchmarks/fidelity.py, so that two data sets together decide what one cannot.

    python benchmarks/paired_tests.py one_report.json another_report.json

Every two arms that all reports have, with the same settings, are compared over all problems; ``p_holm`` counts with
all these comparisons (Holm). The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

try:
    import numpy as np

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.curve import compare, pool_reports
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.statistics import holm, wilson_interval
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    right = pool_reports([json.loads(path.read_text()) for path in options.reports])
    pairs = list(itertools.combinations(right, 2))
    tests = [compare(right[base], right[other]) for base, other in pairs]
    corrected = holm(np.array([test["p_value"] for test in tests]))
    rows: list[dict[str, Any]] = []
    for name, flags in right.items():
        low, high = wilson_interval(flags.count("1"), len(flags))
        print(f"{name:<20} {flags.count('1') / len(flags):.2%} right ({low:.2%} to {high:.2%}) of {len(flags)}")
    for (base, other), test, p_holm in zip(pairs, tests, corrected.tolist(), strict=True):
        rows.append({"base": base, "other": other, **test, "p_holm": p_holm})
        low, high = test["interval"]
        print(
            f"{base} -> {other}: {test['lost']} lost, {test['gained']} gained, change {test['change']:+.2%} "
            f"({low:+.2%} to {high:+.2%}), p = {test['p_value']:.3g}, {p_holm:.3g} over all pairs"
        )
    report = {
        "reports": [str(path) for path in options.reports],
        "right": {name: [flags.count("1"), len(flags)] for name, flags in right.items()},
        "tests": rows,
    }
    publish(make_report(report), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
