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
import time
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.search.signature_index import SignatureIndex
    from trtllm_memshare.search.signatures import WIDTH
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

TOKENS_PER_PAGE = 16
PAGES_A_ROUND = 4
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


def time_rounds(requests: int, pages: int, rounds: int, device: str) -> list[float]:
    """Seconds of each round, signing left out: pages come, others go, and redundancy is asked of all requests."""
    generator, draws = torch.Generator().manual_seed(0), np.random.default_rng(0)
    index = SignatureIndex(TOKENS_PER_PAGE, device=device)
    _extend(index, requests, 0, pages, _random_signatures(requests * pages, generator, device))
    resident = np.tile(np.arange(pages), (requests, 1))
    found = list[float]()
    for turn in range(rounds + 1):  # the first one warms up
        first = pages + turn * PAGES_A_ROUND
        signatures = _random_signatures(requests * PAGES_A_ROUND, generator, device)
        going = draws.permuted(resident, axis=1)[:, :PAGES_A_ROUND]
        _synchronize(device)
        started = time.perf_counter()
        _extend(index, requests, first, PAGES_A_ROUND, signatures)
        for request in range(requests):
            index.forget(request, going[request])
        for request in range(requests):
            index.redundancy(request)  # on the host: whatever it waits for has ended
        found.append(time.perf_counter() - started)
        stays = [np.setdiff1d(row, gone) for row, gone in zip(resident, going, strict=True)]
        resident = np.array([np.append(row, np.arange(first, first + PAGES_A_ROUND)) for row in stays])
    return found[1:]


def _extend(index: SignatureIndex, requests: int, first: int, count: int, signatures: torch.Tensor) -> None:
    index.extend([(request, np.arange(first, first + count)) for request in range(requests)], signatures)


def _random_signatures(pages: int, generator: torch.Generator, device: str) -> torch.Tensor:
    numbers = torch.randn(pages, TOKENS_PER_PAGE, WIDTH, generator=generator)
    return torch.nn.functional.normalize(numbers, dim=-1).to(device)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_command_line(main)
