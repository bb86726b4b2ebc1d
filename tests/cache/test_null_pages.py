"""Entries that point at null pages: giving up, crossing bands, and what must leave null pages alone."""

from __future__ import annotations

import numpy as np
import pytest
from cache.small_manager import BODY, SIZE, TAIL, make_manager

from trtllm_memshare.cache.block_pool import BlockPool
from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.cache.offsets import NO_BLOCK, decode_block_offsets
from trtllm_memshare.search.types import Decision

BANDS = [0, 10 * SIZE, 24 * SIZE]


def manager_with_null_pages(becomes="null", **changes) -> KVCacheManager:
    return make_manager(null_pages=NullPages([3, 7], BANDS), retired_becomes=becomes, **changes)


def add(manager: KVCacheManager, request: int, tokens: list[int], prompt: int) -> None:
    assert manager.add_sequence(request, np.array(tokens, np.int32), num_prompt_tokens=prompt)
    manager.mark_computed(request, len(tokens))


def generate(manager: KVCacheManager, request: int, tokens: list[int]) -> None:
    assert manager.append_tokens(request, tokens)
    manager.mark_computed(request, manager._sequences[request].num_tokens)


def test_a_page_serves_its_band():
    pages = NullPages([5, 2], [0, 4096, 8192])
    assert [pages.block_at(p) for p in (0, 4095, 4096, 8191)] == [5, 5, 2, 2]
    assert [pages.end_of_band(p) for p in (0, 4095, 4096)] == [4096, 4096, 8192]
    for position in (-1, 8192):
        with pytest.raises(ValueError, match=f"made for positions below 8192, got {position}"):
            pages.block_at(position)


@pytest.mark.parametrize(
    ("blocks", "bands"),
    [([], [0]), ([1], [0]), ([1], [1, 2]), ([1, 2], [0, 5, 5]), ([1, 1], [0, 5, 6]), ([-1], [0, 5])],
)
def test_null_pages_that_cannot_be_are_refused(blocks, bands):
    with pytest.raises(ValueError, match="null pages need"):
        NullPages(blocks, bands)


def test_a_null_page_is_out_of_the_pool_for_good():
    pool = BlockPool(4, SIZE)
    pool.reserve([2])
    blocks = pool.allocate(np.zeros(3, np.int32))
    assert sorted(blocks.tolist()) == [0, 1, 3]
    assert pool.allocate(np.zeros(1, np.int32)) is None
    assert (pool.num_used, pool.num_free, pool.num_usable) == (3, 0, 3)
    assert pool.release(np.array([2, 2, 2, 0])) == 1
    pool.check_integrity(np.array([0, 1, 9, 1]))  # tables may name it as often as they like
    for taken in ([1], [2], [0, 0]):
        with pytest.raises(ValueError, match="must be free blocks"):
            pool.reserve(taken)


@pytest.mark.parametrize("field", ["ref_count", "is_full"])
def test_the_integrity_check_knows_null_pages_by_name(field):
    pool = BlockPool(4, SIZE)
    pool.reserve([2])
    getattr(pool, field)[2] = 1
    with pytest.raises(RuntimeError, match=r"null pages \[2\] are to be neither free, counted nor full"):
        pool.check_integrity(np.zeros(4, np.int64))


def test_given_up_pages_point_at_the_null_page_and_their_blocks_are_free():
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    before = manager.block_table(0)
    assert manager.retire(0, np.array([2, 4, 4])) == 2
    after = manager.block_table(0)
    assert after[[2, 4]].tolist() == [3, 3]
    assert (after[[0, 1, 3, 5, 6]] == before[[0, 1, 3, 5, 6]]).all()
    assert decode_block_offsets(manager.block_offsets([0]), 2)[0].tolist() == after.tolist()
    rows = manager._sequences[0].token_rows[: 7 * SIZE].reshape(-1, SIZE)
    assert (rows < 0).all(1).nonzero()[0].tolist() == [2, 4]
    assert manager.origin_blocks(0).tolist() == [0, 1, -1, 3, -1, 5, 6]
    assert not np.isin(3, manager.resident_full_blocks(0))
    assert manager.retire(0, np.array([2, 4])) == 0  # once is enough
    stats = manager.stats()
    assert (stats.forgotten, stats.null_entries, stats.aliased_entries, stats.used_blocks) == (2, 2, 0, 5)
    manager.check_integrity()
    record = manager.remove_sequence(0)
    assert (record.retired_blocks, record.generated_blocks) == (2, 6)
    manager.check_integrity()
    assert manager.num_free_blocks == manager.pool.num_usable == 38


