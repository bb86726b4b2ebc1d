"""The torch runner over tables with null entries: skipped or read, the logits are those of dropping the page."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from effective_settings import make_effective
from engine.centred_model import write_centred_checkpoint
from runners import fake_flashinfer
from runners.test_torch_runner import SIZE, batch_of
from tolerances import SAME_LOGITS

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import NULL_OFFSET, encode_block_offsets, hide_blocks
from trtllm_memshare.engine import null_page
from trtllm_memshare.engine.null_page import calibrate_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.null_pages import write_null_pages
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.null_entries import settle_null_entries
from trtllm_memshare.serving.request import SamplingParams

NUM_BLOCKS = 80


@pytest.fixture(scope="module")
def centred(tmp_path_factory):
    """A model whose queries are concentrated, and its null pages: two bands of 128 positions."""
    folder = write_centred_checkpoint(tmp_path_factory.mktemp("centred"), "qwen2", max_position_embeddings=256)
    model = load_model(folder)
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(null_page, "_WIDEST_BAND", 128)
        pages = calibrate_null_pages(model, [rng.integers(4, 70, 150).tolist() for _ in range(4)])
    assert pages.bands.tolist() == [0, 128, 256]
    return model, pages


def runner_and_manager(centred, becomes="null", **options):
    model, pages = centred
    runner = TorchRunner(model, NUM_BLOCKS, SIZE, null_page_set=pages, **options)
    config = make_config("aligned", retired_becomes=becomes)
    return runner, KVCacheManager(NUM_BLOCKS, 2, SIZE, 32, 4, config, None, runner.null_pages)


def logits_with_forgotten_pages(centred, becomes="null", read_null=False, length=140, **options) -> torch.Tensor:
    """Two requests past position 128: pages are retired in the first band, then a chunk and decode steps follow."""
    runner, manager = runner_and_manager(centred, becomes, **options)
    rng = np.random.default_rng(5)
    tokens = {0: rng.integers(4, 70, length), 1: rng.integers(4, 70, length)}
    for request in tokens:
        assert manager.add_sequence(request, tokens[request][:120].astype(np.int32), num_prompt_tokens=10)

    def step(lengths, chunks, num_contexts):
        manager.cross_bands([0, 1], lengths)
        batch = batch_of(manager, [0, 1], lengths, chunks, tokens, num_contexts, read_null=read_null)
        found.append(runner.step(runner.prepare(batch)).logits.clone())
        for request, to in zip((0, 1), lengths, strict=True):
            manager.mark_computed(request, to)

    found: list[torch.Tensor] = []
    step([100, 110], [100, 110], 2)
    manager.retire(0, np.array([2, 3, 5, 9]))
    step([115, 120], [15, 10], 2)  # chunks that read a past with holes
    manager.retire(1, np.array([4, 6, 7, 8, 10]))
    for _ in range(length - 121):
        for request, count in ((0, 1), (1, 1)):
            assert manager.append_tokens(request, [1] * count)
        step([manager._sequences[0].num_tokens - 5, manager._sequences[1].num_tokens], [1, 1], 0)
    manager.check_integrity()
    return torch.cat(found)


def test_skipping_and_reading_null_pages_and_dropping_agree(centred):
    skipped = logits_with_forgotten_pages(centred)
    torch.testing.assert_close(logits_with_forgotten_pages(centred, read_null=True), skipped, **SAME_LOGITS)
    every_entry = logits_with_forgotten_pages(centred, read_null=True, fold_aliases=False)
    torch.testing.assert_close(every_entry, skipped, **SAME_LOGITS)
    dropped = logits_with_forgotten_pages(centred, "dropped")
    assert torch.equal(dropped, skipped)


@pytest.fixture
def fp8_rows(monkeypatch):
    """PyTorch has no ``index_copy_`` of fp8 elements on a CPU: their bytes are copied."""
    copy, fp8 = torch.Tensor.index_copy_, torch.float8_e4m3fn

    def copy_bytes(rows, dim, index, source):
        as_bytes = [t.view(torch.uint8) if t.dtype is fp8 else t for t in (rows, source)]
        return copy(as_bytes[0], dim, index, as_bytes[1])

    monkeypatch.setattr(torch.Tensor, "index_copy_", copy_bytes)
    return fp8


def test_null_pages_are_read_from_an_fp8_pool_as_if_they_were_skipped(centred, fp8_rows):
    """With a scale of 1, which the torch runner's pool has: keys and values are those that fp8 can hold."""
    model, pages = centred
    skipped = logits_with_forgotten_pages(centred, kv_dtype=fp8_rows)
    read = logits_with_forgotten_pages(centred, kv_dtype=fp8_rows, read_null=True)
    torch.testing.assert_close(read, skipped, **SAME_LOGITS)
    assert (skipped - logits_with_forgotten_pages(centred)).abs().max() > 1e-3
    zeros = dataclasses.replace(pages, keys=torch.zeros_like(pages.keys))
    wrong = logits_with_forgotten_pages((model, zeros), kv_dtype=fp8_rows, read_null=True)
    assert (wrong[4:] - skipped[4:]).abs().max() > 1e-2


