"""vLLM's tensor parallelism, on the CPU: two workers with half of the heads each, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_plugin.engine_runs import NIGHTLY, check, run_small, save_null_pages

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


@pytest.mark.parametrize("arm", ["read", "skip", "aliases"] if NIGHTLY else ["read", "skip"])
def test_two_ranks_read_what_the_masked_reference_reads(tmp_path: Path, arm: str):
    """Those that skip have no null pages."""
    pressure = check(run_small(arm, "" if arm == "skip" else save_null_pages(tmp_path), num_ranks=2))
    assert (pressure["aliased"] == pressure["retired"]) == (arm == "aliases")
