"""Decode through page lists and replayed graphs gives what PyTorch's decode gives. FlashInfer itself needs a GPU."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from runners import fake_flashinfer
from runners.test_torch_runner import SIZE, batch_of, make_manager
from tolerances import SAME_LOGITS

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch.decode_graph import BUCKETS
from trtllm_memshare.runners.torch.flashinfer_decode import find_flashinfer
from trtllm_memshare.runners.torch.page_lists import PageLists, list_pages
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

LAYERS = 3


class FakeGraph:
    """Records a function and calls it again on replay, into the same output, as a graph would."""

    captures = 0

    def capture(self, run):
        FakeGraph.captures += 1
        self._run, self._output = run, run().clone()
        return self._output

    def replay(self):
        self._output.copy_(self._run())


def step_batch(blocks, lengths, num_contexts=0, count_aliases=True) -> StepBatch:
    """A batch whose tables hold block ids (None = evicted)."""
    table = np.full((1, len(blocks), 2, max(map(len, blocks))), NULL_OFFSET, np.int32)
    for row, ids in enumerate(blocks):
        for column, block in enumerate(ids):
            if block is not None:
                table[0, row, :, column] = block * 2 * LAYERS + np.arange(2)
    ones = np.ones(len(blocks), np.int32)
    return StepBatch(ones, ones, num_contexts, ones, np.array(lengths, np.int32), table, count_aliases=count_aliases)


def as_lists(pages: PageLists):
    rows = [pages.indices[a:b].tolist() for a, b in zip(pages.indptr, pages.indptr[1:], strict=False)]
    return rows, pages.last_page_len.tolist()


def test_pages_follow_the_table_skip_evicted_blocks_and_end_with_the_partial_one():
    batch = step_batch([[9], [4, 7, 2], [5, None, 6, 8]], [3, 2 * SIZE + 1, 4 * SIZE], num_contexts=1)
    assert as_lists(list_pages(batch, LAYERS, SIZE)) == ([[4, 7, 2], [5, 6, 8]], [1, SIZE])


def test_pages_past_the_length_are_not_read():
    batch = step_batch([[4, 7, 2]], [SIZE + 1])
    assert as_lists(list_pages(batch, LAYERS, SIZE)) == ([[4, 7]], [1])


def test_an_alias_is_read_as_often_as_it_is_named_or_once_for_drop_duplicate():
    shared, lengths = [[3, 5, 5, 5, 1], [2, 2, 0]], [4 * SIZE + 2, 2 * SIZE + 3]
    assert as_lists(list_pages(step_batch(shared, lengths), LAYERS, SIZE))[0] == shared
    once = list_pages(step_batch(shared, lengths, count_aliases=False), LAYERS, SIZE)
    assert as_lists(once) == ([[3, 5, 1], [2, 0]], [2, 3])


def test_padding_repeats_the_first_request():
    pages = list_pages(step_batch([[4, 7], [1]], [SIZE + 2, 3]), LAYERS, SIZE).padded(4)
    assert as_lists(pages) == ([[4, 7], [1], [4, 7], [4, 7]], [2, 3, 2, 2])


@pytest.fixture
def runners(family_checkpoint):
    """The PyTorch runner, FlashInfer's without graphs and with them."""
    model = load_model(family_checkpoint)
    return [
        TorchRunner(model, 40, SIZE, fold_aliases=False),
        TorchRunner(model, 40, SIZE, flashinfer=fake_flashinfer, use_graphs=False),
        TorchRunner(model, 40, SIZE, flashinfer=fake_flashinfer, new_graph=FakeGraph),
    ]


