"""Null pages over 32k positions at the rotary bases of models that users serve, with attention worked out in full.

Queries and keys are made as those of a head whose queries gather around a mean before the rotation. Directions of the
null keys are fitted to that mean, band by band, as calibration does; attention over the pages that the rows name is
held against attention over the tokens that are left.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import make_cache_config, make_mapping
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import FakeKVCacheManager

from trtllm_memshare.search.block_distance import rotate

LENGTH, SIZE, DIM, LAYERS = 32_768, 32, 32, 1
PROMPT, STEPS = 64, 96


def make_queries(inv_freq: torch.Tensor, positions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotated queries around one mean, float32 ``[positions, DIM]``."""
    mean = torch.zeros(DIM)
    mean[DIM // 2 - 4 : DIM // 2] = 3.0  # in what turns slowest, as real heads have it
    return turn(mean + 0.5 * torch.randn(len(positions), DIM, generator=generator), positions, inv_freq)


def turn(rows: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotates ``[n, DIM]`` rows to their positions."""
    shaped = rows[None, :, None, None, :]  # [1, tokens as layers, heads, rows, DIM]
    return rotate(shaped, positions[None].to(torch.int32), inv_freq)[0, :, 0, 0]


def null_keys(inv_freq: torch.Tensor, bands: list[int]) -> torch.Tensor:
    """float32 ``[bands, layers, heads, DIM]``: away from all queries of the band, and long."""
    keys = []
    for start, stop in itertools.pairwise(bands):
        positions = torch.arange(start, stop, 64)
        mean = make_queries(inv_freq, positions, torch.Generator().manual_seed(7)).mean(0)
        keys.append(-60.0 * mean / mean.norm())
    return torch.stack(keys)[:, None, None]


@pytest.mark.parametrize(("base", "width"), [(10_000, 512), (1_000_000, 4096)])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_was_given_up_is_forgotten_on_both_sides_of_a_border(tmp_path, base, width, overlap):
    """Two requests of 28,000 tokens cross a border of bands while pages of theirs are null."""
    inv_freq = 1.0 / base ** (torch.arange(0, DIM, 2) / DIM)
    bands = list(range(0, LENGTH + width, width))[: LENGTH // width + 1]
    save_file(
        {"keys": null_keys(inv_freq, bands), "bands": torch.tensor(bands, dtype=torch.int32)},
        tmp_path / "null_pages.safetensors",
    )
    make = make_sharing_class(
        FakeKVCacheManager, preset="pressure", need="random", null_pages=str(tmp_path), high_watermark=0.9,
        low_watermark=0.6, protected_tokens=128, min_kept=0.5,
    )  # fmt: skip
    border = 28_672  # of both widths
    starts = [border - STEPS // 2, border - STEPS // 3]
    num_pages = len(bands) - 1 + sum(-(-(s + STEPS + 2) // SIZE) for s in starts) + 8
    manager = make(
        make_cache_config(num_pages, SIZE), "SELF", num_layers=LAYERS, num_kv_heads=1, head_dim=DIM,
        tokens_per_block=SIZE, max_seq_len=LENGTH, max_batch_size=4, mapping=make_mapping(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(LENGTH)
    content = torch.stack([turn(torch.randn(LENGTH, DIM, generator=generator), positions, inv_freq)
                           for _ in starts])  # fmt: skip
    values = torch.randn(len(starts), LENGTH, DIM, generator=generator)
    pool = manager.memshare.pool
    table = torch.zeros(1, 4, 2, manager.max_blocks_per_seq, dtype=torch.int32)
    requests = []
    for request_id, start in enumerate(starts):
        request = FakeLlmRequest(request_id, np.random.default_rng(request_id).integers(0, 50, start).tolist())
        request.orig_prompt_len = PROMPT  # the rest was generated in an earlier life
        requests.append(request)
    used: set[int] = set()

    def write(request_id: int, first: int, stop: int) -> None:
        pages = (table[0, request_id, 0] // (LAYERS * 2)).long()
        for position in range(first, stop):
            page = pages[position // SIZE]
            pool[page, 0, 0, 0, position % SIZE] = content[request_id, position]
            pool[page, 0, 1, 0, position % SIZE] = values[request_id, position]

    def attend(request_id: int, newest: int) -> None:
        query = make_queries(inv_freq, torch.tensor([newest]), generator)[0]
        pages = (table[0, request_id, 0] // (LAYERS * 2)).long()[: newest // SIZE + 1]
        keys, shown = (pool[pages, 0, f, 0].flatten(0, 1)[: newest + 1] for f in (0, 1))
        seen = torch.softmax(keys @ query / DIM**0.5, 0) @ shown
        sequence = manager.memshare.manager._sequences[request_id]
        left = np.ones(newest + 1, bool)
        gone = np.flatnonzero(sequence.retired[: newest // SIZE + 1])
        left[(gone[:, None] * SIZE + np.arange(SIZE)).ravel()] = False
        left = torch.from_numpy(left)
        logits = content[request_id, : newest + 1][left] @ query / DIM**0.5
        expected = torch.softmax(logits, 0) @ values[request_id, : newest + 1][left]
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
        null = set(pages[gone].tolist())
        assert len(null) <= 1
        used.update(null)

    manager.prepare_resources(ScheduledRequests(requests, []))
    manager.copy_batch_block_offsets(table, [0, 1], 1, 2, 2)
    for request in requests:
        pages = (table[0, request.py_request_id, 0] // (LAYERS * 2)).long()
        count = request.prompt_len
        full = pages[: -(-count // SIZE)]
        padded = torch.nn.functional.pad
        for field, source in ((0, content), (1, values)):
            rows = padded(source[request.py_request_id, :count], (0, 0, 0, len(full) * SIZE - count))
            pool[full, 0, field, 0] = rows.view(len(full), SIZE, DIM)
        request.state = LlmRequestState.GENERATION_IN_PROGRESS
        if not overlap:
            request.add_new_token(1, 0)
    for step in range(STEPS):
        manager.prepare_resources(ScheduledRequests([], requests))
        manager.copy_batch_block_offsets(table, [0, 1], 1, 0, 2)
        for request in requests:
            position = starts[request.py_request_id] + step
            write(request.py_request_id, position, position + 1)
            if step % 4 == 0 or abs(position - border) <= 2:
                attend(request.py_request_id, position)
            request.add_new_token(1, 0)
    shared = manager.memshare
    assert not shared.failures.num_errors
    assert shared.manager.stats().forgotten > 400
    assert len(used) == 2, "entries moved from one band's page to the next one's"
