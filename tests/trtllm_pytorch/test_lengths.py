"""Null entries skipped: rows and lengths without what was given up, in every form of TensorRT-LLM's manager."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import TextlessFacts, make_settings, make_sharing_class
from trtllm_pytorch.fake_attention import (
    FakeAttentionMetadata,
    FakeAttentionModule,
    FakeOldAttentionMetadata,
    FakeTrtllmAttention,
    KVCacheParams,
    make_attention_module,
)
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, submit_texts
from trtllm_pytorch.fake_requests import FinishReason
from trtllm_pytorch.fake_util import FakeKvCacheCreator, make_util_module
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_pressure import PRESSURE
from trtllm_pytorch.test_tail_swap import MANAGERS, NUM_SCHEDULES, check_contents, check_pages, check_tree, run

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch import lengths
from trtllm_memshare.trtllm.pytorch.contracts import ProbeError, find_attention
from trtllm_memshare.trtllm.pytorch.lengths import Rotations, fit_lengths
from trtllm_memshare.trtllm.pytorch.probe import install
from trtllm_memshare.trtllm.pytorch.skipped_rows import SkippedRows

SKIP = {**PRESSURE, "null_entries": "skip"}


@pytest.mark.parametrize("kind", [k for k in MANAGERS if k != "V1 reuse"])
@settings(max_examples=-(-NUM_SCHEDULES // (len(MANAGERS) - 1)), deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_reads_what_is_kept_and_nothing_else(kind, seed, overlap):
    """Tokens are written where the length says: the executor of the tests holds each to its own page."""
    run(kind, seed, overlap, **{**SKIP, "protected_tokens": 8})


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=max(1, NUM_SCHEDULES // 12), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_block_reuse_no_page_of_the_tree_is_given_up_or_written(overlap, seed):
    executor = run("V1 reuse", seed, overlap, reuse=True, **SKIP)
    check_tree(executor)
    assert sum(executor.manager.impl.ref_count) == 0


@pytest.mark.parametrize("kind", ["V1", "V1 old", "V1 main", "V2", "V2 main"])
def test_the_same_pages_go_as_where_null_pages_are_read(kind, null_pages):
    """In a pool that is smaller by these pages, which skipping does without."""

    def served(num_blocks, **changes):
        manager = make_manager(make_sharing_class(MANAGERS[kind], **{**PRESSURE, **changes}), num_blocks, 8)
        executor = FakeExecutor(manager, True)
        submit_texts(executor, 4)
        while executor.active:
            executor.step()
            check_contents(executor)
            check_pages(executor)
        assert not manager.memshare.failures.num_errors
        return executor.num_pauses, manager.memshare.manager.stats().forgotten

    skipped = served(60, null_entries="skip")
    assert skipped == served(67, null_pages=null_pages)
    assert skipped[1] > 20


def test_rows_keep_their_order_and_what_comes_goes_behind_them():
    backend = SimpleNamespace(max_blocks_per_seq=8, pool=torch.zeros(1, 1, 1, 1, 4, 1))
    rows = SkippedRows(backend)
    row = np.array([0, 1, 7, 4, 7, 2, 3, 5])  # position 7 of blocks that were given up means nothing
    is_null = np.array([False, False, True, False, True])
    assert rows.place(row, np.zeros(5, np.int32), is_null) == 2
    assert row[:6].tolist() == [0, 1, 4, 2, 3, 5]
    assert rows.pages.block_at(8 * 4) == 0


def prepared(metadata_class, shorter, prompts=(5, 40)):
    """Metadata of two requests of 50 and 60 cached tokens, prepared behind ``fit_lengths``.

    With five numbers in ``shorter``, beside a whole prompt, the second chunk of another, and the padding of a graph.
    """
    cls = type("Metadata", (metadata_class,), {})
    fit_lengths(cls)
    manager = make_manager(FakeKVCacheManager, 40, 8)
    made = cls(manager)
    failed: list[Exception] = []
    tables = SimpleNamespace(shorter=lambda ids: shorter, fail_lengths=lambda ids, error: failed.append(error))
    manager.memshare = SimpleNamespace(tables=tables)
    manager.copy_batch_block_offsets = lambda *arguments, **keywords: None
    manager.impl.copy_batch_block_offsets = lambda *arguments: None
    made.request_ids, made.prompt_lens, made.num_contexts = [1, 2], list(prompts), 0
    made.seq_lens, cached = torch.ones(2, dtype=torch.int32), [50, 60]
    if shorter is not None and len(shorter) == 5:
        made.request_ids, made.prompt_lens, made.num_contexts = [3, 4, 1, 2, 99], [7, 6, *prompts, 1], 2
        made.seq_lens, cached = torch.tensor([7, 6, 1, 1, 1], dtype=torch.int32), [0, 16, 50, 60, 1]
    made.kv_cache_params = params = KVCacheParams(True, list(cached))
    engines = list(made.prompt_lens)
    made.prepare()
    assert made.kv_cache_params is params
    assert params.num_cached_tokens_per_seq == cached
    assert made.prompt_lens == engines
    return made, failed


@pytest.mark.parametrize("metadata_class", [FakeAttentionMetadata, FakeOldAttentionMetadata])
def test_every_length_that_kernels_read_is_that_of_the_row(metadata_class):
    made, failed = prepared(metadata_class, [16, 0])
    assert made.kv_lens[:2].tolist() == made.kv_lens_cuda[:2].tolist() == made.kv_lens_runtime.tolist() == [35, 61]
    assert made.host_total_kv_lens.tolist() == [0, 96]
    assert made.prompt_lens_cuda[:2].tolist() == [5, 40]
    assert not failed
    assert prepared(metadata_class, None)[0].kv_lens_cuda[:2].tolist() == [51, 61]


@pytest.mark.parametrize("metadata_class", [FakeAttentionMetadata, FakeOldAttentionMetadata])
def test_prompts_chunks_and_padding_beside_keep_their_lengths(metadata_class):
    made, failed = prepared(metadata_class, [0, 0, 16, 0, 0])
    assert made.kv_lens_cuda[:5].tolist() == [7, 22, 35, 61, 2]
    assert made.prompt_lens_cuda[:5].tolist() == [7, 6, 5, 40, 1]
    assert made.host_total_kv_lens.tolist() == [29, 98]
    assert not failed


def test_a_prompt_is_never_longer_than_its_sequence():
    """V1 computes what it paused anew, as a prompt of which pages may go again."""
    made, _ = prepared(FakeAttentionMetadata, [32, 0], prompts=(45, 70))
    assert made.prompt_lens_cuda[:2].tolist() == [18, 70]


def test_lengths_that_cannot_be_told_end_who_has_them():
    """One number less than there are requests."""
    made, failed = prepared(FakeAttentionMetadata, [16])
    assert made.kv_lens_cuda[:2].tolist() == [51, 61]
    assert isinstance(failed[0], ValueError)


@pytest.mark.parametrize("kind", ["V1", "V1 old", "V2 main"])
def test_requests_whose_lengths_were_not_told_end_alone(kind, monkeypatch):
    """Those that gave something up until then; the others are served to their ends."""
    executor = drive_until_shorter(kind)
    shared, original = executor.manager.memshare, lengths._fitting
    executor.submit(9, [1, 2, 3], list(range(40)))
    shorter = shared._rows.shortened()

    def fitting(*arguments):
        monkeypatch.setattr(lengths, "_fitting", original)
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(lengths, "_fitting", fitting)
    while executor.active:
        executor.step()
        check_contents(executor)
        check_pages(executor)
    assert shared.failures.num_errors == 1
    ended = [r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert ended == sorted(shorter)
    assert shared.failures.num_failed_requests == len(ended) < len(executor.requests)


@pytest.mark.parametrize("kind", ["V1", "V2 main"])
def test_a_table_without_its_lengths_is_not_read(kind):
    """Whoever fills one by another way than ``prepare``: rows would be shorter than the sequence."""
    executor = drive_until_shorter(kind)
    shared, manager = executor.manager.memshare, executor.manager
    ids = list(executor.processed)
    table = torch.full_like(executor.table, -7)
    manager.copy_batch_block_offsets(table, ids, 1, 0, len(ids))
    assert shared.failures.num_errors == 1
    gave_up = shared._rows._map._slots.keys() & set(ids)
    assert {i for i in ids if table[0, ids.index(i)].unique().numel() <= 2} >= gave_up != set()
    ended = [r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert set(ended) == gave_up


@pytest.mark.parametrize("others", [[], [7, 8]])
def test_lengths_that_were_asked_for_another_table_do_not_count(others):
    executor = drive_until_shorter("V1")
    shared, ids = executor.manager.memshare, list(executor.processed)
    shared.tables.shorter(others)
    executor.manager.copy_batch_block_offsets(torch.full_like(executor.table, -7), ids, 1, 0, len(ids))
    assert shared.failures.num_errors == 1


def test_suspended_requests_stay_when_lengths_of_others_cannot_be_told(monkeypatch):
    executor = drive_until_shorter("V2 main", num_requests=8, until_suspended=True)
    shared, original = executor.manager.memshare, lengths._fitting

    def fitting(*arguments):
        monkeypatch.setattr(lengths, "_fitting", original)
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(lengths, "_fitting", fitting)
    suspended = {i for i in shared._rows.shortened() if not executor.manager.is_request_active(i)}
    while not shared.failures.num_errors:
        executor.step()
    ended = {r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED}
    assert suspended
    assert not ended & (suspended - set(executor._ids))


def test_shorter_rows_of_a_missed_iteration_end_their_requests():
    """TensorRT-LLM would have to have worked their lengths out by itself."""
    executor = drive_until_shorter("V1")
    shared = executor.manager.memshare
    executor.step()
    shorter = shared._rows.shortened()
    for _ in range(2):  # the first one takes the ids, the second one finds that no table came in between
        shared.begin_step([r for r in executor.active if r.py_request_id in executor.processed])
    ended = {r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED}
    assert ended >= shorter != set()


def drive_until_shorter(kind, num_requests=4, until_suspended=False) -> FakeExecutor:
    manager = make_manager(make_sharing_class(MANAGERS[kind], **SKIP), 60, 8)
    executor = FakeExecutor(manager, True)
    submit_texts(executor, num_requests)
    while not (shorter := manager.memshare._rows.shortened()) or (
        until_suspended and all(manager.is_request_active(i) for i in shorter)
    ):
        executor.step()
    return executor


def test_attention_that_never_asks_for_lengths_is_said_and_nothing_is_given_up(caplog):
    make = make_sharing_class(on_unsupported="warn", **SKIP)
    manager = make_manager(make, 60, 8)
    plain = FakeAttentionMetadata(manager)  # not the class that was changed
    executor = FakeExecutor(manager, True, plain)
    submit_texts(executor, 4)
    while executor.active:
        executor.step()
    assert manager.memshare.failures.is_off
    assert manager.memshare.manager.stats().forgotten == 0
    assert caplog.text.count("set attn_backend: TRTLLM") == 1


@pytest.mark.parametrize("rope_fusion", [None, True, False])
def test_models_rotate_keys_themselves(rope_fusion):
    attention = make_attention_module().TrtllmAttention
    rotations = Rotations(attention)
    layers = [FakeAttentionModule(attention, i, rope_fusion=rope_fusion) for i in range(3)]
    assert rotations.inside == set()
    assert all(layer.attn.pos_embd_params is None and layer.rotary_emb for layer in layers)
    attention(7, 1, 2, pos_embd_params="of its own accord")
    attention(8, 1, 2, None, None, None, "by place")
    assert rotations.inside == {7, 8}
    assert FakeTrtllmAttention.support_fused_rope()
    # MLA asks the layer, and hands its kernels a latent cache that they turn themselves.
    assert attention(9, 1, 2, mla_params="MLA").support_fused_rope()
    assert not attention(9, 1, 2).support_fused_rope()


def test_shadow_leaves_tensorrt_llms_attention_as_it_is(release):
    module, attention = release("1.2"), make_attention_module()
    prepare, shadow = attention.TrtllmAttentionMetadata.prepare, make_settings(shadow=True, **SKIP)
    assert install(module, shadow, lambda: attention)
    assert attention.TrtllmAttention.support_fused_rope()
    assert attention.TrtllmAttentionMetadata.prepare is prepare


def test_shadow_gives_nothing_up_and_asks_for_no_lengths():
    manager = make_manager(make_sharing_class(shadow=True, **SKIP), 60, 8)
    executor = FakeExecutor(manager, True, FakeAttentionMetadata(manager))
    submit_texts(executor, 4)
    while executor.active:
        executor.step()
    assert manager.memshare.manager.stats().forgotten == 0
    assert not manager.memshare.failures.is_off


@pytest.mark.parametrize("name", ["1.1", "1.2", "main V1", "main V2"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_model_whose_kernels_rotate_keys_is_refused(name, is_inside, release, model_config):
    module, attention = release(name), make_attention_module()
    assert install(module, make_settings(**SKIP), lambda: attention)
    for layer in range(3):
        FakeAttentionModule(attention.TrtllmAttention, layer)
    if is_inside:
        attention.TrtllmAttention(3, 1, 2, pos_embd_params="RoPE")
    config = SimpleNamespace(
        max_tokens=320, max_attention_window=None, enable_block_reuse=False, host_cache_size=None,
        use_kv_cache_manager_v2="V2" in name,
    )  # fmt: skip
    creator = FakeKvCacheCreator(module, model_config, config)
    if not is_inside:
        assert creator.create().memshare._rows.skips
        return
    with pytest.raises(UserError, match="whose attention kernels rotate keys, got 1 such layers"):
        creator.create()


@pytest.mark.parametrize("what", ["TrtllmAttention", "TrtllmAttentionMetadata", "prepare", "support_fused_rope"])
def test_an_attention_that_lacks_something_leaves_tensorrt_llm_as_it_is(what, caplog):
    attention, module = make_attention_module(), make_util_module("1.2")
    if what in vars(attention):
        delattr(attention, what)
    else:
        owner = "TrtllmAttentionMetadata" if what == "prepare" else "TrtllmAttention"
        setattr(attention, owner, type(owner, (), {"__init__": FakeTrtllmAttention.__init__}))
    before = dict(vars(module))
    assert not install(module, make_settings(**SKIP), lambda: attention)
    assert vars(module) == before
    assert f"has no {what}" in caplog.text


def test_the_attention_is_found_where_each_release_has_it():
    for name in ("tensorrt_llm._torch.attention_backend.trtllm", "tensorrt_llm._torch.attention.backends.trtllm"):
        found = {name: make_attention_module()}
        assert find_attention(lambda wanted, found=found: found[wanted]) is found[name]
    with pytest.raises(
        ProbeError, match=r"no TrtllmAttentionMetadata: tensorrt_llm\._torch\.attention_backend\.trtllm: K"
    ):
        find_attention({}.__getitem__)


def test_v2_reserves_no_row_for_null_pages_that_nobody_takes(monkeypatch):
    from trtllm_memshare.trtllm.pytorch.probe import wrap_init

    class Manager(FakeMainKVCacheManagerV2):
        pass

    facts = TextlessFacts(SimpleNamespace())
    wrap_init(Manager, SimpleNamespace(of=lambda a: facts, is_estimating=False, noticed=dict), make_settings(**SKIP))
    manager = make_manager(Manager, 60, 8, max_batch_size=2)
    assert manager.memshare._rows.skips
    assert [manager.add_dummy_requests([i], token_nums=[1], is_gen=True) is None for i in range(4)] == [
        False, False, False, True,
    ]  # fmt: skip
