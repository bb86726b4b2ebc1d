"""Earlier pages in place of those that are given up: chains, donors that go, pauses, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from cache.small_manager import BODY, SIZE, TAIL, make_manager

from trtllm_memshare.cache.null_pages import NullPages

TOKENS = [2] * SIZE + BODY + TAIL[:20]  # a page of prompt, eight full ones of text, and one that is being written


def manager_with_pages():
    null_pages = NullPages([3, 7], [0, 10 * SIZE, 24 * SIZE])
    manager = make_manager(null_pages=null_pages, preset="pressure", need="nearest-earlier", retired_becomes="alias")
    assert manager.add_sequence(0, np.array(TOKENS, np.int32), SIZE)
    manager.mark_computed(0, len(TOKENS))
    return manager


def retire(manager, donors) -> int:
    return manager.retire(0, np.array(list(donors), np.int32), donors)


def test_a_chain_ends_at_the_page_that_is_there():
    manager = manager_with_pages()
    before = manager.block_table(0)
    assert retire(manager, {6: 4, 5: 4}) == 2
    assert retire(manager, {8: 7, 7: 4, 4: 2}) == 3  # in this order: 7 takes 8 along, and 4 takes all
    after = manager.block_table(0)
    assert (after[[2, 4, 5, 6, 7, 8]] == before[2]).all()
    assert (after[[0, 1, 3, 9]] == before[[0, 1, 3, 9]]).all()
    assert manager._sequences[0].donors == dict.fromkeys((4, 5, 6, 7, 8), 2)
    rows = manager._sequences[0].token_rows[: 9 * SIZE].reshape(-1, SIZE)
    assert (rows[8] == before[2] * SIZE + np.arange(SIZE)).all()
    stats = manager.stats()
    assert (stats.shared, stats.forgotten, stats.aliased_entries, stats.used_blocks) == (5, 0, 5, 5)
    assert manager.origin_blocks(0).tolist() == [0, 1, 2, 3, 2, 2, 2, 2, 2, 9]
    assert manager.givable_pages(0).pages.tolist() == [1, 2, 3]
    manager.check_integrity()
    assert manager.remove_sequence(0).retired_blocks == 5
    manager.check_integrity()


def test_aliases_are_forgotten_with_their_donor_and_others_are_not():
    manager = manager_with_pages()
    retire(manager, {4: 2, 5: 3})
    assert manager.retire(0, np.array([2, 4])) == 1
    assert manager.block_table(0)[[2, 4]].tolist() == [3, 3]
    assert manager._sequences[0].donors == {5: 3}
    manager.check_integrity()


def test_only_pages_that_are_asked_for_go_and_those_without_a_donor_are_forgotten():
    manager = manager_with_pages()
    assert manager.retire(0, np.array([1, 4]), {4: 1, 5: 2}) == 2
    assert manager._sequences[0].retired.nonzero()[0].tolist() == [1, 4]  # the donor went after its alias
    assert manager.block_table(0)[[1, 4]].tolist() == [3, 3]
    manager.check_integrity()


def test_a_paused_request_comes_back_with_its_aliases():
    manager = manager_with_pages()
    retire(manager, {7: 4, 4: 2, 6: 5})
    manager.retire(0, np.array([3]))
    free = manager.num_free_blocks
    manager.pause_sequence(0)
    assert manager.add_sequence(0, np.array(TOKENS, np.int32), SIZE)
    assert manager.num_free_blocks == free
    assert manager.donors(0) == {}  # none has gone yet in this life
    while manager._sequences[0].num_computed < len(TOKENS):
        manager.mark_computed(0, manager._sequences[0].num_computed + min(SIZE, manager.room_for_chunk(0)))
        manager.check_integrity()
    table = manager.block_table(0)
    assert (table[[4, 7]] == table[2]).all()
    assert table[6] == table[5]
    assert manager.pool.is_null[table[3]]
    assert manager.donors(0) == {7: 2, 4: 2, 6: 5}
    assert manager.num_free_blocks == free


@pytest.mark.parametrize(("page", "donor"), [(4, 0), (4, 4), (4, 5), (4, 6), (9, 2)])
def test_donors_that_cannot_stand_in_are_refused_and_nothing_changes(page, donor):
    """A page of prompt, the page itself, a later one, one that has gone; and a page that is being written."""
    manager = manager_with_pages()
    retire(manager, {6: 5})
    before = manager.block_table(0)
    with pytest.raises(ValueError, match=f"can stand in for page {page} of request 0, got {donor}"):
        retire(manager, {page: donor})
    assert (manager.block_table(0) == before).all()
    manager.check_integrity()


def test_the_integrity_check_finds_an_alias_that_reads_another_page():
    manager = manager_with_pages()
    retire(manager, {6: 5})
    manager._sequences[0].donors[6] = 4
    with pytest.raises(RuntimeError, match="are not read in place of those that were given up"):
        manager.check_integrity()
