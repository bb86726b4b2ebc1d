"""Sharing between samples of one prompt."""

from __future__ import annotations

import numpy as np
import pytest
from cache.small_manager import BODY, SIZE, TAIL, make_manager

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import decode_block_offsets
from trtllm_memshare.search.types import Candidate, Decision

PROMPT = [2] * SIZE


def sample_of(manager: KVCacheManager, request: int, generated: list[int], prompt=PROMPT, group: int | None = 7):
    """Adds a sample of a prompt, all computed."""
    tokens = np.array(prompt + generated, np.int32)
    assert manager.add_sequence(request, tokens, len(prompt), group)
    manager.mark_computed(request, len(tokens))


def share(manager: KVCacheManager) -> int:
    """Applies whatever is offered; returns the blocks that were freed."""
    freed = manager.apply([Decision(c, 0.0) for c in manager.candidates()])
    manager.check_integrity()
    return freed


def test_samples_that_begin_alike_hold_one_copy_of_their_beginning():
    manager = make_manager(scope="group")
    for request in range(3):
        sample_of(manager, request, BODY + TAIL[8 * request : 8 * request + 12])
    assert share(manager) == 2 * 6
    tables = [manager.block_table(request) for request in range(3)]
    assert (tables[0][1:7] == [t[1:7] for t in tables]).all()
    assert len({int(t[0]) for t in tables}) == 3  # blocks of the prompt stay apart
    assert share(manager) == 0
    manager.remove_sequence(0)
    manager.check_integrity()
    assert manager.pool.num_used == 2 * 3 + 6
    sample_of(manager, 3, BODY + TAIL[:12])  # the first writer is gone, its text is not
    assert share(manager) == 6


@pytest.mark.parametrize(
    ("scope", "prompt", "group"),
    [("group", [3] * SIZE, 7), ("group", PROMPT, 8), ("group", PROMPT, None), ("request", PROMPT, 7)],
)
def test_nothing_is_shared_with_another_prompt_another_number_or_without_one(scope, prompt, group):
    manager = make_manager(scope=scope)
    sample_of(manager, 7, BODY + TAIL, group=None if group is None else 7)
    sample_of(manager, 1, BODY + TAIL, prompt, group)
    assert share(manager) == 0
    assert manager.candidates() == []
    assert manager.stats().refused == {}


def test_the_same_text_at_another_place_is_left_alone():
    manager = make_manager(scope="group")
    sample_of(manager, 0, BODY + TAIL)
    sample_of(manager, 1, TAIL[::-1][: 2 * SIZE] + BODY + TAIL)
    assert manager.candidates() == []


def test_samples_that_parted_share_again_where_they_meet():
    manager = make_manager(scope="group", min_run_tokens=2 * SIZE)
    sample_of(manager, 0, BODY + TAIL[:12])
    sample_of(manager, 1, TAIL[::-1][:SIZE] + BODY[SIZE:] + TAIL[:12])
    assert [c.logical for c in manager.candidates()] == [3, 4, 5, 6, 7]  # block 2 has but half a run before its end


def test_each_sample_leaves_a_shared_block_for_its_own_repeat_and_the_last_one_frees_it():
    manager = make_manager(scope="group", max_aliases=2)
    for request in range(2):
        sample_of(manager, request, BODY + TAIL[8 * request : 8 * request + 12])
    assert share(manager) == 6
    shared = manager.block_table(0)[1:7]
    for request, freed in ((0, 0), (1, 5)):  # at a phase of 12 the last block's copy is still to be completed
        repeat = BODY + TAIL[20:32]
        assert manager.append_tokens(request, repeat)
        manager.mark_computed(request, 7 * SIZE + 12 + len(repeat))
        assert share(manager) >= freed
        assert (manager.pool.ref_count[shared] == (1 if request == 0 else 0)).sum() >= 5
    records = [manager.remove_sequence(request) for request in range(2)]
    manager.check_integrity()
    assert sum(r.retired_blocks for r in records) == manager.stats().shared


@pytest.mark.parametrize("paused", [0, 1])
def test_a_sample_that_was_paused_shares_again(paused):
    manager = make_manager(scope="group")
    texts = [BODY + TAIL[8 * request : 8 * request + 12] for request in range(2)]
    for request in range(2):
        sample_of(manager, request, texts[request])
    assert share(manager) == 6
    manager.pause_sequence(paused)
    sample_of(manager, paused, texts[paused])
    assert share(manager) == 6


def test_a_pair_whose_first_writer_has_gone_takes_the_next_one():
    manager = make_manager(scope="group", protected_tokens=6 * SIZE)
    for request in range(3):
        sample_of(manager, request, BODY)
    assert manager.candidates() == []  # all is protected
    manager.remove_sequence(0)
    assert manager.append_tokens(2, TAIL)
    manager.mark_computed(2, 7 * SIZE + len(TAIL))
    assert share(manager) == 4


