"""A request whose pages were dropped is paused by main, freed, and computed anew."""

from __future__ import annotations

import random

import pytest
from trtllm_pytorch.conftest import make_settings
from trtllm_pytorch.fake_executor import repetitive_text
from trtllm_pytorch.fake_framework import FrameworkExecutor
from trtllm_pytorch.fake_requests import LlmRequestState
from trtllm_pytorch.test_framework import SHORT, bound


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_is_computed_anew_is_as_long_as_its_text_again(overlap):
    """Main frees it first, then resets lengths, but not by how much the sequence was shorter."""
    rng = random.Random(3)
    compression, manager = bound(make_settings(**SHORT, null_pages="unused"), 60, config={"host_cache_size": 1 << 30})
    executor, dropper = FrameworkExecutor(manager, overlap, compression), compression.memshare
    for request_id in range(4):
        executor.submit(request_id, repetitive_text(rng, rng.randrange(1, 30)), repetitive_text(rng, 180))
    drop, plain, victims = dropper._drop, executor._schedule, []

    def dropping(request, pages):
        drop(request, pages)
        rows = executor.expected[request.py_request_id]
        for page in sorted(pages, reverse=True):
            assert page * 8 >= request.prompt_len, "a prompt's page was dropped"
            del rows[page * 8 : page * 8 + 8]

    def schedule():
        running = [r for r in executor.active if r.state is LlmRequestState.GENERATION_IN_PROGRESS]
        found = [r for r in running if r.py_num_compressed_tokens and not victims]
        if not found:
            return plain()
        victims.append(found[0])
        compression.free_resources(found[0])
        manager.free_resources(found[0])
        executor.active.remove(found[0])
        batch, _ = plain()
        executor.active.append(found[0])
        executor.expected.pop(found[0].py_request_id)
        return batch, [found[0]]

    dropper._drop, executor._schedule = dropping, schedule
    for _ in range(3000):
        executor.step()
        if not executor.active:
            break
    assert victims[0].num_lives == 2
    assert not executor.active
    assert dropper.failures.num_errors == 0
