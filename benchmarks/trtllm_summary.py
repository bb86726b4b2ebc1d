"""One table of the arms that benchmarks/trtllm_suite.sh ran: throughput, sharing, and whether shadow changed a token.

Batches differ from run to run, so TensorRT-LLM alone need not repeat itself to the bit: shadow is held against how much
two runs of it differ. The last line is JSON. Fails if shadow differs where they do not.
"""

from __future__ import annotations

import argparse
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.evaluation.document import make_report, publish

ARMS = ("alone", "alone_again", "shadow", "aligned", "lexical")


def read(path: Path) -> Any:
    """A JSON file of the suite. Raises UserError if it is not there."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no {path}: that arm did not finish, its log is {path.with_suffix('.log').name}") from error


def count_different(first: Any, second: Any) -> int:
    """Entries of two lists, or values of two objects, that are not equal."""
    if isinstance(first, dict):
        return sum(first.get(key) != second.get(key) for key in first.keys() | second.keys())
    return sum(a != b for a, b in zip_longest(first, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what trtllm_suite.sh wrote")
    folder = parser.parse_args().folder
    rows = {}
    print(
        f"{'arm':<12} {'req/s':>8} {'ratio':>6} {'tok/s':>9} {'in flight':>9} {'blocks freed':>12} {'of generated':>12}"
    )
    for arm in ARMS:
        report = read(folder / f"{arm}.json")
        speed, ours = report["performance"], report.get("memshare", {})
        generated = ours.get("blocks_generated", 0)
        row = rows[arm] = {
            "request_throughput_req_s": speed["request_throughput_req_s"],
            "output_throughput_tok_s": speed["system_output_throughput_tok_s"],
            "mean_requests_in_flight": report["request_info"]["avg_num_concurrent_requests"],
            "blocks_shared": ours.get("blocks_shared", 0),
            "shared_block_fraction": ours["blocks_retired_of_finished"] / generated if generated else 0.0,
            "memshare": ours,
        }
        ratio = row["request_throughput_req_s"] / rows["alone"]["request_throughput_req_s"]
        print(
            f"{arm:<12} {row['request_throughput_req_s']:>8.2f} {ratio:>6.2f} {row['output_throughput_tok_s']:>9.0f} "
            f"{row['mean_requests_in_flight']:>9.1f} {row['blocks_shared']:>12} {row['shared_block_fraction']:>12.1%}"
        )
    outputs = {arm: read(folder / f"{arm}.tokens.json") for arm in ("alone", "alone_again", "shadow")}
    differ = {arm: count_different(outputs["alone"], outputs[arm]) for arm in ("alone_again", "shadow")}
    print(f"answers that differ from the first run's: second run {differ['alone_again']}, shadow {differ['shadow']}")
    publish(make_report({"arms": rows, "different_answers": differ}), folder / "summary.json")
    if differ["shadow"] and not differ["alone_again"]:
        raise UserError(f"shadow must not change a token, but {differ['shadow']} answers differ (see *.tokens.json)")


if __name__ == "__main__":
    run_command_line(main)
