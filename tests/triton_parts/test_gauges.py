"""The gauges of an executor: every field of its pressure arrives under its own label, and nothing else does."""

from __future__ import annotations

import time

import pytest
from fakes.counting_runner import CountingRunner
from fakes.reading_runner import ReadingRunner
from serving.counting_executor import WAIT, make

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.statistics import ExecutorStatus, PressureStatus
from trtllm_memshare.triton.metrics import ExecutorCollector

BYTES_PER_BLOCK = 4096


def make_status(pressure: PressureStatus | None) -> ExecutorStatus:
    return ExecutorStatus(
        num_active=11, num_waiting=12, num_context=3, num_context_tokens=513, num_generating=8, num_pauses=14,
        num_paused=5, num_steps=1016, num_finished=17, max_blocks=200, used_blocks=150, tokens_per_block=16,
        shared_blocks=20, search_seconds=0.75, num_candidates=22, refused={"drift": 23}, num_failed=1,
        num_failed_steps=2, step_seconds=41.5, pressure=pressure,
    )  # fmt: skip


def gauges(status: ExecutorStatus) -> dict[str, dict[str, float]]:
    """Value of every sample by its gauge's name and its label's value."""
    families = ExecutorCollector(lambda: status, 64, BYTES_PER_BLOCK).collect()
    return {f.name: {next(iter(s.labels.values())): s.value for s in f.samples} for f in families}


def test_every_field_of_pressure_has_a_gauge_of_its_own():
    found = gauges(
        make_status(
            PressureStatus(
                is_active=True,
                retired_pages={"repeated": 31, "needed_least": 32, "resumed": 40},
                num_episodes=33,
                num_pauses_avoided=34,
                num_admitted=35,
                num_at_floor=36,
                retired_now=37,
                bytes_saved_now=38 * BYTES_PER_BLOCK,
                num_failed_reliefs=39,
            )
        )
    )
    assert found["memshare_pressure"] == {
        "active": 1,
        "at_floor": 36,
        "retired_now": 37,
        "bytes_saved_now": 38 * BYTES_PER_BLOCK,
        "episodes": 33,
        "pauses_avoided": 34,
        "admitted": 35,
        "failed_reliefs": 39,
    }
    assert found["memshare_retired_pages"] == {"repeated": 31, "needed_least": 32, "resumed": 40}
    assert found["memshare_pauses"] == {"pauses": 14}


def test_what_is_not_pressures_is_the_executors():
    found = gauges(make_status(None))
    assert set(found["memshare_pressure"].values()) == set(found["memshare_retired_pages"].values()) == {0}
    assert found["nv_trt_llm_kv_cache_block_metrics"] == {
        "max": 200, "free": 50, "used": 150, "tokens_per": 16, "fraction": 0.75,
    }  # fmt: skip
    assert found["nv_trt_llm_request_metrics"] == {
        "active": 23, "max": 64, "scheduled": 11, "context": 3, "waiting": 12,
    }  # fmt: skip
    assert found["memshare_saved_bytes"] == {"bytes": 20 * BYTES_PER_BLOCK}
    assert found["memshare_search"] == {"candidates": 22, "seconds": 0.75}


@pytest.mark.parametrize("retired_becomes", ["dropped", "null"])
def test_a_short_pool_is_seen_while_it_is_short_and_in_the_totals_afterwards(retired_becomes):
    size, texts = 8, BoundaryTokens.from_texts([f"w{i}" for i in range(64)])
    runner = ReadingRunner(40, size)
    if retired_becomes == "null":
        runner.null_pages = NullPages([0, 1], [0, 160, 320])
    config = make_config("pressure", need="age", retired_becomes=retired_becomes, protected_tokens=16)
    executor = Executor(runner, config, texts, 320)
    runner.manager = executor.manager
    for first in range(4, 8):
        executor.submit([first] * 4, SamplingParams(200))
    most = 0.0
    while executor.has_work:
        executor.step()
        found = gauges(executor.status())
        gone = found["memshare_pressure"]["retired_now"]
        table_entries = executor.manager.stats().null_entries
        assert gone == table_entries, "the gauge and the block tables differ"
        most = max(most, gone)
    assert most > 0
    totals = gauges(executor.status())
    assert sum(totals["memshare_retired_pages"].values()) >= most
    assert totals["memshare_pressure"]["retired_now"] == totals["memshare_pressure"]["active"] == 0
    assert totals["memshare_pressure"]["episodes"] >= 1


def test_a_step_that_lasts_is_told_from_its_own_beginning():
    """And not from the last time that somebody looked, which may be a minute ago."""
    assert gauges(make_status(None))["memshare_seconds_since_step"] == {"seconds": 41.5}


def test_the_time_of_a_step_is_that_of_the_one_that_runs(boundaries):
    runner, seen = CountingRunner(), list[float]()
    with make(boundaries, runner) as executor:
        assert executor.status().step_seconds == 0

        def look(_):
            time.sleep(0.05)
            seen.append(executor.status().step_seconds)

        runner.before_step = look
        executor.submit([5], SamplingParams(2)).result(WAIT)
    assert all(seconds >= 0.05 for seconds in seen)
    assert len(seen) >= 2
    assert executor.status().step_seconds == 0
