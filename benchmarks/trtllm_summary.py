"""One table of the arms that benchmarks/trtllm_suite.sh ran: throughput, sharing, and whether shadow changed a token.

The last line is JSON. Fails if shadow's outputs differ from TensorRT-LLM's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.report.document import make_report, publish

ARMS = ("alone", "shadow", "aligned", "lexical")


def read(path: Path) -> Any:
    """A JSON file of the suite. Raises UserError if it is not there."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no {path}: that arm did not finish, its log is {path.with_suffix('.log').name}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what trtllm_suite.sh wrote")
    folder = parser.parse_args().folder
    rows = {}
    print(
        f"{'arm':<8} {'req/s':>8} {'ratio':>6} {'tok/s':>9} {'in flight':>9} {'blocks freed':>12} {'of generated':>12}"
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
            f"{arm:<8} {row['request_throughput_req_s']:>8.2f} {ratio:>6.2f} {row['output_throughput_tok_s']:>9.0f} "
            f"{row['mean_requests_in_flight']:>9.1f} {row['blocks_shared']:>12} {row['shared_block_fraction']:>12.1%}"
        )
    same = read(folder / "alone.tokens.json") == read(folder / "shadow.tokens.json")
    print(f"shadow gives TensorRT-LLM's own outputs: {'yes' if same else 'NO'}")
    publish(make_report({"arms": rows, "shadow_is_identical": same}), folder / "summary.json")
    if not same:
        raise UserError("shadow must not change a token, but its outputs differ (see *.tokens.json)")


if __name__ == "__main__":
    run_command_line(main)