def test_forgetting_changes_the_logits_and_so_would_a_page_that_is_no_null_page(centred):
    model, pages = centred
    skipped = logits_with_forgotten_pages(centred)
    zeros = dataclasses.replace(pages, keys=torch.zeros_like(pages.keys))
    wrong = logits_with_forgotten_pages((model, zeros), read_null=True)
    assert (wrong[4:] - skipped[4:]).abs().max() > 1e-2
    runner, manager = runner_and_manager(centred)
    tokens = {0: np.random.default_rng(5).integers(4, 70, 140)}
    assert manager.add_sequence(0, tokens[0].astype(np.int32))
    full = runner.step(runner.prepare(batch_of(manager, [0], [115], [115], tokens, 1))).logits
    assert (full[0] - skipped[2]).abs().max() > 1e-2


def test_the_first_bands_page_would_not_do_in_the_second(centred, monkeypatch):
    """What moving entries on is for: left at the first band's page, entries would be read with other products."""
    model, pages = centred
    far = dataclasses.replace(pages, keys=torch.stack([pages.keys[0], -pages.keys[1]]))
    monkeypatch.setattr(KVCacheManager, "cross_bands", lambda *_: 0)
    stuck = logits_with_forgotten_pages((model, far), read_null=True)
    monkeypatch.undo()
    moved = logits_with_forgotten_pages((model, far), read_null=True)
    assert (stuck[-1] - moved[-1]).abs().max() > 1e-2


def test_flashinfer_gets_no_null_page_in_its_lists(centred):
    skipped = logits_with_forgotten_pages(centred)
    paged = logits_with_forgotten_pages(centred, flashinfer=fake_flashinfer, use_graphs=False)
    torch.testing.assert_close(paged, skipped, **SAME_LOGITS)
    read = logits_with_forgotten_pages(centred, read_null=True, flashinfer=fake_flashinfer, use_graphs=False)
    torch.testing.assert_close(read, skipped, **SAME_LOGITS)


def test_pages_lie_in_the_first_blocks_and_nowhere_else(centred):
    model, pages = centred
    runner = TorchRunner(model, NUM_BLOCKS, SIZE, null_page_set=pages)
    assert (runner.null_pages.blocks, runner.null_pages.bands) == ([0, 1], [0, 128, 256])
    expected = pages.keys[:, :, :, None].expand(-1, -1, -1, SIZE, -1)
    assert torch.equal(runner.pool[:2, :, 0], expected)
    assert not runner.pool[:2, :, 1].any()
    assert not runner.pool[2:].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_pools_of_small_elements_hold_pages_too(centred, dtype):
    _, pages = centred
    pool = torch.zeros((4, 2, 2, 2, SIZE, pages.keys.shape[-1]), dtype=dtype)
    write_null_pages(pool, pages)
    largest = pool[:2, :, 0].float().abs().amax((-1, -2))
    if dtype is not torch.bfloat16:
        assert set(largest.flatten().tolist()) == {127.0 if dtype is torch.int8 else 448.0}
    cosine = torch.nn.functional.cosine_similarity(pool[:2, :, 0, :, 0].float(), pages.keys, dim=-1)
    assert cosine.min() > 0.99
    assert not pool[2:].float().any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 2, 2, 2, SIZE, 8), "of which null pages take 2"), ((9, 3, 2, 2, SIZE, 8), r"got a pool of \[3, 2, 8\]")],
)
def test_a_pool_that_null_pages_do_not_fit_is_refused(centred, shape, message):
    with pytest.raises(UserError, match=message):
        write_null_pages(torch.zeros(shape), centred[1])