def test_mixed_and_pure_decode_steps_give_the_same_logits_and_the_same_pool(runners):
    rng = np.random.default_rng(0)
    tokens = {i: rng.integers(4, 70, n) for i, n in enumerate((40, 23, 31))}
    managers = [make_manager(r) for r in runners]
    for request, ids in tokens.items():
        for manager in managers:
            assert manager.add_sequence(request, ids.astype(np.int32))
    steps = [
        ([0, 1, 2], [30, 20, 28], [30, 20, 28], 3),
        ([2, 0, 1], [29, 31, 21], [1, 1, 1], 0),
        ([2, 0, 1], [31, 32, 22], [2, 1, 1], 1),
        ([0, 1], [33, 23], [1, 1], 0),
    ]
    for requests, lengths, chunks, contexts in steps:
        expected, *others = [
            runner.step(runner.prepare(batch_of(manager, requests, lengths, chunks, tokens, contexts))).logits
            for runner, manager in zip(runners, managers, strict=True)
        ]
        for logits in others:
            torch.testing.assert_close(logits, expected, **SAME_LOGITS)
    for runner in runners[1:]:
        torch.testing.assert_close(runner.pool, runners[0].pool, **SAME_LOGITS)


def test_a_graph_is_captured_once_for_a_bucket_and_replayed(bundled_model, prompts, boundaries):
    """Requests that end one after the other walk down the buckets; the tokens stay those of PyTorch's decode."""
    model = load_model(bundled_model)
    FakeGraph.captures = 0
    outputs = []
    for options in ({}, {"flashinfer": fake_flashinfer, "new_graph": FakeGraph}):
        runner = TorchRunner(model, 400, 16, **options)
        executor = Executor(runner, make_config("aligned", protected_tokens=16), boundaries, 1024, 8)
        handles = [executor.submit(ids, SamplingParams(20 + 25 * i)) for i, ids in enumerate(prompts[:5])]
        executor.run_until_idle()
        outputs.append([h.result().token_ids for h in handles])
    assert outputs[0] == outputs[1]
    assert FakeGraph.captures == len({next(b for b in BUCKETS if b >= n) for n in range(1, 6)})


class KeptOutput:
    """Keeps the output of what it recorded, and not the function, as a CUDA graph."""

    def capture(self, run):
        self._output = run()
        return self._output

    def replay(self):
        pass


@pytest.mark.parametrize("steps", [0, 1])
def test_a_runner_that_goes_gives_pool_and_model_back_at_once(tmp_path, steps):
    """A pool is most of a GPU: the next one must not have to wait for a collection of circles."""
    runner = TorchRunner(
        load_model(write_random_checkpoint(tmp_path)), 8, SIZE, flashinfer=fake_flashinfer, new_graph=KeptOutput
    )
    manager = make_manager(runner)
    assert manager.add_sequence(0, np.arange(4, 10, dtype=np.int32))
    for _ in range(steps):
        runner.step(runner.prepare(batch_of(manager, [0], [6], [1], {0: np.arange(4, 10)}, 0)))
    gc.collect()
    gc.disable()
    try:
        left = [weakref.ref(runner.pool), weakref.ref(runner.model)]
        del runner
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


def test_why_flashinfer_is_not_used_is_said(runners):
    assert find_flashinfer(runners[0].pool, torch.float32) == (None, "the pool is on cpu")
    assert runners[0].decode_description == "PyTorch (the pool is on cpu)"
    assert runners[1].decode_description == "a stand-in for FlashInfer"
    assert runners[2].decode_description.endswith("CUDA graphs for pure decode steps")
    assert find_flashinfer(pool_on_gpu(dim=32), torch.bfloat16)[1].endswith("head_dim (64, 128, 256), got bfloat16, 32")


def pool_on_gpu(dtype=torch.bfloat16, dim=64):
    kind = dataclasses.make_dataclass("Pool", ["is_cuda", "shape", "device", "dtype"])
    return kind(True, (1, 1, 2, 2, 8, dim), "cuda:0", dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_flashinfer_is_given_a_pool_of_the_models_type_or_of_fp8_alone(dtype, monkeypatch):
    """It would read any other as the model's, and say nothing."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    found, said = find_flashinfer(pool_on_gpu(getattr(torch, dtype)), torch.bfloat16)
    if dtype in ("bfloat16", "float8_e4m3fn"):
        assert (found, said) == (fake_flashinfer, "FlashInfer fake, every alias read")
    else:
        wanted = f"FlashInfer takes a pool of the model's bfloat16 or of float8_e4m3fn, got {dtype}"
        assert (found, said) == (None, wanted)
