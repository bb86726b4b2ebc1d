"""What the index of signatures costs as requests grow: each round every request gets pages and gives as many up.

    python -m benchmarks.studies.signatures.index_cost
    python -m benchmarks.studies.signatures.index_cost --device cuda --output-json FILE

Signatures are random; a token's nearest one may be anywhere, as in text. A round is what pressure asks for at once; a
step that writes one token for each request fills ``requests / tokens_per_page`` pages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

try:
    import torch

    from benchmarks.studies.signatures.index_rounds import PAGES_A_ROUND, TOKENS_PER_PAGE, time_rounds
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

SHAPES = ((32, 32), (64, 64), (64, 128), (256, 64), (256, 128))
"""Requests, and resident pages of each: with half of the pages kept, 128 are an answer of 4,096 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed ones of each shape (default: %(default)s)")
    parser.add_argument(
        "--output-json", type=Path, default=Path("benchmarks/studies/signatures/results/index_cost.json")
    )
    arguments = parser.parse_args()
    rows = list[dict[str, Any]]()
    for requests, pages in SHAPES:
        seconds = statistics.median(time_rounds(requests, pages, arguments.rounds, arguments.device))
        a_page = seconds / (requests * PAGES_A_ROUND)
        rows.append(
            {
                "requests": requests,
                "resident_pages": pages,
                "round_ms": round(seconds * 1e3, 3),
                "ms_a_page": round(a_page * 1e3, 4),
                "ms_a_step": round(a_page * 1e3 * requests / TOKENS_PER_PAGE, 3),
            }
        )
        print(rows[-1], flush=True)
    head = {"device": arguments.device, "pages_a_round": PAGES_A_ROUND, "tokens_per_page": TOKENS_PER_PAGE}
    publish(make_report({**head, "torch_threads": torch.get_num_threads(), "rows": rows}), arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