def test_what_could_go_is_looked_for_anew_once_a_request_has_a_page_more_or_less():
    """Many requests are asked for at every turn, and most have no new page since the last one."""
    manager = make_manager(null_pages=NullPages([3], [0, 24 * SIZE]), preset="pressure", protected_tokens=0)
    assert manager.add_sequence(0, np.array([2] * SIZE + BODY, np.int32), SIZE)
    manager.mark_computed(0, 7 * SIZE)
    before = manager.givable_pages(0)
    assert before.pages.tolist() == [1, 2, 3, 4, 5, 6]
    for token in BODY[:SIZE]:
        assert manager.append_tokens(0, [token])
        assert manager.givable_pages(0) is before
    manager.mark_computed(0, 8 * SIZE)
    grown = manager.givable_pages(0)
    assert (grown.pages.tolist(), grown.repeated.tolist()) == ([1, 2, 3, 4, 5, 6, 7], [True] + [False] * 6)
    manager.retire(0, np.array([2]))
    left = manager.givable_pages(0)
    assert (left.pages.tolist(), left.num_retired, left.most(0), left.most(9)) == ([1, 3, 4, 5, 6, 7], 1, 1, 6)
    manager.evict_blocks(0, np.array([3]))
    assert manager.givable_pages(0).pages.tolist() == [1, 4, 5, 6, 7]


def test_a_runner_that_skips_gets_no_entry():
    manager = make_manager(retired_becomes="dropped")
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    assert manager.retire(0, np.array([3])) == 1
    assert manager.block_table(0)[3] == NO_BLOCK
    assert manager.origin_blocks(0)[3] == -1
    assert manager.stats().null_entries == 1
    manager.check_integrity()


def test_without_null_pages_nothing_is_retired_to_them():
    manager = make_manager()
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    with pytest.raises(ValueError, match="only where the runner has written some, got none"):
        manager.retire(0, np.array([3]))
    with pytest.raises(ValueError, match="retired_becomes null needs null pages"):
        make_manager(retired_becomes="null")


@pytest.mark.parametrize(("logical", "named"), [([0, 1], r"\[0\]"), ([1, 3], r"\[3\]")])
def test_prompt_and_unfinished_pages_are_refused_and_nothing_changes(logical, named):
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY[: 2 * SIZE + 3], SIZE)
    before = manager.block_table(0)
    with pytest.raises(ValueError, match=f"full generated blocks 1 to 2, got {named}"):
        manager.retire(0, np.array(logical))
    assert (manager.block_table(0) == before).all()


def test_null_entries_follow_the_newest_query_over_the_edge_of_a_band_and_back():
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    manager.retire(0, np.array([2]))
    generate(manager, 0, BODY[: 3 * SIZE])
    assert manager.cross_bands([0], [10 * SIZE]) == 0  # its newest query is at 79
    assert manager.cross_bands([0], np.array([10 * SIZE + 1])) == 1
    assert manager.block_table(0)[2] == 7
    generate(manager, 0, BODY[:SIZE])
    manager.retire(0, np.array([5]))
    assert manager.block_table(0)[[2, 5]].tolist() == [7, 7]
    assert manager.cross_bands([0], [9 * SIZE]) == 2  # a resumed request's chunk
    assert manager.block_table(0)[[2, 5]].tolist() == [3, 3]
    manager.check_integrity()


def test_aliases_of_a_page_are_forgotten_with_it():
    manager = manager_with_null_pages(becomes="alias")
    add(manager, 0, [2] * SIZE + BODY + BODY + TAIL[:16], SIZE)
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 6
    assert manager.retire(0, np.array([2])) == 0  # given up already, in favour of 8
    assert manager.retire(0, np.array([8])) == 1
    assert manager.block_table(0)[[2, 8]].tolist() == [7, 7]
    assert manager.stats().aliased_entries == 5
    manager.check_integrity()


