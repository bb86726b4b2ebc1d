"""vLLM's tensor parallelism, on the CPU: two workers with half of the heads each, over gloo, and both model runners."""

from __future__ import annotations

from pathlib import Path

import pytest
from nightly import at_night
from vllm_plugin.engine_runs import check, run_small, save_null_pages

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


AT_NIGHT = [("V1", "read"), ("V1", "aliases"), ("V2-async", "read"), ("V2-async", "skip"), ("V2-async", "aliases")]


@pytest.mark.parametrize(("runner", "arm"), [("V1", "skip"), *(at_night(*case) for case in AT_NIGHT)])
def test_two_ranks_read_what_the_masked_reference_reads(tmp_path: Path, runner: str, arm: str):
    """Those that skip have no null pages."""
    result = run_small(arm, "" if arm == "skip" else save_null_pages(tmp_path), num_ranks=2, runner=runner)
    assert (result["is_v2"], result["is_async"]) == (runner == "V2-async",) * 2
    pressure = check(result)
    assert (pressure["aliased"] == pressure["retired"]) == (arm == "aliases")
