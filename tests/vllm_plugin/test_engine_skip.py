"""vLLM itself, on the CPU, with null entries left out of attention (``engine_process``, ``short_pool_process``)."""

from __future__ import annotations

from typing import Any

import pytest
from nightly import NIGHTLY
from vllm_plugin.engine_runs import run

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

DEFAULT_NEED = "surprisal-led-redundancy-recency"


@pytest.fixture(scope="module")
def skip(null_pages: str) -> dict[str, Any]:
    return run("skip", null_pages, DEFAULT_NEED, "4")


def test_skipping_with_room_leaves_tokens_bit_by_bit(skip, null_pages):
    assert skip["with_room"] == run("plain", null_pages)["with_room"]


def test_with_null_entries_skipped_log_probabilities_are_those_of_a_pass_without_the_pages(skip):
    """The null pages of these tests are far from null, so that one that is read all the same would be seen."""
    pressure = skip["pressure"]
    assert pressure["retired"] >= 20
    assert pressure["requests_retired_from"] >= 5
    assert pressure["preemptions"] == 0
    # The bound of ``test_engine``.
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_nothing_were_retired"] > 1.0
    assert pressure["surprisal_difference"] < 1e-3


def test_block_tables_that_slots_are_worked_out_from_stay_whole_where_entries_are_skipped(skip):
    schedules = skip["schedules"]
    assert schedules["null_reads"] > 100  # entries that the scheduler's tables have at null pages
    assert schedules["idle"]
    assert skip["still_skipped"] == 0


@pytest.mark.parametrize("need", [DEFAULT_NEED, "nearest-earlier"] if NIGHTLY else [DEFAULT_NEED])
def test_without_null_pages_nothing_reads_the_block_that_null_entries_name(null_pages, need):
    """NaN in it, K and V: answers and log-probabilities are those of skipping null pages, to the last bit."""
    program = "short_pool_process.py"
    short = run("short", null_pages, need, program=program)["short"]
    poisoned = run("poisoned", "", need, program=program)
    assert poisoned["short"] == short
    assert short["preempted_with_gaps"] > 0
    assert short["retired_again"] > 0
    assert short["cache_hits"] > 0
    assert short["null_entries"] > 0
    assert poisoned["schedules"]["null_reads"] > 100  # entries of the scheduler's tables
    assert poisoned["schedules"]["idle"]
    assert poisoned["not_finite"] == 0
    assert poisoned["is_untouched"]
    assert poisoned["not_finite_if_read"] > 0
