"""Random schedules of samples that mostly agree: nobody reads what it should not, and blocks do cross between samples.

Hypothesis's own schedules hardly ever let two samples write the same block, so these are drawn plainly, by seed.
"""

from __future__ import annotations

import numpy as np
import pytest
from cache.small_manager import SIZE, make_manager

from trtllm_memshare.search.types import Decision

NUM_BLOCKS = 60
PHRASES = ([2, 3, 4, 3, 2, 2, 0], [2, 4, 4, 2, 3, 1], [3] * 5 + [0], list(range(7, 17)))


class Schedule:
    """Two groups; a sample follows its group's text but for one token in two hundred."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        direction = ("keep-latest", "keep-earliest")[seed % 2]
        most = 64 if seed % 3 else int(self.rng.integers(1, 8))
        self.manager = make_manager(direction, num_blocks=NUM_BLOCKS, scope="group", max_pairs=most)
        self.scripts = [[t for _ in range(60) for t in PHRASES[self.rng.integers(len(PHRASES))]] for _ in range(2)]
        self.held = np.full(NUM_BLOCKS * SIZE, -1)  # the token whose K and V each row holds
        self.tokens: dict[int, list[int]] = {}
        self.groups: dict[int, int] = {}
        self.paused: set[int] = set()
        self.pending: list[list[Decision]] = []
        self.across = self.next_id = 0
        self.manager.watch_remaps(self.note)

    def note(self, decision: Decision) -> None:
        """Counts remaps to a block that another sample wrote or reads too."""
        candidate = decision.candidate
        readers = [r for r in self.live() if candidate.donor in self.manager.block_table(r)]
        self.across += any(r != candidate.request_id for r in readers)

    def live(self) -> list[int]:
        return [r for r in self.tokens if r not in self.paused]

    def compute(self, request: int, start: int) -> None:
        tokens = self.tokens[request]
        self.held[self.manager._sequences[request].token_rows[start : len(tokens)]] = tokens[start:]
        self.manager.mark_computed(request, len(tokens))

    def add(self) -> None:
        group = int(self.rng.integers(2))
        prompt = [2, 3, 4 + group]
        if self.manager.add_sequence(self.next_id, np.array(prompt, np.int32), group=group):
            self.tokens[self.next_id], self.groups[self.next_id] = prompt, group
            self.compute(self.next_id, 0)
        self.next_id += 1

    def generate(self, request: int) -> None:
        tokens = self.tokens[request]
        for _ in range(int(self.rng.integers(1, 20))):
            follows = self.rng.random() < 0.995
            token = self.scripts[self.groups[request]][len(tokens) - 3] if follows else int(self.rng.integers(20, 29))
            if len(tokens) >= 24 * SIZE or not self.manager.append_tokens(request, [token]):
                return
            tokens.append(token)
            self.compute(request, len(tokens) - 1)

    def search(self) -> None:
        found = self.manager.candidates()
        assert len(found) <= self.manager.config.max_pairs
        self.pending.append([Decision(c, float(self.rng.random() * 0.1)) for c in found if self.rng.random() < 0.9])

    def apply_late(self) -> None:
        free = self.manager.num_free_blocks
        freed = self.manager.apply(self.pending.pop(0))
        assert self.manager.num_free_blocks == free + freed

    def resume(self, request: int) -> None:
        if self.manager.add_sequence(request, np.array(self.tokens[request], np.int32), 3, self.groups[request]):
            self.compute(request, 0)
            self.paused.remove(request)

    def step(self) -> None:
        draw, live = self.rng.random(), self.live()
        one = live[self.rng.integers(len(live))] if live else None
        if draw < 0.08 or one is None:
            self.add()
        elif draw < 0.6:
            self.generate(one)
        elif draw < 0.78:
            self.search()
        elif draw < 0.9 and self.pending:
            self.apply_late()
        elif draw < 0.94:
            self.manager.pause_sequence(one)
            self.paused.add(one)
        elif draw < 0.97 and self.paused:
            self.resume(sorted(self.paused)[self.rng.integers(len(self.paused))])
        else:
            self.manager.remove_sequence(one)
            del self.tokens[one]

    def check(self) -> None:
        self.manager.check_integrity()
        groups: dict[int, set[int]] = {}
        for request in self.live():
            sequence, table = self.manager._sequences[request], self.manager.block_table(request)
            rows = sequence.token_rows[: sequence.num_computed]
            assert np.isin(rows // SIZE, table).all()
            assert (self.held[rows] == self.tokens[request][: len(rows)]).all()
            for block in table.tolist():
                groups.setdefault(block, set()).add(self.groups[request])
        assert all(len(readers) == 1 for readers in groups.values())


@pytest.mark.parametrize("first", [0, 100])
def test_schedules_of_samples_that_mostly_agree(first):
    across = 0
    for seed in range(first, first + 20):
        schedule = Schedule(seed)
        for _ in range(250):
            schedule.step()
            schedule.check()
        for request in schedule.live():
            schedule.manager.remove_sequence(request)
        assert schedule.manager.num_free_blocks == NUM_BLOCKS
        assert not schedule.manager._groups
        across += schedule.across
    assert across > 50
