"""Runs that take minutes: a hundred thousand requests, one of 32,000 tokens, and a soak. Part of ``make nightly``."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import psutil
from fakes.counting_runner import CountingRunner, expected
from nightly import only_nightly

from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

pytestmark = only_nightly
SOAK_S = float(os.environ.get("MEMSHARE_SOAK_S", "600"))


def make(boundaries, num_blocks: int, max_seq_len: int, preset: str = "off", **options) -> Executor:
    config = make_config(preset)
    return Executor(CountingRunner(num_blocks), config, boundaries, max_seq_len, **options)  # type: ignore[arg-type]


def test_a_hundred_thousand_short_requests(boundaries):
    executor = make(boundaries, 2000, 64)
    prompts = [[i % 80] for i in range(100_000)]
    handles = [executor.submit(p, SamplingParams(2)) for p in prompts]
    executor.run_until_idle()
    assert all(h.result(0).token_ids == expected(p, 2) for h, p in zip(handles, prompts, strict=True))
    assert executor.manager.pool.num_used == 0
    executor.manager.check_integrity()


def test_one_request_of_32_000_tokens_shares_and_ends(boundaries):
    executor = make(boundaries, 2100, 33_000, "lexical")
    handle = executor.submit([5], SamplingParams(32_000))
    executor.run_until_idle()
    assert handle.result(0).token_ids == expected([5], 32_000)
    assert executor.manager.stats().shared > 1000
    assert executor.manager.stats().peak_used_blocks < 1000
    executor.manager.check_integrity()


def test_memory_threads_and_blocks_stay_flat(boundaries):
    """Ten minutes of requests that come, end, are cancelled and are refused."""
    rng, process = random.Random(3), psutil.Process()
    before = threading.active_count()
    sizes: list[int] = []
    with make(boundaries, 400, 512, "lexical", max_batch_size=16, max_queue_size=64) as executor:
        end, next_look = time.monotonic() + SOAK_S, 0.0
        handles: list = []
        while time.monotonic() < end:
            try:
                count = rng.choice([1, 5, 100, 400])
                handles.append(executor.submit([rng.randrange(80)] * rng.randint(1, 60), SamplingParams(count)))
            except ValueError:  # the queue is full
                time.sleep(0.002)
            if rng.random() < 0.3 and handles:
                rng.choice(handles).cancel()
            handles = [h for h in handles if not h.future.done()]
            if time.monotonic() > next_look:
                gc.collect()
                sizes.append(process.memory_info().rss)
                next_look = time.monotonic() + SOAK_S / 30
    for handle in handles:
        assert handle.result(0).finish_reason in ("length", "cancelled")
    assert executor.manager.pool.num_used == 0
    executor.manager.check_integrity()
    assert threading.active_count() == before
    third = len(sizes) // 3
    assert max(sizes[-third:]) < max(sizes[third : 2 * third]) + 16 * 2**20
