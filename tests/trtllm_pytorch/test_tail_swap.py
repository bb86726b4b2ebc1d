"""Sharing under random schedules: each token reads its own row or that of its accepted counterpart.

Sixty schedules over all forms of the manager; MEMSHARE_SCHEDULES=1000 draws a thousand, in the nightly run.
"""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_cpp import FakeCppKVCacheManager
from trtllm_pytorch.fake_executor import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    FakeExecutor,
    make_manager,
    repetitive_text,
)
from trtllm_pytorch.fake_requests import FakeLlmRequest
from trtllm_pytorch.fake_v1 import (
    FakeKVCacheManager,
    FakeMainKVCacheManager,
    FakeOldKVCacheManager,
    FakeReusingKVCacheManager,
)
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeMainKVCacheManagerV2
from trtllm_pytorch.fake_v2_storage import FakeKVCacheV2

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.trtllm.pytorch.forward_stream import ForwardStream
from trtllm_memshare.trtllm.pytorch.null_rows import NULL_REQUEST
from trtllm_memshare.trtllm.pytorch.sharing import Sharing

NUM_SCHEDULES = int(os.environ.get("MEMSHARE_SCHEDULES", "60"))
MANAGERS = {
    "V1": FakeKVCacheManager,
    "V1 old": FakeOldKVCacheManager,
    "V1 main": FakeMainKVCacheManager,
    "V2": FakeKVCacheManagerV2,
    "V1 reuse": FakeReusingKVCacheManager,
    "V2 main": FakeMainKVCacheManagerV2,
}


