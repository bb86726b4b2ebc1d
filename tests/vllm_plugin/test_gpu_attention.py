"""Attention that vLLM has for GPUs, ``TRITON_ATTN``, with all that is chosen there, run on the CPU (``gpu_choices``).

Its kernels read block tables and lengths where they lie on the device, and fp8 caches on every CPU. Each case takes a
minute or two: the default in an fp8 cache runs every time, ``MEMSHARE_NIGHTLY`` adds the others.
"""

from __future__ import annotations

import pytest
from vllm_plugin.engine_runs import NIGHTLY, check, run_small

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


CASES = [("skip", "fp8")]
if NIGHTLY:
    CASES += [("read", "fp8"), ("read", "auto"), ("skip", "auto"), ("aliases", "auto")]


@pytest.mark.parametrize(("arm", "elements"), CASES, ids=lambda value: value)
def test_a_gpus_kernels_read_what_the_masked_reference_reads(null_pages, arm, elements):
    """With the null page of an fp8 cache as long as it can be; who skips has none."""
    runner = "V2-async-in-place-triton" + ("-fp8" if elements == "fp8" else "")
    result = run_small(arm, "" if arm == "skip" else null_pages, runner=runner)
    assert result["attention"] == "TRITON_ATTN"
    assert result["elements"] == elements
    pressure = check(result, "cpu.model_runner")
    if arm == "aliases":
        assert pressure["aliased"] == pressure["retired"]
        assert pressure["difference_if_donors_counted_once"] > 0.05
    else:
        assert pressure["pages_with_surprisal"] >= 5
