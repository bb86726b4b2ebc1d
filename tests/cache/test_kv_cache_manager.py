"""Random schedules under hypothesis: the manager's invariants hold after every operation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import decode_block_offsets, encode_block_offsets
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Decision

SIZE = 8
BOUNDARIES = BoundaryTokens.from_texts(["\n", ". ", *(f"w{i}" for i in range(60))])
PHRASES = ([2, 3, 4, 3, 2, 2, 0], [2, 4, 4, 2, 3, 1], [3] * 5 + [0])
TAIL = np.random.default_rng(9).integers(2, 60, 32).tolist()  # no repeat of anything
OPEN = {"protected_tokens": 4, "protected_steps": 0, "min_run_tokens": 8, "shingle_tokens": 4, "max_aliases": 4}


def make_manager(direction="keep-latest", num_blocks=40, **changes) -> KVCacheManager:
    config = make_config("aligned", direction=direction, **{**OPEN, **changes})
    return KVCacheManager(num_blocks, 2, SIZE, 24, 6, config, make_matcher_factory(config, SIZE, BOUNDARIES))


class CacheMachine(RuleBasedStateMachine):
    """Adds, extends, computes, searches, applies late, pauses, resumes and removes in any order."""

    @initialize(direction=st.sampled_from(["keep-latest", "keep-earliest"]), seed=st.integers(0, 2**16))
    def start(self, direction, seed):
        self.manager = make_manager(direction)
        self.rng = np.random.default_rng(seed)
        self.tokens: dict[int, list[int]] = {}
        self.paused: set[int] = set()
        self.pending: list[list[Decision]] = []
        self.next_id = 0

    def live(self):
        return [i for i in self.tokens if i not in self.paused]

    @rule(length=st.integers(1, 20))
    def add(self, length):
        tokens = self.rng.integers(0, 5, length).tolist()
        free = self.manager.num_free_blocks
        if self.manager.add_sequence(self.next_id, np.array(tokens, np.int32)):
            self.tokens[self.next_id] = tokens
            self.manager.mark_computed(self.next_id, length)
        else:
            assert self.manager.num_free_blocks == free
        self.next_id += 1

    @precondition(lambda self: self.live())
    @rule(data=st.data(), repeats=st.integers(1, 4))
    def generate(self, data, repeats):
        request = data.draw(st.sampled_from(self.live()))
        for _ in range(repeats):
            for token in PHRASES[self.rng.integers(len(PHRASES))]:
                if len(self.tokens[request]) >= 24 * SIZE or not self.manager.append_tokens(request, [token]):
                    return
                self.tokens[request].append(token)
                self.manager.mark_computed(request, len(self.tokens[request]))

    @rule()
    def search(self):
        found = self.manager.candidates()
        for candidate in found:
            size = self.manager.tokens_per_block
            assert self.manager.pool.is_full[candidate.donor]
            assert candidate.block not in candidate.kept_rows // size
        self.pending.append([Decision(c, float(self.rng.random() * 0.3)) for c in found])

    @precondition(lambda self: self.pending)
    @rule()
    def apply_late(self):
        free = self.manager.num_free_blocks
        freed = self.manager.apply(self.pending.pop(0))
        assert self.manager.num_free_blocks == free + freed

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def pause(self, data):
        request = data.draw(st.sampled_from(self.live()))
        self.manager.pause_sequence(request)
        self.paused.add(request)

    @precondition(lambda self: self.paused)
    @rule(data=st.data())
    def resume(self, data):
        request = data.draw(st.sampled_from(sorted(self.paused)))
        tokens = np.array(self.tokens[request], np.int32)
        if self.manager.add_sequence(request, tokens, num_prompt_tokens=1):
            self.manager.mark_computed(request, len(tokens))
            self.paused.remove(request)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def remove(self, data):
        request = data.draw(st.sampled_from(self.live()))
        self.manager.remove_sequence(request)
        del self.tokens[request]

    @invariant()
    def tables_and_pool_agree(self):
        if hasattr(self, "manager"):
            self.manager.check_integrity()

    @invariant()
    def every_token_has_a_resident_row_that_held_the_same_token(self):
        if not hasattr(self, "manager"):
            return
        for request in self.live():
            sequence = self.manager._sequences[request]
            rows = sequence.token_rows[: sequence.num_computed]
            assert (self.manager.pool.ref_count[rows // SIZE] > 0).all()
            written = self.manager.pool.origin_position[rows // SIZE] + rows % SIZE
            tokens = np.array(self.tokens[request])
            assert (tokens[written] == tokens[: len(rows)]).all()

    @invariant()
    def no_chain_is_longer_than_allowed(self):
        if hasattr(self, "manager"):
            assert self.manager.pool.drift.max() <= self.manager.config.max_distance + 1e-6

    def teardown(self):
        if hasattr(self, "manager"):
            for request in self.live():
                self.manager.remove_sequence(request)
            assert self.manager.num_free_blocks == self.manager.pool.num_blocks


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestCacheMachine = CacheMachine.TestCase


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
    second = manager.candidates()
    assert len(second) == 4
    assert manager.apply([Decision(c, 0.3) for c in second]) == 0
    assert manager.stats().refused == {"drift": 4}


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


@pytest.mark.parametrize(("origin", "reason"), [(0, None), (4 * SIZE, "beyond_reader")])
def test_a_donor_of_another_request_must_lie_before_the_reader(origin, reason):
    from trtllm_memshare.search.types import Candidate

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
        1, 0, block, int(pool.generation[block]), donor, block * SIZE + rows, donor * SIZE + rows,
        np.full(SIZE, pool.generation[donor], np.int32),
    )  # fmt: skip
    assert manager.apply([Decision(candidate, 0.0)]) == (reason is None)
    assert manager.stats().refused == ({} if reason is None else {reason: 1})
    manager.check_integrity()
    manager.remove_sequence(0)
    manager.check_integrity()


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
