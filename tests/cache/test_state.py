"""What the integrity check and the digest see: states that no operation leaves behind, made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.search.config import make_config


def make() -> KVCacheManager:
    """A prompt of 20 tokens and 100 generated ones in pages of 16, page 4 forgotten; null pages in blocks 0 and 1."""
    manager = KVCacheManager(64, 2, 16, 32, 4, make_config("pressure"), None, NullPages([0, 1], [0, 64, 512]))
    assert manager.add_sequence(1, np.arange(20, dtype=np.int32))
    manager.mark_computed(1, 20)
    for computed in range(21, 121):
        assert manager.append_tokens(1, [5])
        manager.mark_computed(1, computed)
    manager.retire(1, np.array([4]))
    manager.check_integrity()
    return manager


def lose_block(manager, table, sequence):
    manager.pool.release(table[3:4].copy())
    table[3] = NO_BLOCK


def forget_prompt(manager, table, sequence):
    manager.pool.release(table[:1].copy())
    table[0] = 1
    sequence.retired[0] = True


def mark_held(manager, table, sequence):
    sequence.retired[3] = True


def unmark(manager, table, sequence):
    sequence.retired[4] = False


def swap_rows(manager, table, sequence):
    sequence.token_rows[:16] = sequence.token_rows[32:48]


def foreign_rows(manager, table, sequence):
    sequence.token_rows[4 * 16] = 60 * 16


def not_full(manager, table, sequence):
    manager.pool.is_full[table[2]] = False


def full_too_soon(manager, table, sequence):
    manager.pool.is_full[table[7]] = True


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_block, r"'without a block, but not given up': \[3\]"),
        (forget_prompt, r"'given up, but no full generated pages': \[0\]"),
        (mark_held, r"'given up, but held all the same': \[3\]"),
        (unmark, r"'without a block, but not given up': \[4\]"),
        (swap_rows, r"'not at the rows of their own block': \[0\]"),
        (foreign_rows, r"'at rows of blocks that are not in the table': \[4\]"),
        (not_full, r"'full by their block and not by what is computed': \[2\]"),
        (full_too_soon, r"'full by their block and not by what is computed': \[7\]"),
    ],
)
def test_pages_that_contradict_one_another_are_named(damage, named):
    manager = make()
    damage(manager, manager._tables[0], manager._sequences[1])
    with pytest.raises(RuntimeError, match=rf"pages of request 1 contradict one another: .*{named}.*, 120 of 120 tok"):
        manager.check_integrity()


@pytest.mark.parametrize("damage", [mark_held, not_full])
def test_the_digest_has_what_was_given_up_and_what_is_full(damage):
    manager = make()
    assert manager.state_digest() == make().state_digest()
    damage(manager, manager._tables[0], manager._sequences[1])
    assert manager.state_digest() != make().state_digest()


def test_a_block_that_is_being_written_has_one_entry():
    manager = make()
    table = manager._tables[0]
    manager.pool.release(table[6:7].copy())
    table[6] = table[7]
    manager.pool.ref_count[table[7]] += 1
    with pytest.raises(RuntimeError, match=r"are being written, with \[2\] references"):
        manager.check_integrity()
