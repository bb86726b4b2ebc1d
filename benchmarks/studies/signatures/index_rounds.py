"""Rounds of the index of signatures: pages come, as many go, and redundancy is asked of all requests."""

from __future__ import annotations

import time

import numpy as np
import torch

from trtllm_memshare.search.signature_index import SignatureIndex
from trtllm_memshare.search.signatures import WIDTH

TOKENS_PER_PAGE = 16
PAGES_A_ROUND = 4


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
