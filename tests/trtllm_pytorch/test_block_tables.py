"""Main leaves the block table as it is where a batch has not changed: no row may be stale when kernels read it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_attention import KVCacheParams
from trtllm_pytorch.fake_executor import FakeExecutor
from trtllm_pytorch.fake_requests import FinishReason, LlmRequestState
from trtllm_pytorch.test_pressure import PRESSURE
from trtllm_pytorch.test_tail_swap import MANAGERS, NUM_NULL, check_contents, check_pages, drive

from trtllm_memshare.trtllm.pytorch.block_tables import BlockTables


class FastPrepare(FakeExecutor):
    """The shorter preparation of main (``_apply_steady_gen_fast_prepare``, 29 November 2026).

    With the overlap scheduler, from the second pass of one and the same batch that generates. It counts cached tokens
    by itself from then on. A cache that compression manages is left out of it. ``is_lazy``: by its unit test, it works
    lengths out in place, and has a table written only where a request opens a page.
    """

    is_lazy = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._recorded: list[int] | None = None
        self.num_fast = 0

    def _write_table(self, batch):
        ids = [r.py_request_id for r in batch.generation_requests]
        is_left_out = not self.is_lazy and getattr(self.manager, "kv_compression_manages_history", False)
        if batch.context_requests or not ids or not self.overlap or is_left_out or ids != self._recorded:
            super()._write_table(batch)
            self._recorded = None if batch.context_requests else ids
            self._counted = [self.processed[i] for i in ids]
            return
        self.num_fast += 1
        metadata = self.metadata
        self._counted = [count + 1 for count in self._counted]
        if not self.is_lazy:
            metadata.kv_cache_params = KVCacheParams(True, list(self._counted))
            metadata.prepare()
            assert self._counted == [self.processed[i] for i in ids]
            return
        for lengths in (metadata.kv_lens, metadata.kv_lens_cuda, metadata.kv_lens_runtime):
            lengths[: len(ids)] += 1
        if any(self.processed[i] % self.manager.tokens_per_block == 0 for i in ids):
            super()._write_table(batch)


class LazyTables(FastPrepare):
    """As its unit test expects it, whatever manages the cache."""

    is_lazy = True


def check(executor, step):
    check_contents(executor)
    check_pages(executor)


@pytest.mark.parametrize("null_entries", ["read", "skip"])
@pytest.mark.parametrize("kind", ["V1 main", "V2 main"])
def test_mains_shorter_preparation_keeps_rows_and_lengths_right(kind, null_entries, null_pages):
    """V2 is prepared in full: TensorRT-LLM takes sharing for compression there."""
    pages, num_fast, forgotten = null_pages if null_entries == "read" else None, 0, 0
    for seed in range(6):
        make = make_sharing_class(MANAGERS[kind], null_pages=pages, null_entries=null_entries, **PRESSURE)
        executor = drive(make, random.Random(seed), kind, True, False, check, FastPrepare, NUM_NULL if pages else 0)
        assert executor.manager.memshare.failures.num_errors == 0
        num_fast += executor.num_fast
        forgotten += executor.manager.memshare.manager.stats().forgotten
    assert num_fast > 600 if kind == "V1 main" else num_fast == 0
    assert forgotten > 50


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["V1 main", "V2 main"])
def test_where_a_table_is_missed_nothing_new_goes_and_nobody_reads_a_freed_page(kind, seed, null_pages, caplog):
    """Found in the first batch that stays the same, before pages are given up: nobody has to end."""
    make = make_sharing_class(MANAGERS[kind], null_pages=null_pages, **PRESSURE)
    executor = drive(make, random.Random(seed), kind, True, False, check, LazyTables, NUM_NULL)
    failures = executor.manager.memshare.failures
    assert executor.num_fast > 0
    assert failures.num_errors == 1
    assert failures.num_failed_requests == 0
    assert "ran an iteration without writing its block table. Please report" in caplog.text


def test_a_request_whose_row_was_not_read_in_time_ends_alone(null_pages):
    make = make_sharing_class(MANAGERS["V1 main"], null_pages=null_pages, **PRESSURE)
    skipped = []

    class MissesOnce(FakeExecutor):
        """Leaves out the table of one iteration in which a row has changed, and computes nothing in it."""

        def _forward(self, batch):
            unread = self.manager.memshare._rows._map.unread()
            if unread and not skipped and len(batch.generation_requests) > 1:
                skipped.extend(unread)
                self._ids = [r.py_request_id for r in batch.all_requests()]
                for request in batch.generation_requests:
                    self.processed[request.py_request_id] += 1
                return
            super()._forward(batch)

    executor = drive(make, random.Random(3), "V1 main", True, False, None, MissesOnce, NUM_NULL)
    shared = executor.manager.memshare
    assert skipped
    assert shared.failures.num_errors == 1
    ended = [r.py_request_id for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert sorted(ended) == sorted(skipped)
    assert all(r.state is LlmRequestState.GENERATION_COMPLETE for r in executor.requests)


def test_a_pass_that_failed_for_all_is_no_missed_table():
    """TensorRT-LLM answers every active request with the error; those that come next are others."""
    tables = BlockTables(SimpleNamespace(unread=list, shortened=frozenset), None, None, None)
    tables.num = 5
    tables.look({1: 0, 2: 0})
    tables.look({4: 0})
    tables.num = 6
    tables.look({4: 0})
    with pytest.raises(RuntimeError, match="without writing its block table"):
        tables.look({4: 0, 5: 0})
