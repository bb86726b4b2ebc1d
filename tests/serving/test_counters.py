"""Counts that a status or a report prints, each held against one that is kept by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text
from serving.test_pressure import make_executor, submit

from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import Phase, SamplingParams

SIZE, PROMPT, NEW = 8, 16, 120
BYTES = 2 * SIZE * 4 * 4  # of a block of the runner's pool: K and V of one layer and head, 4 numbers a token
BOUNDARIES = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])
PRESSURE = {"retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500}


class Counting(ReadingRunner):
    """Notes how many tokens each step has, and of how many requests."""

    def __init__(self, num_blocks, chunk_unit_size):
        super().__init__(num_blocks, SIZE, chunk_unit_size=chunk_unit_size, shows_pool=True)
        self.tokens, self.requests = [], []

    def step(self, batch):
        self.tokens.append(len(batch.input_ids))
        self.requests.append(len(batch.chunk_lengths))
        return super().step(batch)


def serve(num_blocks, count, most, preset, look=lambda executor, handles: None, unit=1, tokens=40, **settings):
    """Serves requests of one length to their ends; ``look`` is called after each step."""
    runner = Counting(num_blocks, unit)
    config = make_config(preset, **{**(PRESSURE if preset == "pressure" else {}), **settings})
    executor = Executor(runner, config, BOUNDARIES, 320, most, tokens)
    prompts = [[first, *repeating_text(first + 1000)[1:PROMPT]] for first in range(4, 4 + count)]
    handles = [executor.submit(prompt, SamplingParams(NEW)) for prompt in prompts]
    while executor.has_work:
        executor.step()
        look(executor, handles)
    assert all(len(handle.result(0).token_ids) == NEW for handle in handles)
    return runner, executor, handles


@pytest.mark.parametrize(
    ("preset", "num_blocks", "settings"),
    [("off", 40, {}), ("pressure", 34, {"need": "age", "min_kept": 0.75, "lookahead_tokens": 8})],
)
def test_pauses_and_tokens_computed_again(preset, num_blocks, settings):
    """Every token is computed once, the last of each request never, and those of a paused request once more."""
    runner, executor, handles = serve(num_blocks, 5, 5, preset, **settings)
    stats = executor.stats
    assert stats.num_pauses > 0
    assert stats.num_pauses == sum(handle.result(0).stats.num_pauses for handle in handles)
    assert stats.num_recomputed_tokens == sum(runner.tokens) - 5 * (PROMPT + NEW - 1)


@pytest.mark.parametrize(
    ("unit", "tokens", "first"),
    [
        (1, 40, 40),  # two whole prompts, and the beginning of the third until the step is full
        (1, 12, 12),  # prompts that go on beside requests that generate
        (8, 12, 8),  # in whole chunks
    ],
)
def test_a_step_holds_no_more_than_it_may_and_all_that_it_may(unit, tokens, first):
    runner, _, _ = serve(400, 7, 3, "off", unit=unit, tokens=tokens)
    assert max(runner.requests) == 3
    assert max(runner.tokens) <= tokens
    assert runner.tokens[0] == first


def test_the_peak_is_the_most_that_was_in_use():
    seen = []
    _, executor, _ = serve(400, 3, 3, "off", lambda executor, _: seen.append(executor.manager.pool.num_used))
    assert executor.manager.stats().peak_used_blocks == max(seen) == 3 * math.ceil((PROMPT + NEW - 1) / SIZE)


def test_what_pressure_says_of_the_moment():
    """Who is at the floor, what all do without, and the memory of that: from the block tables."""
    moments, largest = 0, 0

    def look(executor, handles):
        nonlocal moments, largest
        at_floor = gone = 0
        for state in executor._scheduler.running:
            full = state.num_computed // SIZE
            table = executor.manager.block_table(state.request_id)[PROMPT // SIZE : full]
            retired = int(np.count_nonzero(table == NO_BLOCK))
            at_floor += retired > 0 and len(table) - retired <= math.ceil(len(table) / 2)
            gone += retired
        said = executor.status().pressure
        assert (said.num_at_floor, said.retired_now) == (at_floor, gone)
        assert said.bytes_saved_now == gone * BYTES
        moments, largest = moments + (0 < at_floor < len(executor._scheduler.running)), max(largest, gone)

    serve(34, 8, 5, "pressure", look, need="age")
    assert largest > 10
    assert moments > 0  # some were at the floor and others were not


@pytest.mark.parametrize("mark", [1.0, 0.95])
def test_pauses_avoided_are_the_steps_that_were_short_of_blocks(mark):
    """Not those that gave pages up at the high watermark, with blocks left."""
    executor, expected = make_executor(60, high_watermark=mark, low_watermark=mark, lookahead_tokens=1), 0
    submit(executor, 3)
    manager, running = executor.manager, executor._scheduler.running
    while executor.has_work:
        free = manager.num_free_blocks
        wanted = sum(s.phase is Phase.GENERATION and manager.fills_last_block(s.request_id) for s in running)
        executor.step()
        expected += wanted > free
        assert executor.status().pressure.num_pauses_avoided == expected
    assert executor.stats.num_pauses == 0
    assert sum(executor.pressure.stats.retired_pages.values()) > 10
    assert expected > 5 or mark < 1


def test_what_is_known_of_a_request_goes_with_it():
    _, executor, _ = serve(48, 4, 4, "pressure", need="surprisal-led-redundancy-recency")
    ledger = executor.pressure._ledger
    assert executor.pressure.stats.retired_pages["needed_least"] > 0
    assert ledger._surprisal._slots == {}
    assert ledger._source._index._requests == {}
