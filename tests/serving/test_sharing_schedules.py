"""Random schedules of the whole executor with sharing: every preset, both ways of comparing, groups, late decisions.

Without sharing, and in shadow, tokens equal those of an executor that has memory for everything: there the next token
depends on every row that is read. With sharing every token rests on a row that holds its like, in a block that the
request's table names. About 6,000 operations in an ordinary run; ``MEMSHARE_SCHEDULE_OPERATIONS=100000`` for a long
one.
"""

from __future__ import annotations

import dataclasses
import os
from functools import lru_cache

import numpy as np
import pytest
from effective_settings import make_effective
from fakes.reading_runner import PHRASES, VOCAB_SIZE, ReadingRunner, repeating_text
from fakes.schedule_record import ScheduleRecord, counts_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from nightly import NIGHTLY

from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.search.block_search import ReadyDistances
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.scheduler import POLICIES

SIZE = 8
MAX_LEN = 40 * SIZE
BOUNDARIES = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])
OPERATIONS = int(os.environ.get("MEMSHARE_SCHEDULE_OPERATIONS", "6000"))
OPERATIONS_AN_EXAMPLE = 500
MOST_REQUESTS = 8
STEPS_OF_TOKENS = "paper"  # its matcher takes steps that are alike, not tokens that are equal
RECORD = ScheduleRecord("tests/serving/test_sharing_schedules.py", f"MEMSHARE_SCHEDULE_OPERATIONS={OPERATIONS}")