@pytest.mark.parametrize("becomes", ["null", "dropped"])
def test_an_exact_repeat_is_forgotten_and_its_tokens_rest_on_the_copy(becomes):
    manager = manager_with_null_pages(becomes)
    add(manager, 0, [2] * SIZE + BODY + BODY + TAIL[:16], SIZE)
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 6
    table = manager.block_table(0)
    assert set(table[1:7].tolist()) == {7 if becomes == "null" else NO_BLOCK}
    rows = manager._sequences[0].token_rows.reshape(-1, SIZE)
    assert (rows[1:7] == rows[7:13]).all()
    assert (manager.pool.ref_count[table[7:13]] == 1).all()
    manager.check_integrity()
    generate(manager, 0, BODY + TAIL[16:])  # a third copy takes over from the second one
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) >= 5
    manager.check_integrity()


def test_a_repeat_of_something_forgotten_stands_in_for_nothing_and_keeps_its_block():
    manager = manager_with_null_pages(direction="keep-earliest")
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    manager.retire(0, np.arange(1, 7))
    generate(manager, 0, BODY + TAIL[:16])
    assert manager.candidates() == []


def test_a_late_decision_about_something_forgotten_is_stale():
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY + BODY + TAIL[:16], SIZE)
    decisions = [Decision(c, 0.0) for c in manager.candidates()]
    manager.retire(0, np.array([2, 9]))  # one that was to go, and one that was to stand in for block 3
    assert manager.apply(decisions) == 4
    assert manager.stats().refused == {"stale": 2}
    manager.check_integrity()


def test_a_sample_forgets_a_shared_page_on_its_own():
    manager = manager_with_null_pages(scope="group")
    for request in range(2):
        tokens = np.array([2] * SIZE + BODY + TAIL[8 * request : 8 * request + 12], np.int32)
        assert manager.add_sequence(request, tokens, SIZE, 7)
        manager.mark_computed(request, len(tokens))
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 6
    assert manager.block_table(1)[1] == manager.block_table(0)[1]  # the other sample's text is shared, not forgotten
    assert manager.retire(0, np.array([1])) == 0
    assert manager.retire(1, np.array([1])) == 1
    manager.check_integrity()


def test_pause_and_evict_leave_null_pages_alone():
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    manager.retire(0, np.array([2, 3]))
    manager.evict_blocks(0, np.array([3, 4]))
    assert manager._sequences[0].num_retired == 3
    manager.check_integrity()
    digest = manager.state_digest()
    manager.retire(0, np.array([5]))
    assert manager.state_digest() != digest
    manager.pause_sequence(0)
    manager.check_integrity()
    assert manager.num_free_blocks == manager.pool.num_usable
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    manager.retire(0, np.array([2, 3]))
    manager.check_integrity()


def test_a_returning_requests_chunk_ends_with_the_band_that_its_null_entries_serve():
    """In its context all queries of a chunk read one entry: those of the next band read another null page."""
    manager = manager_with_null_pages(preset="pressure")
    tokens = np.array([2] * SIZE + BODY * 2, np.int32)  # 13 pages
    add(manager, 0, tokens.tolist(), SIZE)
    manager.retire(0, np.array([6, 5, 4, 3]))
    manager.pause_sequence(0)
    assert manager.add_sequence(0, tokens, SIZE)
    ends = []
    while (computed := manager._sequences[0].num_computed) < len(tokens):
        manager.cross_bands([0], [computed])
        manager.mark_computed(0, computed + manager.room_for_chunk(0))
        manager.check_integrity()
        ends.append(manager._sequences[0].num_computed)
    assert ends == [9 * SIZE, BANDS[1], len(tokens)]


def test_a_request_that_would_write_a_null_page_is_found():
    manager = manager_with_null_pages()
    add(manager, 0, [2] * SIZE + BODY, SIZE)
    assert manager.append_tokens(0, [5])
    manager._tables[manager._sequences[0].slot, 7] = 3
    with pytest.raises(RuntimeError, match="being written"):
        manager.check_integrity()