def test_a_group_forgets_samples_that_have_ended():
    manager = make_manager(scope="group")
    sample_of(manager, 0, BODY)
    (group,) = manager._groups.values()
    for request in range(1, 30):
        sample_of(manager, request, BODY[: 2 * SIZE] + [2 + request] * SIZE + BODY)
        share(manager)
        manager.remove_sequence(request)
    assert sum(map(len, group._writers.values())) == 6
    manager.remove_sequence(0)
    assert manager._groups == {}


def test_pairs_of_a_group_count_towards_max_pairs_and_the_rest_follows():
    manager = make_manager(scope="group", max_pairs=4)
    for request in range(3):
        sample_of(manager, request, BODY + TAIL[8 * request : 8 * request + 12])
    assert [len(manager.candidates()) for _ in range(4)] == [4, 4, 4, 0]


def test_recent_text_of_a_sample_is_protected():
    manager = make_manager(scope="group", protected_tokens=2 * SIZE)
    for request in range(2):
        sample_of(manager, request, BODY)
    assert share(manager) == 4
    assert manager.append_tokens(1, TAIL[: 2 * SIZE])
    manager.mark_computed(1, 9 * SIZE)
    assert share(manager) == 2


def test_a_block_that_the_first_sample_gave_up_for_a_repeat_at_another_phase_is_no_copy():
    manager = make_manager(scope="group")
    sample_of(manager, 0, BODY + TAIL[:6] + BODY + TAIL[6:18])
    assert share(manager) == 6
    sample_of(manager, 1, BODY + TAIL[18:30])
    assert manager.candidates() == []


def test_a_late_decision_is_refused_when_a_neighbour_of_its_donor_was_left_to_the_other_sample():
    """Text at blocks 1 to 6 (X), again from slot 6 of block 7 to slot 5 of block 13 (P), and a third time."""
    manager = make_manager(scope="group")
    for request in range(2):
        sample_of(manager, request, BODY + TAIL[:6] + BODY + TAIL[6:14])
    first = manager.candidates()
    across = [c for c in first if c.request_id == 1 and (c.kept_rows == c.donor * SIZE + np.arange(SIZE)).all()]
    late = [c for c in first if c.request_id == 0]
    assert manager.apply([Decision(c, 0.0) for c in across]) == len(across) >= 12
    assert manager.append_tokens(0, BODY + TAIL[14:24])
    manager.mark_computed(0, manager._sequences[0].num_tokens)
    leaving = [c for c in manager.candidates() if c.request_id == 0]
    assert [c.logical for c in leaving] == [8, 9, 10, 11, 12]
    manager.apply([Decision(c, 0.0) for c in leaving] + [Decision(c, 0.1) for c in late])
    manager.check_integrity()
    rows = manager._sequences[0].token_rows[: manager._sequences[0].num_computed]
    assert np.isin(rows // SIZE, manager.block_table(0)).all()
    assert manager.stats().refused["out_of_phase"] >= 1


def test_a_donor_of_another_group_is_refused():
    manager = make_manager(scope="group")
    sample_of(manager, 0, BODY + TAIL[:12], group=1)
    sample_of(manager, 1, BODY + TAIL[:12], group=2)
    pool, slots = manager.pool, np.arange(SIZE, dtype=np.int32)
    block, donor = (int(manager.block_table(request)[2]) for request in (1, 0))
    candidate = Candidate(
        1, 0, 2, block, int(pool.generation[block]), donor, block * SIZE + slots, donor * SIZE + slots,
        np.full(SIZE, pool.generation[donor], np.int32),
    )  # fmt: skip
    assert manager.apply([Decision(candidate, 0.0)]) == 0
    assert manager.stats().refused == {"other_group": 1}


@pytest.mark.parametrize(("origin", "reason"), [(0, None), (4 * SIZE, "beyond_reader")])
def test_a_donor_of_another_request_must_lie_before_the_reader(origin, reason):
    manager = make_manager(scope="group")
    run = np.arange(4 * SIZE, dtype=np.int32) % 3 + 2
    assert manager.add_sequence(0, np.concatenate([run, run]), num_prompt_tokens=1, group=7)
    assert manager.add_sequence(1, run, num_prompt_tokens=1, group=7)
    manager.mark_computed(0, 8 * SIZE)
    manager.mark_computed(1, 4 * SIZE)
    pool = manager.pool
    donor = int(decode_block_offsets(manager.block_offsets([0]), 2)[0, origin // SIZE + 1])
    block = int(decode_block_offsets(manager.block_offsets([1]), 2)[0, 1])
    rows = np.arange(SIZE, dtype=np.int32)
    candidate = Candidate(
        1, 0, 1, block, int(pool.generation[block]), donor, block * SIZE + rows, donor * SIZE + rows,
        np.full(SIZE, pool.generation[donor], np.int32),
    )  # fmt: skip
    assert manager.apply([Decision(candidate, 0.0)]) == (reason is None)
    assert manager.stats().refused == ({} if reason is None else {reason: 1})
    manager.check_integrity()
    manager.remove_sequence(0)
    manager.check_integrity()