def check_contents(executor: FakeExecutor) -> None:
    """Every computed position reads what it or its counterpart wrote, and both are the same token if sharing says so.

    Of what was given up for need, entries name the null page of the band that the newest query was in, or there are
    none, and the sequence is shorter by them.
    """
    shared, size = executor.manager.memshare, executor.manager.tokens_per_block
    active = {r.py_request_id for r in executor.active}
    for request_id in active & set(executor._ids) & set(executor.processed):
        script = np.array(executor.scripts[request_id])
        count = min(executor.processed[request_id], len(script))
        num_blocks = -(-count // size)
        positions, entries = np.arange(count), np.arange(num_blocks)
        is_null = np.zeros(num_blocks, bool)
        if request_id in shared.requests._known and (request_id in shared._rows or not shared.failures.is_off):
            sequence, pool = shared.manager._sequences[request_id], shared.manager.pool
            table = shared.manager.block_table(request_id)[:num_blocks]
            is_null[: len(table)] = pool.is_null[table]
            rows = sequence.token_rows[: min(count, sequence.num_tokens)]
            positions[: len(rows)] = np.where(rows < 0, -1, pool.origin_position[rows // size] + rows % size)
            entries[: len(table)] = shared.manager.origin_blocks(request_id)[:num_blocks]
        pages = executor.row(request_id)[:num_blocks].numpy()
        if shared._rows.skips:
            assert executor.num_skipped(request_id) == is_null.sum() * size
            pages = np.insert(pages[: num_blocks - is_null.sum()], np.cumsum(~is_null)[is_null], -1)
        elif is_null.any():
            assert (pages[is_null] == null_page_at(executor, request_id, count)).all()
        readable = positions >= 0
        assert (is_null[np.arange(count) // size] == ~readable).all()
        if shared._config.need != "nearest-earlier":  # of the published method any earlier page stands in
            assert (script[positions[readable]] == script[:count][readable]).all()
        page_of = np.full(num_blocks, -1)
        page_of[entries[~is_null]] = pages[~is_null]  # origin block -> a page that some entry of this request names
        where = positions[readable]
        held = executor.pool[:, 0, 0, 0, :, 0].numpy()[page_of[where // size], where % size]
        assert held.tolist() == [executor.prefix_id(request_id, p) for p in where.tolist()]


def null_page_at(executor: FakeExecutor, request_id: int, count: int) -> int:
    """The page that serves the newest query; a token's width from a border either neighbour does."""
    pages, bands = resident_pages(executor.manager, NULL_REQUEST), executor.manager.memshare._rows._null.pages.bands
    newest = count - 1
    here = {pages[int(np.searchsorted(bands, p, side="right")) - 1] for p in (newest, newest + 1) if p < bands[-1]}
    used = set(executor.row(request_id)[: -(-count // executor.manager.tokens_per_block)].tolist()) & set(pages)
    assert len(used) == 1
    assert used <= here
    return used.pop()


def check_pages(executor: FakeExecutor) -> None:
    """No page is leaked or owned twice, and prompts are where they were."""
    manager = executor.manager
    caches = getattr(manager, "kv_cache_map", None)
    owners = [*executor.processed, *([NULL_REQUEST] if takes_null_pages(manager) else [])]
    reserve = manager.memshare.pressure and manager.memshare.pressure._reserve
    owners += [request.py_request_id for request, _ in reserve._held] if reserve else []
    held = [p for i in owners for p in resident_pages(manager, i)]
    if not manager.enable_block_reuse:
        assert len(held) == len(set(held))
        free = manager.impl.free if caches is not None else range(manager.get_num_free_blocks())
        assert len(held) + len(free) == executor.pool.shape[0]
    for request_id in executor.processed:
        known = manager.memshare.requests._known.get(request_id)
        if known is not None:
            prompt = executor.request(request_id).orig_prompt_len // manager.tokens_per_block
            seen = known.pages.position[:prompt]
            assert seen == list(range(len(seen)))
    manager.memshare.manager.check_integrity()


def check_tree(executor: FakeExecutor) -> None:
    """Every page of the reuse tree holds the text that it is registered for."""
    held, size = executor.pool[:, 0, 0, 0, :, 0].numpy(), executor.manager.tokens_per_block
    for block, key in executor.manager.impl.key_of.items():
        numbers, number = [], 0
        for token in key:
            number = executor._prefix_ids[(number, token)]
            numbers.append(number)
        assert held[block].tolist() == numbers[-size:]


def resident_pages(manager, request_id: int) -> list[int]:
    """Pages on the device that a request holds, running or suspended."""
    if hasattr(manager, "kv_cache_map"):
        return [p for p in manager.kv_cache_map[request_id]._pages if isinstance(p, int)]
    return list(manager.get_batch_cache_indices([request_id])[0])


LONGEST = 216
"""Tokens of a request of ``drive`` at most, in whole pages."""
NUM_NULL = 6
"""Bands of ``null_pages`` up to there."""


def page_bytes(tokens_per_block: int) -> int:
    return NUM_LAYERS * 2 * NUM_HEADS * tokens_per_block * HEAD_DIM * 4


def takes_null_pages(manager) -> bool:
    shared = getattr(manager, "memshare", None)
    return shared is not None and shared._rows._map.null_entries is not None


def run(kind: str, seed: int, overlap: bool, reuse: bool = False, **config) -> FakeExecutor:
    """A schedule drawn from a seed, checked as it goes."""

    def check(executor: FakeExecutor, step: int) -> None:
        if step % 3 == 0:
            check_contents(executor)
        check_pages(executor)

    make = make_sharing_class(MANAGERS[kind], **config)
    num_null = NUM_NULL if config.get("null_pages") is not None else 0
    return drive(make, random.Random(seed), kind, overlap, reuse, check, num_null=num_null)


def drive(
    manager_class, rng, kind, overlap, reuse, check=None, executor_class=FakeExecutor, num_null=0
) -> FakeExecutor:
    """Arrivals, lengths, pool size and cancellations as ``rng`` draws them, to the end of the last request."""
    size = rng.choice([4, 8])
    # Just enough for one request of any length, or for all of them.
    num_blocks = 212 // size + 2 + rng.randrange(12) + num_null if rng.random() < 0.7 else 400
    # The host tier of early V2 holds every request; with less of it, TensorRT-LLM alone can come to a standstill. Main
    # then frees requests and computes them anew: its tier has room for some pages, or for all.
    host_pages = (num_blocks % 3) * 8 if kind == "V2 main" else 0
    host = {"host_cache_size": host_pages * page_bytes(size) or 1 << 30} if kind.startswith("V2") else {}
    manager = make_manager(manager_class, num_blocks, size, reuse=reuse, config=host, max_seq_len=LONGEST)
    executor = executor_class(manager, overlap)
    pending = list(range(rng.randrange(2, 9)))
    prompt = repetitive_text(rng, 60)
    for step in range(2000):
        while pending and rng.random() < 0.3:
            head = prompt[: rng.randrange(1, 60)] if reuse else repetitive_text(rng, rng.randrange(1, 30))
            written = repetitive_text(rng, rng.randrange(40, 180))[: LONGEST - len(head)]
            executor.submit(pending.pop(), head, written)
        if executor.active and rng.random() < 0.01:
            executor.cancel(rng.choice(executor.active).py_request_id)
        executor.step()
        if check is not None:
            check(executor, step)
        if not pending and not executor.active:
            break
    assert not executor.active, "the schedule did not end"
    if not reuse:
        assert executor._num_free() == num_blocks - (num_null if takes_null_pages(manager) else 0)
    return executor


@pytest.mark.parametrize("kind", [k for k in MANAGERS if k != "V1 reuse"])
@settings(max_examples=-(-NUM_SCHEDULES // (len(MANAGERS) - 1)), deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_keeps_every_token_readable(kind, seed, overlap):
    run(kind, seed, overlap)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=max(1, NUM_SCHEDULES // 12), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_reused_prefixes_stay_and_shared_text_never_enters_the_tree(overlap, seed):
    executor = run("V1 reuse", seed, overlap, reuse=True)
    check_tree(executor)
    assert sum(executor.manager.impl.ref_count) == 0


def test_requests_that_outgrow_our_tables_wait_and_stop_nothing(monkeypatch, caplog):
    """Long prompts held once by TensorRT-LLM need a virtual block for each request that reads them."""
    monkeypatch.setattr(KVCacheManager, "append_tokens", refusing_now_and_then(KVCacheManager.append_tokens))
    run("V1", 5, overlap=True)
    assert caplog.text.count("have no room for request") == 1
    behind = [run("V1", seed, overlap=True).manager.memshare.manager.stats().shared for seed in range(3)]
    assert sum(behind) > 0


def refusing_now_and_then(append_tokens):
    calls = itertools.count()

    def append(self, request_id, token_ids):
        return next(calls) % 3 != 0 and append_tokens(self, request_id, token_ids)

    return append


def test_a_request_that_shared_is_freed_unregistered():
    executor = run("V1 reuse", 3, overlap=True, reuse=True)
    stats = executor.manager.memshare.manager.stats()
    assert stats.shared > 0
    assert executor.manager.impl.num_unregistered > 0


@pytest.mark.parametrize("kind", ["V1", "V2"])
def test_shadow_leaves_every_table_as_the_unpatched_manager_writes_it(kind):
    assert run(kind, 5, True).manager.memshare.manager.stats().shared > 0
    shadow = run(kind, 5, True, shadow=True)
    assert shadow.manager.memshare.manager.stats().shadowed > 0
    plain = replay_plainly(kind, 5)
    assert len(shadow.tables) == len(plain.tables)
    assert all(torch.equal(a, b) for a, b in zip(shadow.tables, plain.tables, strict=True))


def replay_plainly(kind: str, seed: int) -> FakeExecutor:
    """The same schedule on TensorRT-LLM's own class."""
    rng = random.Random(seed)
    return drive(MANAGERS[kind], rng, kind, True, False, lambda executor, step: None)


@pytest.mark.parametrize("kind", ["V1", "V1 main", "V2", "V2 main"])
def test_a_cut_waits_until_the_last_table_has_been_copied(kind, monkeypatch):
    """The manager's pinned rows change with the cut (V2) or with the next table (V1), while a copy may read them."""
    order: list[str] = []
    monkeypatch.setattr(ForwardStream, "wait_for_table", lambda self: order.append("wait"))
    resize, rewind = FakeKVCacheV2.resize, FakeCppKVCacheManager.rewind_kv_cache

    def resized(self, capacity, history_length=None):
        if capacity is not None and capacity < self.capacity:
            order.append("cut")
        return resize(self, capacity, history_length)

    def rewound(self, request_id, rewind_length):
        order.append("cut")
        return rewind(self, request_id, rewind_length)

    monkeypatch.setattr(FakeKVCacheV2, "resize", resized)
    monkeypatch.setattr(FakeCppKVCacheManager, "rewind_kv_cache", rewound)
    executor = drive(make_sharing_class(MANAGERS[kind]), random.Random(5), kind, True, False)
    assert executor.manager.memshare.manager.stats().shared > 0
    assert order == ["wait", "cut"] * (len(order) // 2)


@pytest.mark.parametrize("kind", ["V1", "V1 old", "V1 main"])
def test_a_step_of_ours_leaves_v1s_pinned_rows_alone(kind, monkeypatch):
    begin_step = Sharing.begin_step
    pinned: dict[Sharing, torch.Tensor] = {}

    def unchanged(self, *arguments):
        before = pinned[self].clone()
        begin_step(self, *arguments)
        assert torch.equal(before, pinned[self])

    class Watched(FakeExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            owner = self.metadata if kind == "V1 old" else self.manager
            pinned[self.manager.memshare] = owner.host_kv_cache_block_offsets

    monkeypatch.setattr(Sharing, "begin_step", unchanged)
    executor = drive(make_sharing_class(MANAGERS[kind]), random.Random(5), kind, True, False, None, Watched)
    assert executor.manager.memshare.manager.stats().shared > 0


def test_history_is_read_once_for_each_life_of_a_request():
    executor = run("V1", 2, overlap=True)
    assert executor.num_pauses > 3
    reads = [r.num_history_reads for r in executor.requests]
    lives = [r.num_lives for r in executor.requests]
    assert all(r <= n for r, n in zip(reads, lives, strict=True))
    assert max(reads) > 1


def test_a_request_without_get_token_is_read_by_its_history(monkeypatch):
    expected = run("V1", 5, overlap=True)
    monkeypatch.delattr(FakeLlmRequest, "get_token")
    tables = run("V1", 5, overlap=True).tables
    assert all(torch.equal(a, b) for a, b in zip(tables, expected.tables, strict=True))


class TokenContent(FakeExecutor):
    """K and V that depend on the token alone, K turned by its position as RoPE turns it."""

    def content(self, request_id, position):
        token = self.scripts[request_id][position]
        generator = torch.Generator().manual_seed(token)
        k, v = torch.randn(2, NUM_LAYERS, 1, NUM_HEADS, HEAD_DIM, generator=generator)
        angle = torch.tensor(0.5 * position)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        return torch.cat([k @ turn.T, v], 1)


def test_stage_2_compares_the_rows_where_they_are_now():
    """After pages have moved, equal text is still at distance 0; text whose K and V differ is refused."""
    equal = drive(
        make_sharing_class(preset="aligned", max_distance=1e-3), random.Random(2), "V1", True, False, None, TokenContent
    )
    policy = equal.manager.memshare.policy
    assert equal.manager.memshare.tail.num_copies > 20
    assert policy.num_candidates > 20
    assert policy.rejected["distance"] == 0
    different = drive(make_sharing_class(preset="aligned", max_distance=1e-3), random.Random(2), "V1", True, False)
    assert different.manager.memshare.policy.rejected["distance"] > 0
    assert different.manager.memshare.manager.stats().shared == 0


def test_sharing_can_wait_until_the_pool_fills():
    always = run("V1", 5, overlap=True).manager.memshare.manager.stats().shared
    under_pressure = run("V1", 5, overlap=True, min_pool_use=0.6).manager.memshare.manager.stats().shared
    assert 0 <= under_pressure < always
    assert run("V1", 2, overlap=True, min_pool_use=0.6).manager.memshare.manager.stats().shared > 0


def test_retired_counts_are_left_on_a_finished_request():
    executor = run("V1", 5, overlap=True)
    retired = [getattr(r, "py_memshare_retired_blocks", 0) for r in executor.requests]
    generated = [getattr(r, "py_memshare_generated_blocks", 0) for r in executor.requests]
    stats = executor.manager.memshare.manager.stats()
    assert sum(retired) == stats.retired_at_end > 0
    assert sum(generated) == stats.generated


def test_a_request_that_asks_for_its_cache_whole_shares_nothing_through_its_pauses():
    """Beside requests with the same text that ask for nothing."""
    manager = make_manager(make_sharing_class(), 45, 8)
    executor, text = FakeExecutor(manager, True), repetitive_text(random.Random(1), 180)
    for request_id in range(4):
        executor.submit(request_id, text[: 5 + request_id], text).py_memshare = None if request_id < 3 else False
    while executor.active:
        executor.step()
        check_contents(executor)
        check_pages(executor)
    retired = [r.py_memshare_retired_blocks for r in executor.requests]
    assert min(retired[:3]) > 0
    assert retired[3] == 0
    assert executor.requests[3].num_lives > 1


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("preset", ["lexical", "pressure"])
def test_what_v2_computes_anew_is_prompt_from_then_on(preset, overlap, null_pages):
    """It is history, which cannot be cut: main's V2 frees requests where suspending is not enough."""
    marks = {"need": "random", "min_kept": 0.25, "high_watermark": 0.85, "low_watermark": 0.75}
    changes = {"null_pages": null_pages, **marks} if preset == "pressure" else {}
    make = make_sharing_class(FakeMainKVCacheManagerV2, preset=preset, **changes)
    manager = make_manager(make, 45, 8, config={"host_cache_size": 2 * page_bytes(8)})
    executor, rng = FakeExecutor(manager, overlap), random.Random(3)
    for request_id in range(5):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    while executor.active:
        executor.step()
        check_contents(executor)
        check_pages(executor)
    stats = manager.memshare.manager.stats()
    assert executor.scheduler.num_recomputed > 0
    assert stats.shared + stats.forgotten > 0
    assert manager.memshare.failures.num_errors == manager.memshare.failures.num_failed_requests == 0