def test_hidden_entries_are_those_of_the_blocks_alone():
    table = encode_block_offsets(np.array([[3, 0, 7, -1]], np.int32), 2)
    hidden = hide_blocks(table, [0, 7], 2)
    assert hidden[0, 0, 0].tolist() == [12, NULL_OFFSET, NULL_OFFSET, NULL_OFFSET]
    assert hidden[0, 0, 1].tolist() == [13, NULL_OFFSET, NULL_OFFSET, NULL_OFFSET]


def test_reading_null_pages_needs_some(centred):
    runner = TorchRunner(centred[0], NUM_BLOCKS, SIZE)
    _, manager = runner_and_manager(centred)
    manager.add_sequence(0, np.arange(4, 12, dtype=np.int32))
    batch = batch_of(manager, [0], [8], [8], {0: np.arange(4, 12)}, 1, read_null=True)
    with pytest.raises(UserError, match="read_null needs null pages, got a runner without any"):
        runner.prepare(batch)


def test_what_retired_pages_become_follows_what_the_runner_can(centred):
    model, pages = centred
    plain, with_pages = TorchRunner(model, 9, SIZE), TorchRunner(model, 9, SIZE, null_page_set=pages)
    null = make_config("aligned", retired_becomes="null")
    assert settle_null_entries(null, with_pages) == (null, with_pages.null_pages)
    settled, none = settle_null_entries(null, plain)
    assert (settled.retired_becomes, none) == ("dropped", None)
    with pytest.raises(UserError, match="needs an engine with null pages, got one without"):
        settle_null_entries(make_config("aligned", retired_becomes="null", read_null=True), plain)
    reads_all = type("Reads", (), {**{k: None for k in dir(plain) if k[0] != "_"}, "skips_entries": False})()
    with pytest.raises(UserError, match="needs an engine with null pages, got one without"):
        settle_null_entries(null, reads_all)
    with pytest.raises(UserError, match="dropped needs a runner that skips entries"):
        settle_null_entries(make_config("aligned", retired_becomes="dropped"), reads_all)


def test_an_executor_counts_the_blocks_that_null_pages_leave(centred):
    model, pages = centred
    runner = TorchRunner(model, 8, SIZE, null_page_set=pages)
    boundaries = BoundaryTokens.from_texts([f"w{i}" for i in range(80)])
    executor = Executor(runner, make_config("aligned", retired_becomes="null"), boundaries, 64, 4)
    with pytest.raises(UserError, match="need 7 blocks of 8, the pool has 6"):
        executor.submit([5] * 40, SamplingParams(max_new_tokens=9))
    handle = executor.submit([5] * 40, SamplingParams(max_new_tokens=8))
    executor.run_until_idle()
    assert len(handle.result().token_ids) == 8
    assert executor.status().used_blocks == 0
    executor.manager.check_integrity()
    expected = pages.keys[:, :, :, None].expand(-1, -1, -1, SIZE, -1)
    assert torch.equal(runner.pool[:2, :, 0], expected)  # nobody wrote there


@pytest.mark.parametrize(("preset", "becomes"), [("off", "null"), ("aligned", "alias"), ("pressure", "dropped")])
def test_who_needs_no_null_page_has_the_whole_pool_and_the_next_one_finds_them_again(centred, preset, becomes):
    model, pages = centred
    runner = TorchRunner(model, 8, SIZE, null_page_set=pages)
    written = runner.pool[:2].clone()
    boundaries = BoundaryTokens.from_texts([f"w{i}" for i in range(80)])
    executor = Executor(runner, make_effective(preset, retired_becomes=becomes, need="age"), boundaries, 64, 4)
    assert executor.manager.pool.num_usable == 8
    handle = executor.submit([5] * 40, SamplingParams(max_new_tokens=20))
    executor.run_until_idle()
    assert len(handle.result().token_ids) == 20
    assert not torch.equal(runner.pool[:2], written)
    executor = Executor(runner, make_config("pressure", need="age"), boundaries, 64, 4)
    assert executor.manager.pool.num_usable == 6
    assert torch.equal(runner.pool[:2], written)
