"""Host time of the hook on the stand-ins, with what a GPU does by itself left out."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch
from trtllm_pytorch.conftest import TextlessFacts, sharing_class, write_null_pages
from trtllm_pytorch.fake_executor import make_cache_config, make_mapping
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import FakeKVCacheManager

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.texts import make_streams
from trtllm_memshare.search.block_search import ReadyDistances
from trtllm_memshare.search.config import HOST_NEED, make_config
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.pytorch.settings import AdapterOptions, Settings


class InstantSearch:
    """The host's share of a search: the pairs are packed, the sums come back as zeros."""

    description = "stand-in, distance 0 at once"

    def compare(self, pairs: PairBatch) -> ReadyDistances:
        np.stack((pairs.new_rows, pairs.old_rows, pairs.position_delta))
        sums = np.ones((len(pairs), 1, 4), np.float32)
        sums[:, :, [0, 2]] = 0
        return ReadyDistances(sums, 0.0)


class InstantRedundancy:
    """Products on the GPU are not the host's work: every page is as redundant as any."""

    def catch_up(self, requests: Sequence[tuple[int, int, np.ndarray]]) -> None:
        pass

    def measure(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        return np.zeros(len(pages), np.float32)

    def forget(self, request_id: int) -> None:
        pass


def measure(options: argparse.Namespace, preset: str | None) -> dict[str, float]:
    """Milliseconds of an iteration for one preset, or without sharing (None)."""
    longest = options.max_length + options.warm_up + options.steps + 2
    streams, boundaries = make_streams(options.traces, longest)

    class Facts(TextlessFacts):
        def boundaries(self, tokenizer_dir: str | None):
            return boundaries

    size, count = options.tokens_per_block, options.requests
    manager_class = FakeKVCacheManager
    if preset is not None:
        folder = write_null_pages(tempfile.mkdtemp(), list(range(0, longest + 2048, 2048)), num_layers=1)
        need = {"need": HOST_NEED} if preset == "pressure" else {}
        settings = Settings(make_config(preset, **need), AdapterOptions(stats_interval=100, null_pages=folder))
        manager_class = sharing_class(FakeKVCacheManager, Facts(None), settings)
    rng = np.random.default_rng(0)
    prompts = [int(rng.integers(options.min_length, options.max_length)) for _ in range(count)]
    blocks = sum(-(-(p + options.steps) // size) for p in prompts)
    # Under pressure there is room for three quarters; the others have all that they need.
    blocks = round(0.75 * blocks) if preset == "pressure" else count * (longest // size + 2)
    manager = manager_class(
        make_cache_config(blocks, size), "SELF", num_layers=1, num_kv_heads=1, head_dim=2,
        tokens_per_block=size, max_seq_len=longest, max_batch_size=count, mapping=make_mapping(),
    )  # fmt: skip
    shared = getattr(manager, "memshare", None)
    if shared is not None:
        shared._searcher._search = InstantSearch()
        if shared.pressure is not None:
            shared.pressure._redundancy = InstantRedundancy()
    requests, scripts = [], []
    for request_id in range(count):
        text = streams[request_id % len(streams)].tolist()
        request = FakeLlmRequest(request_id, text[: prompts[request_id]])
        request.orig_prompt_len = 100  # the rest counts as generated: shared from the start
        requests.append(request)
        scripts.append(text)
        if shared is not None and shared.pressure is not None:
            # With so much generated it is one that was paused and comes back: the others make room for it, where a new
            # prompt would have to fit between the watermarks.
            shared.pressure._paused[request_id] = request.prompt_len // size + 2
    table = torch.zeros(1, count, 2, manager.max_blocks_per_seq, dtype=torch.int32)
    running: list[FakeLlmRequest] = []
    hook, whole = [], []
    for step in range(options.warm_up + options.steps):
        # Prompts enter a few at a time, as max_num_tokens of a forward pass allows.
        needed = sum(map(manager.impl.get_needed_blocks_one_step, running))
        arriving, free = [], manager.get_num_free_blocks() - needed
        for request in requests[len(running) : len(running) + options.admitted_per_step]:
            free -= request.prompt_len // size + 1
            if free >= 0 and step < options.warm_up:
                arriving.append(request)
        batch = ScheduledRequests(arriving, list(running))
        ids = [r.py_request_id for r in batch.all_requests()]
        before, started = shared.seconds if shared else 0.0, time.perf_counter()
        manager.prepare_resources(batch)
        manager.copy_batch_block_offsets(table, ids, 1, len(arriving), len(ids))
        whole.append((time.perf_counter() - started) * 1e3)
        hook.append(((shared.seconds if shared else 0.0) - before) * 1e3)
        for request in running:
            request.add_new_token(scripts[request.py_request_id][request.max_beam_num_tokens], 0)
        for request in arriving:
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
        running += arriving
    if len(running) < count:
        raise UserError(f"{len(running)} of {count} requests were admitted (give a longer --warm-up)")
    first = hook[: options.warm_up]
    hook, whole = hook[options.warm_up :], whole[options.warm_up :]
    result = {
        "hook_ms_mean": statistics.mean(hook),
        "hook_ms_p50": statistics.median(hook),
        "hook_ms_p99": float(np.percentile(hook, 99)),
        "hook_ms_max": max(hook),
        "iteration_ms_mean": statistics.mean(whole),
        "admission_ms_per_1000_tokens": sum(first) / sum(r.prompt_len for r in requests) * 1e3,
    }
    if shared is not None:
        stats = shared.manager.stats()
        result |= {"blocks_shared": stats.shared + stats.forgotten, "candidates": shared.policy.num_candidates}
        assert shared.failures.num_errors == 0
    return result
