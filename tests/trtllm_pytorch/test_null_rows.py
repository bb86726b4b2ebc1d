"""Null pages in TensorRT-LLM's pools: which are taken, what is written into them, for whom, and which are refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trtllm_pytorch.conftest import TextlessFacts, make_settings, make_sharing_class, sharing_class, write_null_pages
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, make_mapping, repetitive_text
from trtllm_pytorch.fake_v1 import FakeKVCacheManager, FakeReusingKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_pressure import PRESSURE
from trtllm_pytorch.test_tail_swap import MANAGERS, check_contents, resident_pages, run, takes_null_pages

import trtllm_memshare
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.null_rows import NULL_REQUEST, NullKeys
from trtllm_memshare.trtllm.pytorch.probe import wrap_init


def test_null_pages_are_taken_once_there_is_room_for_all_of_them(null_pages):
    """V1 raises in the middle of its last pages, and keeps them: seen with this seed, where they were never freed."""
    executor = run("V1 reuse", 644, True, reuse=True, null_pages=null_pages, **PRESSURE)
    assert not executor.manager.memshare.failures.num_errors
    assert sum(executor.manager.impl.ref_count) == len(resident_pages(executor.manager, NULL_REQUEST))


def test_a_prompt_that_reads_as_the_made_up_request_keeps_its_pages(null_pages):
    """TensorRT-LLM looks made-up requests up in its prefix cache too, which are tokens of id 1 throughout."""
    make = make_sharing_class(FakeReusingKVCacheManager, null_pages=null_pages, **PRESSURE)
    manager = make_manager(make, 100, 8, max_batch_size=4, reuse=True)
    executor, rng = FakeExecutor(manager, overlap=False), random.Random(1)
    executor.submit(1, [1] * 40, repetitive_text(rng, 60))
    while executor.active:
        executor.step()
        check_contents(executor)
    assert not manager.memshare.failures.num_errors
    assert not takes_null_pages(manager)
    assert sum(manager.impl.ref_count) == 0, "what was not taken was given back"


def test_a_pool_without_room_for_the_longest_request_beside_null_pages_is_refused(null_pages):
    """It would wait for ever, or end main's executor as a deadlock: TensorRT-LLM admits by the whole pool."""
    for make in (FakeMainKVCacheManagerV2, FakeKVCacheManager):
        make = make_sharing_class(make, null_pages=null_pages, **PRESSURE)
        assert make_manager(make, 40, 8).memshare is not None
        with pytest.raises(
            UserError,
            match="max_seq_len must be at most 248 beside 7 null pages in a KV cache of 39 blocks of 8 tokens, got 256",
        ):
            make_manager(make, 39, 8)
        # What TensorRT-LLM cuts to the pool leaves no room for null pages.
        with pytest.raises(UserError, match=r"must be at most 176 beside 5 .* of 28 blocks of 8 tokens, got 200"):
            make_manager(make, 28, 8, max_seq_len=200)


