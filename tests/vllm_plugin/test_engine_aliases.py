"""vLLM itself, on the CPU, with the published method: entries that name an earlier page (``engine_process.py``)."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_plugin.engine_runs import run

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


@pytest.fixture(scope="module")
def aliases(null_pages: str) -> dict[str, Any]:
    return run("aliases", null_pages, "4")


def test_with_aliases_log_probabilities_are_those_of_donors_that_count_more_than_once(aliases):
    pressure = aliases["pressure"]
    assert pressure["aliased"] >= 20
    assert pressure["preemptions"] == 0
    assert not pressure["off_retired"]
    # The bound of ``test_engine``.
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_donors_counted_once"] > 0.5
    assert pressure["difference_if_nothing_were_retired"] > 1.0


def test_tables_with_aliases_follow_through_random_schedules(aliases):
    schedules = aliases["schedules"]
    assert schedules["alias_reads"] > 100
    assert schedules["idle"]