class BatchRunner(ReadingRunner):
    """Compares the pairs that come with a step. Distances are drawn; one in twenty is not a number."""

    def __init__(self, num_blocks: int, unit: int, depends_on_reads: bool, seed: int) -> None:
        super().__init__(num_blocks, SIZE, depends_on_reads, unit)
        self._shares, self._rng = not depends_on_reads, np.random.default_rng(seed)

    def step(self, batch: StepBatch) -> StepOutput:
        output = super().step(batch)
        return output if batch.pairs is None else dataclasses.replace(output, block_distances=self._sums(batch.pairs))

    def _sums(self, pairs: PairBatch) -> ReadyDistances:
        sums = np.ones((len(pairs), self.num_layers, 4), np.float32)  # [.., 0 and 2]: differences of K and of V
        sums[..., [0, 2]] = (self._rng.random((len(pairs), 1, 1)) * 0.3).astype(np.float32) ** 2
        sums[self._rng.random(len(pairs)) < 0.05] = np.nan
        return ReadyDistances(sums, 0.0)

    def _read(self, table: np.ndarray, chunk: int, length: int) -> int:
        if not self._shares:
            return super()._read(table, chunk, length)
        assert (table[np.arange(length) // SIZE] != NO_BLOCK).all(), "a token has no block"
        first = int(self._tokens[table[0] * SIZE])
        return repeating_text(first)[length]


class ComparingRunner(BatchRunner):
    """Compares when it is asked, apart from a step."""

    def compare(self, pairs: PairBatch) -> ReadyDistances:
        return self._sums(pairs)


@lru_cache(maxsize=10_000)
def with_memory_for_everything(prompt: tuple[int, ...], params: SamplingParams) -> tuple[list[int], str]:
    runner = ReadingRunner(64, SIZE, depends_on_reads=True)
    executor = Executor(runner, make_config("off"), BOUNDARIES, MAX_LEN, 1)
    runner.manager = executor.manager
    handle = executor.submit(list(prompt), params)
    executor.run_until_idle()
    return handle.result(0).token_ids, handle.result(0).finish_reason


class SharingMachine(RuleBasedStateMachine):
    """Submits, steps, cancels, pauses and applies late in any order, over pools of any tightness."""

    @initialize(data=st.data())
    def start(self, data):
        def draw(*choices):
            return data.draw(st.sampled_from(choices))

        preset = draw(*["aligned", "lexical", STEPS_OF_TOKENS, "drop-duplicate"] * 2, "off")
        chosen = {
            "shadow": draw(*[False] * 7, True),
            "protected_tokens": draw(0, 4, 16),
            "protected_steps": draw(0, 2),
            "min_run_tokens": draw(4, 8, 16),
            "shingle_tokens": 4,
            "min_step_tokens": 2,
            "max_aliases": draw(2, 4, 8),
            "search_interval": draw(1, 2, 5),
            "max_pairs": draw(1, 3, 64),
            "settled_tokens": draw(0, 0, 5),
            "max_gap_tokens": draw(0, 0, 2),
            "direction": draw("keep-latest", "keep-earliest"),
            "scope": draw("request", "group"),
            "min_pool_use": draw(0.0, 0.0, 0.5),
        }
        self.config = make_config(preset) if preset == "off" else make_effective(preset, **chosen)
        self.tokens_are_equal = preset != STEPS_OF_TOKENS and not self.config.max_gap_tokens
        unit, most = draw(1, 1, SIZE), data.draw(st.integers(1, 6))
        make = draw(BatchRunner, ComparingRunner)
        runner = make(data.draw(st.integers(40, 90)), unit, not self.config.shares, data.draw(st.integers(0, 9999)))
        most_tokens = data.draw(st.integers(max(most, 2 * unit), 40))
        self.executor = Executor(runner, self.config, BOUNDARIES, MAX_LEN, most, most_tokens, draw(*POLICIES))
        self.runner, self.manager, self.scheduler = runner, self.executor.manager, self.executor._scheduler
        runner.manager = self.manager
        self.requests = {}

    @precondition(lambda self: len(self.requests) < MOST_REQUESTS)
    @rule(data=st.data(), group=st.sampled_from([None, 0, 1]), shares=st.sampled_from([True, True, False]))
    def submit(self, data, group, shares):
        first = data.draw(st.integers(4, 12))
        prompt = repeating_text(first)[: data.draw(st.integers(1, 60))]
        new = data.draw(st.sampled_from([1, 3, 60, 200, MAX_LEN - len(prompt)]))
        stop = data.draw(st.sampled_from([(), (), (PHRASES[3][3],)]))
        temperature, seed = data.draw(st.sampled_from([0.0, 0.0, 0.5])), data.draw(st.integers(0, 3))
        params = SamplingParams(new, temperature, seed=seed, stop_token_ids=stop, memshare=shares)
        handle = self.executor.submit([first, *prompt[1:]], params, group)
        self.requests[handle.request_id] = (handle, (first, *prompt[1:]), params)

    @precondition(lambda self: len(self.requests) < MOST_REQUESTS)
    @rule(count=st.integers(1, 4), group=st.sampled_from([None, 0]))
    def burst(self, count, group):
        """Samples of one prompt, which a group lets share."""
        prompt, params = repeating_text(4)[:20], SamplingParams(MAX_LEN - 20)
        for _ in range(count):
            handle = self.executor.submit(prompt, params, group)
            self.requests[handle.request_id] = (handle, tuple(prompt), params)

    @rule(count=st.integers(1, 15))
    def step(self, count):
        for _ in range(count):
            self.executor.step()
            self.check()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.requests[data.draw(st.sampled_from(sorted(self.requests)))][0].cancel()

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def pause(self, data):
        self.scheduler._pause(data.draw(st.sampled_from(self.scheduler.running)))
        self.check()

    @rule()
    def apply_late(self):
        """Decisions of the last search come now, whatever has happened since."""
        self.executor.sharing.apply()
        self.check()

    def check(self):
        manager, pool = self.manager, self.manager.pool
        manager.check_integrity()
        assert {s.request_id for s in self.scheduler.running} == set(manager._sequences)
        owners: dict[int, set] = {}
        for state in self.scheduler.running:
            sequence, table = manager._sequences[state.request_id], manager.block_table(state.request_id)
            assert state.num_computed == sequence.num_computed
            if sequence.matcher is not None:
                seen = sequence.matcher.tokens(0, sequence.matcher.num_tokens).tolist() + sequence.unmatched
                assert seen == state.tokens[: len(seen)], "stage 1 has other tokens than the request"
            rows = sequence.token_rows[: sequence.num_computed]
            assert np.isin(rows // SIZE, table).all(), "a token rests on a block that the table does not name"
            if self.tokens_are_equal:
                assert self.runner._tokens[rows].tolist() == state.tokens[: len(rows)], "on another token's row"
            prompt = table[: sequence.first_generated_block]
            assert (pool.origin_position[prompt] == np.arange(len(prompt)) * SIZE).all(), "a prompt block was replaced"
            assert np.unique(table, return_counts=True)[1].max(initial=0) <= self.config.max_aliases
            if not state.params.memshare:
                assert not sequence.retired.any(), "a request that shares nothing has given up a block"
            owner = sequence.group if sequence.group is not None else state.request_id
            for block in np.unique(table).tolist():
                owners.setdefault(block, set()).add(owner)
        assert all(len(who) == 1 for who in owners.values()), "strangers share a block"
        if not self.config.shares:
            assert pool.ref_count.max(initial=0) <= 1

    def teardown(self):
        if not hasattr(self, "executor"):
            return
        progress, idle = None, 0
        while self.executor.has_work:
            now = sum(len(s.tokens) for s in [*self.scheduler.running, *self.scheduler.waiting])
            idle = idle + 1 if (now, self.executor.stats.num_finished) == progress else 0
            progress = (now, self.executor.stats.num_finished)
            assert idle < 400, "no progress for 400 steps"
            self.executor.step()
            self.check()
        assert self.manager.pool.num_used == 0
        assert not self.manager._parked
        for handle, prompt, params in self.requests.values():
            result = handle.result(0)
            if not self.config.shares:
                tokens, reason = with_memory_for_everything(prompt, params)
                whole = result.finish_reason == reason
                assert whole or result.finish_reason == "cancelled"
                assert result.token_ids == (tokens if whole else tokens[: len(result.token_ids)])
            elif params.temperature == 0:
                end = len(prompt) + len(result.token_ids)
                assert result.token_ids == repeating_text(prompt[0])[len(prompt) : end]
        RECORD.add(counts_of(self.executor, len(self.requests)))


SharingMachine.TestCase.settings = settings(
    max_examples=max(1, OPERATIONS // OPERATIONS_AN_EXAMPLE),
    stateful_step_count=50,
    deadline=None,
    derandomize=not NIGHTLY,  # other schedules every night
    suppress_health_check=list(HealthCheck),
)
TestSharingMachine = SharingMachine.TestCase


def test_the_schedules_above_shared_and_paused():
    """Hypothesis begins with small examples: too few of them, and nothing would have been tried."""
    if not RECORD.counts["schedules"]:
        pytest.skip("no schedule ran before this")
    assert RECORD.counts["shared_blocks"] > 50
    assert RECORD.counts["pauses"] > 5
