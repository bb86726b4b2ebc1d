"""Random schedules under hypothesis: the manager's invariants hold after every operation."""

from __future__ import annotations

import numpy as np
from cache.small_manager import SIZE, make_manager
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtllm_memshare.cache.null_pages import NullPages, is_null
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.search.types import Decision

PHRASES = ([2, 3, 4, 3, 2, 2, 0], [2, 4, 4, 2, 3, 1], [3] * 5 + [0])


class CacheMachine(RuleBasedStateMachine):
    """Adds, extends, computes, searches, applies late, gives up, pauses, resumes and removes in any order."""

    @initialize(
        direction=st.sampled_from(["keep-latest", "keep-earliest"]),
        scope=st.sampled_from(["request", "group"]),
        becomes=st.sampled_from(["alias", "null", "dropped"]),
        seed=st.integers(0, 2**16),
    )
    def start(self, direction, scope, becomes, seed):
        null_pages = None if becomes == "dropped" else NullPages([39, 0], [0, 7 * SIZE, 24 * SIZE])
        self.manager = make_manager(direction, scope=scope, retired_becomes=becomes, null_pages=null_pages)
        self.groups: dict[int, int | None] = {}
        self.held = np.full(self.manager.pool.num_blocks * SIZE, -1)  # the token whose K and V each row holds
        self.rng = np.random.default_rng(seed)
        self.tokens: dict[int, list[int]] = {}
        self.paused: set[int] = set()
        self.pending: list[list[Decision]] = []
        self.next_id = 0

    def live(self):
        return [i for i in self.tokens if i not in self.paused]

    def compute(self, request, start):
        """Marks a request's tokens as computed, and writes them down where their K and V went."""
        tokens = self.tokens[request]
        self.held[self.manager._sequences[request].token_rows[start : len(tokens)]] = tokens[start:]
        self.manager.mark_computed(request, len(tokens))

    @rule(length=st.integers(1, 20), group=st.sampled_from([None, 0, 1]))
    def add(self, length, group):
        tokens = self.rng.integers(0, 5, length).tolist() if group is None else [2, 3, 4 + group]
        free = self.manager.num_free_blocks
        if self.manager.add_sequence(self.next_id, np.array(tokens, np.int32), group=group):
            self.tokens[self.next_id], self.groups[self.next_id] = tokens, group
            self.compute(self.next_id, 0)
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
                self.compute(request, len(self.tokens[request]) - 1)

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
    def give_up(self, data):
        request = data.draw(st.sampled_from(self.live()))
        sequence = self.manager._sequences[request]
        choices = range(sequence.first_generated_block, sequence.num_computed // SIZE)
        chosen = np.array([b for b in choices if self.rng.random() < 0.3], np.int64)
        free, shared = self.manager.num_free_blocks, self.manager.stats().forgotten
        freed = self.manager.retire(request, chosen)
        assert self.manager.num_free_blocks == free + freed
        assert self.manager.stats().forgotten == shared + freed
        assert sequence.retired[chosen].all()

    @precondition(lambda self: self.live())
    @rule()
    def next_step(self):
        """Null entries of every request point at the page of the band that its newest query is in."""
        live, null_pages = self.live(), self.manager.null_pages
        lengths = [len(self.tokens[r]) for r in live]
        self.manager.cross_bands(live, lengths)
        for request, length in zip(live, lengths, strict=True):
            table = self.manager.block_table(request)
            null = table[self.manager.pool.is_null[table] & (table != NO_BLOCK)]
            assert null_pages is not None or not len(null)
            assert all(block == null_pages.block_at(length - 1) for block in null.tolist())

    @precondition(lambda self: self.live())
    @rule(data=st.data(), has_sampled=st.booleans())
    def pause(self, data, has_sampled):
        request = data.draw(st.sampled_from(self.live()))
        if has_sampled and len(self.tokens[request]) < 24 * SIZE:
            self.tokens[request].append(int(self.rng.integers(0, 5)))  # sampled, and no room for it in the cache
        self.manager.pause_sequence(request)
        self.paused.add(request)

    @precondition(lambda self: self.paused)
    @rule(data=st.data())
    def resume(self, data):
        request = data.draw(st.sampled_from(sorted(self.paused)))
        tokens = np.array(self.tokens[request], np.int32)
        num_prompt = 1 if self.groups[request] is None else 3
        if self.manager.add_sequence(request, tokens, num_prompt, self.groups[request]):
            self.compute(request, 0)
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
    def stage_1_has_exactly_the_tokens_of_the_cache(self):
        if not hasattr(self, "manager"):
            return
        for request in self.live():
            sequence = self.manager._sequences[request]
            seen = sequence.matcher.tokens(0, sequence.matcher.num_tokens).tolist() + sequence.unmatched
            assert seen == self.tokens[request][: sequence.num_tokens]

    @invariant()
    def every_token_has_a_resident_row_that_held_the_same_token(self):
        if not hasattr(self, "manager"):
            return
        for request in self.live():
            sequence = self.manager._sequences[request]
            rows = sequence.token_rows[: sequence.num_computed]
            given_up = np.repeat(sequence.retired, SIZE)[: len(rows)]
            assert given_up[rows < 0].all()
            there = np.flatnonzero(rows >= 0)
            assert np.isin(rows[there] // SIZE, self.manager.block_table(request)).all()
            assert (self.held[rows[there]] == np.array(self.tokens[request])[there]).all()

    @invariant()
    def null_pages_are_never_written_nor_stand_in_for_anything(self):
        if hasattr(self, "manager"):
            null = np.flatnonzero(self.manager.pool.is_null)
            assert len(null) == self.manager.pool.num_null
            assert (self.held.reshape(-1, SIZE)[null] == -1).all()
            for request in self.live():
                assert not np.isin(self.manager._sequences[request].token_rows // SIZE, null).any()

    @invariant()
    def nobody_reads_what_a_stranger_wrote(self):
        """Nor a block of another sample that lies ahead of the reader."""
        if not hasattr(self, "manager"):
            return
        readers: dict[int, set] = {}
        for request in self.live():
            table = self.manager.block_table(request)
            for block in table[~is_null(table, self.manager.pool)].tolist():
                readers.setdefault(block, set()).add(
                    request if self.groups[request] is None else f"g{self.groups[request]}"
                )
                if self.manager.pool.is_full[block]:
                    assert self.manager.pool.origin_position[block] + SIZE <= len(self.tokens[request])
        assert all(len(names) == 1 for names in readers.values())

    @invariant()
    def no_chain_is_longer_than_allowed(self):
        if hasattr(self, "manager"):
            assert self.manager.pool.drift.max() <= self.manager.config.max_distance + 1e-6

    def teardown(self):
        if hasattr(self, "manager"):
            for request in self.live():
                self.manager.remove_sequence(request)
            assert self.manager.num_free_blocks == self.manager.pool.num_usable


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestCacheMachine = CacheMachine.TestCase