def test_null_pages_are_written_on_each_rank_for_its_own_heads(tmp_path):
    folder = write_null_pages(tmp_path, [0, 100, 300], num_layers=2, num_kv_heads=4)
    shape = torch.Size((10, 2, 2, 2, 8, 2))
    parts = [NullKeys.read(tmp_path, shape, make_mapping(tp_size=2, rank=r), 256) for r in (0, 1)]
    whole = NullKeys.read(tmp_path, torch.Size((10, 2, 2, 4, 8, 2)), make_mapping(), 256)
    assert torch.equal(torch.cat([p.keys for p in parts], 2), whole.keys)
    assert NullKeys.read(tmp_path, shape, make_mapping(tp_size=2), 90).bands == [0, 100]
    # Eight ranks of one head each: every head is on two of them.
    single = torch.Size((10, 2, 2, 1, 8, 2))
    keys = [NullKeys.read(tmp_path, single, make_mapping(tp_size=8, rank=r), 90).keys for r in range(8)]
    assert all(torch.equal(keys[r], whole.keys[:1, :, r // 2 : r // 2 + 1]) for r in range(8))
    with pytest.raises(UserError, match="reach to position 300, got max_seq_len 512"):
        NullKeys.read(tmp_path, shape, make_mapping(tp_size=2), 512)
    with pytest.raises(UserError, match="4 KV heads on each of 2 ranks"):
        NullKeys.read(tmp_path, torch.Size((10, 2, 2, 4, 8, 2)), make_mapping(tp_size=2), 90)
    with pytest.raises(UserError, match="no null pages in"):
        NullKeys.read(tmp_path / "none", shape, make_mapping(), 90)
    assert folder


def test_null_pages_of_another_model_are_refused(tmp_path):
    """Their shape may be right all the same."""
    model_dir = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"
    facts = TextlessFacts(SimpleNamespace(_name_or_path=str(model_dir)))
    for weights, is_right in ((weights_digest(model_dir), True), ("0" * 32, False)):
        folder = write_null_pages(tmp_path, [0, 280], weights=weights)
        make = sharing_class(FakeKVCacheManager, facts, make_settings(null_pages=folder, **PRESSURE))
        if is_right:
            assert make_manager(make, 40, 8).memshare is not None
            continue
        with pytest.raises(UserError, match="must be calibrated on the weights of"):
            make_manager(make, 40, 8)


@pytest.mark.parametrize("kind", ["V1", "V1 main", "V2", "V2 main"])
def test_the_pool_holds_what_was_calibrated_and_the_entries_are_the_managers_own(kind, null_pages):
    executor = run(kind, 5, True, null_pages=null_pages, **PRESSURE)
    manager = executor.manager
    pages = resident_pages(manager, NULL_REQUEST)
    keys = NullKeys.read(Path(null_pages), executor.pool.shape, make_mapping(), manager.max_seq_len).keys
    for page, expected in zip(pages, keys, strict=True):
        assert torch.equal(executor.pool[page, :, 0], expected[:, :, None].expand_as(executor.pool[page, :, 0]))
        assert (executor.pool[page, :, 1] == 0).all()
    table = torch.zeros(1, 1, 2, manager.max_blocks_per_seq, dtype=torch.int32)
    manager.copy_batch_block_offsets(table, [NULL_REQUEST], 1, 0, 1)
    assert torch.equal(manager.memshare._rows._map.null_entries, table[:, 0, :, : len(pages)])


@pytest.mark.parametrize("kind", ["V1", "V1 old", "V2 main"])
def test_null_pages_are_written_again_when_a_server_has_been_idle(kind, null_pages):
    """TensorRT-LLM drops what its pool held when it is put to sleep, which it is while nobody runs."""
    manager = make_manager(make_sharing_class(MANAGERS[kind], null_pages=null_pages, **PRESSURE), 60, 8)
    executor, text = FakeExecutor(manager, True), repetitive_text(random.Random(1), 40)

    def serve(request_id):
        executor.submit(request_id, text[:5], text)
        while request_id not in manager.memshare.requests._known:
            executor.step()
        return executor.pool[resident_pages(manager, NULL_REQUEST)].clone()

    written = serve(0)
    assert written.abs().sum() > 0
    while executor.active:
        executor.step()
    executor.pool.zero_()
    assert torch.equal(serve(1), written)
    executor.pool[resident_pages(manager, NULL_REQUEST)] = 0  # not while somebody runs: it costs a copy a band
    assert serve(2).abs().sum() == 0


class OnePromptAtATime(FakeExecutor):
    """``max_num_tokens`` has room for one prompt in an iteration."""

    def _schedule(self):
        batch, paused = super()._schedule()
        del batch.context_requests[1:]
        return batch, paused


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["V1", "V1 main", "V2", "V2 main"])
@pytest.mark.parametrize("num_blocks", [16, 18, 20])
def test_null_pages_are_not_taken_from_prompts_that_the_scheduler_lets_in(kind, num_blocks, overlap, null_pages):
    """Two prompts of eight pages; the first one generates when the second comes."""
    make = make_sharing_class(MANAGERS[kind], null_pages=null_pages, **PRESSURE)
    executor = OnePromptAtATime(make_manager(make, num_blocks, 8, max_seq_len=88), overlap)
    for request_id in range(2):
        executor.submit(request_id, list(range(64)), list(range(20)))
    for _ in range(200):
        executor.step()
    assert not executor.active
    assert takes_null_pages(executor.manager)
    assert not executor.manager.memshare.failures.num_errors


def test_warm_up_finds_its_manager_empty_and_a_full_pool_is_tried_again(null_pages):
    manager = make_manager(make_sharing_class(null_pages=null_pages, **PRESSURE), 40, 8)
    executor = FakeExecutor(manager, True)
    dummy = manager.add_dummy_requests([99], [9], is_gen=True)[0]
    manager.memshare.begin_step([dummy])
    assert NULL_REQUEST not in manager.impl.sequences
    manager.free_resources(dummy)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text)
    add = manager.add_dummy_requests
    manager.add_dummy_requests = lambda *arguments, **keywords: None
    for _ in range(4):
        executor.step()
    assert not manager.memshare.requests._known
    manager.add_dummy_requests = add
    for _ in range(4):
        executor.step()
    assert len(manager.impl.sequences[NULL_REQUEST].blocks) == 7
    assert 0 in manager.memshare.requests._known


def test_null_pages_leave_the_row_that_pads_cuda_graphs(null_pages):
    """Both are there beside a full batch: main's V2 has rows for requests and for what is reserved."""

    class Manager(FakeMainKVCacheManagerV2):
        pass

    facts = TextlessFacts(SimpleNamespace())
    models = SimpleNamespace(of=lambda arguments: facts, is_estimating=False, noticed=dict)
    wrap_init(Manager, models, make_settings(null_pages=null_pages, **PRESSURE))
    manager = make_manager(Manager, 60, 8, max_batch_size=2)
    executor = FakeExecutor(manager, True)
    for request_id in (1, 2):
        executor.submit(request_id, list(range(8)), list(range(30)))
    for _ in range(4):
        executor.step()
    assert set(manager.kv_cache_map) == {1, 2, NULL_REQUEST}
    assert manager.add_dummy_requests([NULL_REQUEST - 1], token_nums=[1], is_gen=True) is not None
    assert manager.add_dummy_requests([NULL_REQUEST - 2], token_nums=[1], is_gen=True) is None
