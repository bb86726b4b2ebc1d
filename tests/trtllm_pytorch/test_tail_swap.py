"""Sharing under random schedules: whatever happens, each token reads its own row or that of its accepted counterpart."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_v1 import FakeKVCacheManager, FakeOldAttentionMetadata, FakeOldKVCacheManager
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeLateKVCacheManagerV2

from trtllm_memshare.trtllm.pytorch.probe import wrap_prepare

MANAGERS = {
    "V1": FakeKVCacheManager,
    "V1 old": FakeOldKVCacheManager,
    "V2": FakeKVCacheManagerV2,
    "V2 late": FakeLateKVCacheManagerV2,
}


def check_contents(executor: FakeExecutor) -> None:
    """Every computed position reads what it or its counterpart wrote, and both are the same token."""
    shared, size = executor.manager.memshare, executor.manager.tokens_per_block
    active = {r.py_request_id for r in executor.active}
    for request_id in active & set(executor._ids) & set(executor.processed):
        script = np.array(executor.scripts[request_id])
        count = min(executor.processed[request_id], len(script))
        pages = executor.row(request_id)[: -(-count // size)].numpy()
        positions, entries = np.arange(count), np.arange(len(pages))
        if request_id in shared._known:
            sequence, pool = shared.manager._sequences[request_id], shared.manager.pool
            rows = sequence.token_rows[: min(count, sequence.num_tokens)]
            positions[: len(rows)] = pool.origin_position[rows // size] + rows % size
            table = shared.manager.origin_blocks(request_id)[: len(pages)]
            entries[: len(table)] = table
        assert (script[positions] == script[:count]).all()
        page_of = np.full(len(pages), -1)
        page_of[entries] = pages  # origin block -> a page that some entry of this request names
        held = executor.pool[:, 0, 0, 0, :, 0].numpy()[page_of[positions // size], positions % size]
        assert held.tolist() == [executor.prefix_id(request_id, p) for p in positions.tolist()]


def check_pages(executor: FakeExecutor) -> None:
    """No page is leaked or owned twice, and prompts are where they were."""
    manager = executor.manager
    caches = getattr(manager, "kv_cache_map", None)
    resident = [i for i in executor.processed if caches is None or caches[i].is_active]
    held = [p for i in resident for p in manager.get_batch_cache_indices([i])[0]]
    if not manager.enable_block_reuse:
        assert len(held) == len(set(held))
        assert len(held) + manager.get_num_free_blocks() == executor.pool.shape[0]
    for request_id in executor.processed:
        known = manager.memshare._known.get(request_id)
        if known is not None:
            prompt = executor.request(request_id).orig_prompt_len // manager.tokens_per_block
            seen = known.pages.position[:prompt]
            assert seen == list(range(len(seen)))
    manager.memshare.manager.check_integrity()


def run(kind: str, seed: int, overlap: bool, reuse: bool = False, **config) -> FakeExecutor:
    """A schedule drawn from a seed: arrivals, lengths, pool size, cancellations."""
    rng = random.Random(seed)
    size = rng.choice([4, 8])
    # Just enough for one request of any length, or for all of them.
    num_blocks = 212 // size + 2 + rng.randrange(12) if rng.random() < 0.7 else 400
    manager = make_manager(make_sharing_class(MANAGERS[kind], **config), num_blocks, size, reuse=reuse)
    metadata = None
    if kind == "V1 old":
        metadata_class = type("Metadata", (FakeOldAttentionMetadata,), {})
        wrap_prepare(metadata_class)
        metadata = metadata_class(manager)
    executor = FakeExecutor(manager, overlap, metadata)
    pending = list(range(rng.randrange(2, 9)))
    prompt = repetitive_text(rng, 20)
    for step in range(2000):
        while pending and rng.random() < 0.3:
            head = prompt[: rng.randrange(1, 20)] if reuse else repetitive_text(rng, rng.randrange(1, 30))
            executor.submit(pending.pop(), head, repetitive_text(rng, rng.randrange(40, 180)))
        if executor.active and rng.random() < 0.01:
            executor.cancel(rng.choice(executor.active).py_request_id)
        executor.step()
        if step % 3 == 0:
            check_contents(executor)
        check_pages(executor)
        if not pending and not executor.active:
            break
    assert not executor.active, "the schedule did not end"
    if not reuse:
        assert manager.get_num_free_blocks() == num_blocks
    return executor


@pytest.mark.parametrize("kind", MANAGERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_keeps_every_token_readable(kind, seed, overlap):
    run(kind, seed, overlap)
