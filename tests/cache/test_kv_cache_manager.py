"""The manager: remaps within one request, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from cache.small_manager import SIZE, TAIL, make_manager

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import decode_block_offsets, encode_block_offsets
from trtllm_memshare.search.types import Decision


def run_of(manager: KVCacheManager, request: int, tokens: list[int], prompt: int) -> None:
    """Adds a request whose tokens are all computed."""
    assert manager.add_sequence(request, np.array(tokens, np.int32), num_prompt_tokens=prompt)
    manager.mark_computed(request, len(tokens))


def test_offsets_follow_tensorrt_llm_and_decode_again():
    blocks = np.array([[3, 0, -1]], np.int32)
    offsets = encode_block_offsets(blocks, num_layers=4)
    assert offsets.tolist() == [[[[24, 0, 2**31 - 1], [25, 1, 2**31 - 1]]]]
    assert (decode_block_offsets(offsets, 4) == blocks).all()


def test_a_shifted_repeat_frees_the_older_blocks_and_keeps_every_prompt_block():
    manager = make_manager()
    rng = np.random.default_rng(1)
    body = rng.integers(2, 60, 5 * SIZE).tolist()
    tokens = [2] * 5 + body + [0, 3, 0] + body + [0] * 12
    run_of(manager, 0, tokens, prompt=5)
    before = decode_block_offsets(manager.block_offsets([0]), 2)[0]
    found = manager.candidates()
    assert manager.apply([Decision(c, 0.0) for c in found]) == len(found) >= 4
    after = decode_block_offsets(manager.block_offsets([0]), 2)[0]
    changed = np.flatnonzero(before != after)
    assert 0 not in changed
    assert set(after[changed]) <= set(before[np.flatnonzero(before == after)])
    manager.check_integrity()


def steps_that_repeat(manager: KVCacheManager, request: int, times: int) -> None:
    """A request of that many equal steps of three blocks: each block has counterparts in two of the others."""
    step = [*np.random.default_rng(5).integers(2, 60, 3 * SIZE - 1).tolist(), 0]
    tokens = [2] * (SIZE - 1) + [0] + step * times + TAIL
    run_of(manager, request, tokens, prompt=SIZE)


@pytest.mark.parametrize("max_pairs", [1, 4, 7, 64])
def test_no_search_offers_more_than_max_pairs_though_one_block_has_several_counterparts(max_pairs):
    """What was cut off comes with the next search, and a block with more counterparts than fit blocks nothing."""
    manager = make_manager(matcher="steps", max_pairs=max_pairs, min_step_tokens=8, num_blocks=60)
    everything = make_manager(matcher="steps", max_pairs=512, min_step_tokens=8, num_blocks=60)
    for each in (manager, everything):
        steps_that_repeat(each, 0, 4)
        steps_that_repeat(each, 1, 3)
    whole = everything.candidates()
    blocks = [(c.request_id, c.logical) for c in whole]
    assert max(blocks.count(b) for b in blocks) > 1
    assert len(blocks) > 7
    searches = []
    while found := manager.candidates():
        assert len(found) <= max_pairs
        searches.append([(c.request_id, c.logical, c.donor) for c in found])
        assert len(searches) <= 2 * len(whole), "the searches go round in circles"
    offered = {pair for search in searches for pair in search}
    for block in set(blocks):
        count = len([pair for pair in offered if pair[:2] == block])
        assert min(max_pairs, blocks.count(block)) <= count <= blocks.count(block)


def test_keep_earliest_retires_the_newer_copy():
    manager = make_manager("keep-earliest")
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    tokens = [2] * SIZE + body + body + TAIL[:16]
    run_of(manager, 0, tokens, prompt=SIZE)
    before = decode_block_offsets(manager.block_offsets([0]), 2)[0]
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 4
    after = decode_block_offsets(manager.block_offsets([0]), 2)[0]
    assert np.flatnonzero(before != after).tolist() == [5, 6, 7, 8]
    assert (after[5:9] == before[1:5]).all()


def test_chains_hand_dependants_on_and_refuse_to_drift():
    manager = make_manager(max_distance=0.5)
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    run_of(manager, 0, [2] * SIZE + body + body + TAIL[:16], prompt=SIZE)
    assert manager.apply([Decision(c, 0.3) for c in manager.candidates()]) == 4
    for token in body + TAIL[16:]:
        assert manager.append_tokens(0, [token])
        manager.mark_computed(0, manager._sequences[0].num_tokens)
    second, refused = manager.candidates(), []
    assert len(second) == 4
    manager.watch_remaps(lambda decision: None, lambda decision, reason: refused.append((decision.candidate, reason)))
    assert manager.apply([Decision(c, 0.3) for c in second]) == 0
    assert manager.stats().refused == {"drift": 4}
    assert sorted(c.logical for c, _ in refused) == [c.logical for c in second]
    assert {reason for _, reason in refused} == {"drift"}


def test_all_aliases_of_a_block_move_together():
    manager = make_manager()
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    run_of(manager, 0, [2] * SIZE + body + body + TAIL[:16], prompt=SIZE)
    manager.apply([Decision(c, 0.1) for c in manager.candidates()])
    for token in body + TAIL[16:]:
        manager.append_tokens(0, [token])
        manager.mark_computed(0, manager._sequences[0].num_tokens)
    assert manager.apply([Decision(c, 0.1) for c in manager.candidates()]) == 4
    table = decode_block_offsets(manager.block_offsets([0]), 2)[0]
    assert (table[1:5] == table[5:9]).all()
    assert (manager.pool.ref_count[table[1:5]] == 3).all()
    rows = manager._sequences[0].token_rows
    assert (rows[SIZE : 5 * SIZE] == rows[5 * SIZE : 9 * SIZE]).all()


def test_aliases_beyond_the_limit_are_refused():
    manager = make_manager(max_aliases=2)
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    run_of(manager, 0, [2] * SIZE + body + body + body + TAIL[:16], prompt=SIZE)
    for _ in range(3):
        manager.apply([Decision(c, 0.0) for c in manager.candidates()])
    assert manager.pool.ref_count.max() == 2
    assert manager.stats().refused["max_aliases"] > 0


def test_a_decision_is_stale_after_a_pause_and_a_resume():
    manager = make_manager()
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    tokens = [2] * SIZE + body + body + TAIL[:16]
    run_of(manager, 0, tokens, prompt=SIZE)
    decisions = [Decision(c, 0.0) for c in manager.candidates()]
    manager.pause_sequence(0)
    run_of(manager, 0, tokens, prompt=SIZE)
    assert manager.apply(decisions) == 0
    assert manager.stats().refused == {"stale": len(decisions)}
    again = manager.candidates()
    assert manager.apply([Decision(c, 0.0) for c in again]) == len(again) == len(decisions)


def test_a_full_pool_is_no_error_and_misuse_is():
    manager = make_manager(num_blocks=3)
    assert manager.add_sequence(0, np.zeros(2 * SIZE, np.int32))
    assert not manager.add_sequence(1, np.zeros(2 * SIZE, np.int32))
    assert manager.append_tokens(0, [0])
    with pytest.raises(ValueError, match="request 0 is in the cache already"):
        manager.add_sequence(0, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="needs 25 blocks, a table has 24"):
        manager.add_sequence(2, np.zeros(25 * SIZE, np.int32))


def test_recent_steps_are_protected_beyond_recent_tokens():
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    tokens = [2] * SIZE + body + [0] + body + [0] + [2, 3, 0] * 4
    for steps, expected in ((1, True), (40, False)):
        manager = make_manager(protected_tokens=0, protected_steps=steps)
        run_of(manager, 0, tokens, prompt=SIZE)
        assert bool(manager.candidates()) is expected


def test_a_block_waits_until_its_copy_has_settled():
    """Copies of the blocks 1 to 4 end at 47, 55, 63 and 71; 32 more tokens must have been written after each."""
    manager = make_manager(settled_tokens=32)
    body = np.random.default_rng(1).integers(2, 60, 4 * SIZE).tolist()
    run_of(manager, 0, [2] * SIZE + body + body + TAIL[:16], prompt=SIZE)  # 88 tokens
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 2
    assert manager.candidates() == []
    assert manager.append_tokens(0, TAIL[16:32])
    manager.mark_computed(0, 104)
    assert manager.apply([Decision(c, 0.0) for c in manager.candidates()]) == 2
    manager.check_integrity()
