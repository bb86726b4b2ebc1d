"""vLLM's choices on a GPU, model runner V2 and async scheduling, run for real on the CPU (``gpu_choices``).

``test_engine.py`` has model runner V1 without async scheduling, which is what vLLM chooses on a CPU.
"""

from __future__ import annotations

import pytest
from vllm_plugin.engine_runs import check, run_small, save_null_pages

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


V1, V2 = "cpu_model_runner", "cpu.model_runner"


@pytest.fixture(scope="module")
def null_pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Their second band begins while requests give up pages."""
    return save_null_pages(tmp_path_factory.mktemp("null_pages"), second_band=200)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return run_small("plain", "", runner="V2-async")["with_room"]


def test_null_pages_are_read_as_the_masked_reference_reads_them(null_pages, plain):
    result = run_small("read", null_pages, runner="V2-async")
    assert result["with_room"] == plain
    pressure = check(result, V2)
    assert pressure["band_moves"] > 0
    assert pressure["pages_with_surprisal"] >= 5


def test_entries_are_skipped_where_kernels_of_a_gpu_would_read(null_pages, plain):
    """At one address, as a CUDA graph of whole steps reads. V2 samples by whole lengths: a request that came back
    and gave up pages again would lose its token otherwise."""
    result = run_small("preempted", null_pages, num_schedules=3, runner="V2-async-graphs")
    assert result["with_room"] == plain
    pressure = check(result, V2)
    assert pressure["preemptions"] > 0
    assert pressure["retired_again"] > 0
    assert result["schedules"]["null_reads"] > 10  # entries of the scheduler's tables
    assert result["schedules"]["reads_of_others"] > 100
    assert result["schedules"]["idle"]


def test_aliases_are_read_as_often_as_they_are_named(null_pages, plain):
    result = run_small("aliases", null_pages, runner="V2-async")
    assert result["with_room"] == plain
    pressure = check(result, V2)
    assert pressure["aliased"] == pressure["retired"]
    assert pressure["difference_if_donors_counted_once"] > 1.0


def test_model_runner_v1_schedules_asynchronously_too(null_pages):
    check(run_small("skip", null_pages, runner="V1-async-graphs"), V1)
